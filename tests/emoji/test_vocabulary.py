"""The vocabulary of `tiny`: one token for a noun everywhere, short branches, nothing lost."""

from __future__ import annotations

import re
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomolmo2.emoji.questions import BranchMix, make_branches
from nanomolmo2.emoji.scenes import render_scene, train_rng
from nanomolmo2.emoji.sprites import CATEGORIES, PLURALS, Sprites
from nanomolmo2.emoji.vocabulary import (
    ADDITIONAL_VOCAB_SIZE,
    SPECIAL_TOKENS,
    build_tokenizer,
    noun_ids,
    pieces,
    plural_ids,
    vocab_size,
)
from nanomolmo2.processor.tokenizer import MOLMO2_TOKENS, Tokenizer

TOKENIZER = build_tokenizer()
PROCESSOR_TOKENIZER = Tokenizer(build_tokenizer())  # sets options of its backend
MAX_MEAN_LENGTH = {
    # question, answer
    "presence": (9, 2),
    "count": (10, 18),
    "number": (14, 1),
    "point": (8, 15),
    "points": (10, 27),
    "caption": (8, 11),
    "spatial": (11, 4),
    "size": (12, 3),
    "at": (13, 4),
    "unknown": (16, 130),
}


@pytest.fixture(scope="module")
def branches():
    rng, sprites = train_rng(12), Sprites.load()
    mix = BranchMix(spatial=4, count=4, point=4, number=4, unknown=0.2)
    scenes = [render_scene(rng, sprites) for _ in range(150)]
    return [b for i, s in enumerate(scenes) for b in make_branches(s, rng, mix, (1, 10, 50)[i % 3])]


def test_every_noun_is_its_own_token_in_question_and_answer(branches):
    """A plural token of its own, or a noun with its space, would hide that both mean the same."""
    singular, plural = noun_ids(TOKENIZER), plural_ids(TOKENIZER)
    by_word = dict(zip(CATEGORIES, singular, strict=True))
    regular = {p: by_word[n] for n, p in zip(CATEGORIES, PLURALS, strict=True)}
    irregular = {PLURALS[i]: id for i, id in plural.items()}
    words = by_word | {p: id for p, id in regular.items() if p != "fish"} | irregular
    nouns = {*singular, *plural.values()}
    num_nouns = 0
    for branch in branches:
        for message in branch.messages:
            expected = [
                words[w] for w in re.findall(r"[A-Za-z]+", message["content"]) if w in words
            ]
            ids = TOKENIZER.encode(message["content"]).ids
            assert [id for id in ids if id in nouns] == expected, message["content"]
            num_nouns += len(expected)
    assert num_nouns > 5000


@pytest.mark.parametrize("context", ["the {}", "Point to {} and", "no {}", "{}", " {}.", "a {},"])
def test_nouns_stay_whole_in_other_sentences(context):
    """With a piece " be" for the verb, "bees" became " be|es", with no bee among them."""
    for noun, plural in zip(CATEGORIES, PLURALS, strict=True):
        ends = {noun, plural} if TOKENIZER.token_to_id(plural) is not None else {noun}
        for word in (noun, plural):
            assert ends & set(TOKENIZER.encode(context.format(word)).tokens), word


def test_irregular_plurals_are_few(branches):
    assert sorted(PLURALS[i] for i in plural_ids(TOKENIZER)) == [
        *("butterflies", "leaves", "snowmen", "strawberries", "trophies")
    ]


def test_branches_are_short_and_no_word_is_spelled_out(branches):
    lengths = defaultdict(list)
    for branch in branches:
        encoded = [TOKENIZER.encode(m["content"]) for m in branch.messages]
        lengths[branch.task].append([len(e.ids) for e in encoded])
        if branch.task == "unknown":  # such words have no piece of their own
            continue
        letters = {t for e in encoded for t in e.tokens if len(t) == 1 and t.isalpha()}
        assert letters <= {"s"}, [e.tokens for e in encoded]
    for task, pairs in lengths.items():
        mean = np.mean(pairs, axis=0)
        print(f"{task:9} question {mean[0]:5.2f}  answer {mean[1]:5.2f} tokens")
        assert (mean <= MAX_MEAN_LENGTH[task]).all(), task
    assert set(lengths) == set(MAX_MEAN_LENGTH)


def test_a_point_is_seven_tokens():
    text = '<points coords="1 1 210 455 2 640 480">dog</points>'
    assert TOKENIZER.encode(text).tokens == [
        '<points coords="1',
        *(" 1", " 2", "1", "0", " 4", "5", "5"),
        *(" 2", " 6", "4", "0", " 4", "8", "0"),
        *('">', "dog", "</points>"),
    ]


def test_the_chat_format_is_two_tokens_around_a_question():
    text = (
        "<|im_start|>user\nIs there a dog?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>"
        "\n<|im_start|>user\n"
    )
    assert TOKENIZER.encode(text).tokens == [
        *("<|im_start|>user\n", "Is", " there", " a ", "dog", "?"),
        *("<|im_end|>\n<|im_start|>assistant\n", "Yes", ".", "<|im_end|>"),
        *("\n", "<|im_start|>user\n"),
    ]


@settings(deadline=None)  # the machine may be busy
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text):
    ids = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text",
    ["<0x41>", "<unk>", "<0x0", " dog  dogs\r\n\t\x00", "naïve 東京 🐶👩‍🚀", "It's 12.5 %"],
)
def test_text_that_looks_like_a_piece_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


@settings(deadline=None)
@given(st.lists(st.sampled_from([*pieces(), "<|im_end|>", "<im_patch>", "é"]), max_size=12))
def test_text_made_of_pieces_and_special_tokens_comes_back_through_the_processor(parts):
    """A user who writes a special token gets its characters, never the token."""
    text = "".join(parts)
    ids = PROCESSOR_TOKENIZER.encode_text(text)
    assert PROCESSOR_TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert not set(ids) & set(PROCESSOR_TOKENIZER.special_ids.values())


def test_ids_of_special_tokens():
    size = vocab_size(TOKENIZER)
    assert size % 32 == 0 and 500 <= size <= 800
    assert TOKENIZER.get_vocab_size() == size + ADDITIONAL_VOCAB_SIZE == size + 16
    for offset, name in enumerate(MOLMO2_TOKENS):
        assert TOKENIZER.token_to_id(name) == size + offset
    official = {"<im_start>": 0, "<im_end>": 1, "<im_patch>": 2, "<im_col>": 3}
    official |= {"<low_res_im_start>": 4, "<|image|>": 5, "<frame_end>": 8, "<|video|>": 9}
    assert all(TOKENIZER.token_to_id(name) == size + i for name, i in official.items())
    for name in SPECIAL_TOKENS:
        assert TOKENIZER.token_to_id(name) < size


def test_the_vocabulary_has_no_holes_and_no_doubles():
    vocabulary = TOKENIZER.get_vocab(with_added_tokens=True)
    assert sorted(vocabulary.values()) == list(range(TOKENIZER.get_vocab_size()))
    assert len(set(pieces())) == len(pieces())


def test_saving_keeps_it(tmp_path):
    import tokenizers

    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "How many butterflies and 東 dogs?<|im_end|>"
    assert loaded.encode(text).ids == TOKENIZER.encode(text).ids
    assert build_tokenizer().to_str() == TOKENIZER.to_str()


def test_a_foreign_tokenizer_is_refused():
    import tokenizers

    with pytest.raises(ValueError, match="no piece 'dog'"):
        noun_ids(tokenizers.Tokenizer(tokenizers.models.BPE()))
