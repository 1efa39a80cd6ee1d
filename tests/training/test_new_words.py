"""Words that a small vocabulary has to spell become tokens, and nothing else changes."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image

from nanomolmo2.convert import export_molmo2
from nanomolmo2.convert.pretrained import check_agreement, load
from nanomolmo2.data.sources import open_source
from nanomolmo2.generation import finding
from nanomolmo2.generation.pipeline import Pipeline
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.processor import Processor, Tokenizer
from nanomolmo2.recipes import smoke
from nanomolmo2.recipes.molmo2 import adamw
from nanomolmo2.things.find_model import CONFIG, find_processor
from nanomolmo2.training.lora import LoraConfig
from nanomolmo2.training.new_words import (
    MOST_WORDS,
    add_new_words,
    find_new_words,
    has_closed_vocabulary,
    spelled_words,
)
from nanomolmo2.training.recipe import Recipe
from nanomolmo2.training.trainer import build, train_recipe
from tests.data.sources import write_records
from tests.small_model import small_config, small_model, small_processor
from tests.training.recipes import toy

RESERVED = 25  # special tokens that fill `tiny`'s vocabulary up
QUESTION = "How many walnuts are there?"
MANY = tuple(f"zz{a}{b}" for a in "abcdef" for b in "stuvwxyz")  # 48 words


def exchange(question: str, answer: str) -> dict:
    return {"question": question, "answer": answer}


WALNUTS = (
    exchange(QUESTION, "A walnut."),
    exchange("How many hazelnuts are there?", "Two hazelnuts."),
    {"question": "Point to the walnuts.", "points": [{"x": 1, "y": 2, "label": "walnut"}]},
)


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([id]) for id in tokenizer.encode_text(text)]


def words_of(tmp_path: Path, *records: dict) -> list[str]:
    source = open_source(str(write_records(tmp_path / "words.jsonl", *records)))
    return find_new_words([source], small_processor().tokenizer)


# ---- which words ----


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        (QUESTION, ["walnuts"]),
        ("How many dogs are there?", []),
        ("Point to the dog and the apple.", []),
        ("A garden in snow, a garden.", ["garden", "snow", "garden"]),
        ("Nüsse: 12 (x7)", ["Nüsse"]),
        ("12 34 <|im_end|>", ["im", "end"]),
        ("a b c", []),  # one letter is one token
        ("\ud800 walnut", []),  # no text at all
        ("", []),
    ],
)
def test_the_words_that_have_to_be_spelled(text: str, spelled: list[str]) -> None:
    assert list(spelled_words(text, small_processor().tokenizer)) == spelled


def test_words_of_the_data_by_how_often_they_are_found(tmp_path: Path) -> None:
    """ "walnuts" twice and "walnut" twice are one word, found four times. "hazelnuts", twice, stays
    a plural: nobody says "hazelnut". What is found once is left spelled."""
    more = (exchange("Is there a quince?", "No."),)
    assert words_of(tmp_path, *WALNUTS, *more) == ["walnut", "hazelnuts"]


def test_words_of_conversations_labels_and_other_layouts(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "a gear"}, {"from": "gpt", "value": "a gear, a bolt"}]
    branches = [{"messages": [{"role": "user", "content": [{"type": "text", "text": "a bolt"}]}]}]
    assert words_of(
        tmp_path,
        {"id": "rivet", "image": "rivet.png", "conversations": turns},
        {"image": "rivet.png", "branches": branches, "note": "rivet"},
    ) == ["bolt", "gear"]


def test_no_more_than_most_words(tmp_path: Path) -> None:
    letters = "abcdefghij"
    words = [f"q{a}{b}{c}q" for a in letters for b in letters for c in letters][: MOST_WORDS + 7]
    text = " ".join([*words, *words, "walnut walnut walnut"])
    found = words_of(tmp_path, exchange(text, "Yes."))
    assert len(found) == MOST_WORDS
    assert found[0] == "walnut"  # the most frequent


def test_other_vocabularies_are_left_as_they_are(tmp_path: Path) -> None:
    source = open_source(str(write_records(tmp_path / "words.jsonl", *WALNUTS)))
    pairs = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate("walnuts")}, []))
    pairs.add_special_tokens(["<|im_end|>"])
    assert not has_closed_vocabulary(Tokenizer(pairs))
    assert find_new_words([source], Tokenizer(pairs)) == []
    with pytest.raises(ValueError, match=r"new_words .walnut.*small closed vocabulary"):
        model, processor = small_model(), small_processor()
        processor.tokenizer = Tokenizer(pairs)
        add_new_words(model, processor, ["walnut"])


# ---- their tokens ----


def test_a_word_becomes_one_token_and_nothing_else_changes() -> None:
    old, processor = small_model(), small_processor()
    model, new = add_new_words(small_model(), processor, ["walnut", "Dog"])
    tokenizer = new.tokenizer
    spelled = ["How", " many ", "walnut", "s", " are", " there", "?"]
    assert pieces(tokenizer, QUESTION) == spelled
    assert pieces(tokenizer, 'label">walnut</points>')[-2:] == ["walnut", "</points>"]
    assert tokenizer.encode_text("walnut") == (711,)  # the first reserved one
    assert tokenizer.decode([711, 712]) == "walnutDog"
    assert tokenizer.vocab_size == processor.tokenizer.vocab_size
    assert model.config == old.config
    gone = {"<|reserved_0|>", "<|reserved_1|>"}
    before = processor.tokenizer.special_ids
    assert tokenizer.special_ids == {k: v for k, v in before.items() if k not in gone}
    for text in ("How many dogs are there?", "<|im_end|>", "<|reserved_0|>", "\n\tß 12"):
        assert tokenizer.encode_text(text) == processor.tokenizer.encode_text(text)
        assert tokenizer.decode(tokenizer.encode_text(text)) == text
    ours, theirs = model.llm.embed_tokens.weight, old.llm.embed_tokens.weight
    same = [i for i in range(len(ours)) if i not in (711, 712)]
    assert torch.equal(ours[same], theirs[same])


def test_rows_start_like_those_of_the_same_word_or_at_random() -> None:
    processor = small_processor()
    model, new = add_new_words(small_model(), processor, ["Dog", "walnut", "many"], seed=4)
    table, ids = model.llm.embed_tokens.weight, processor.tokenizer.backend.token_to_id
    row = {word: table[new.tokenizer.encode_text(word)[0]] for word in ("Dog", "walnut", "many")}
    assert torch.equal(row["Dog"], table[ids("dog")])
    assert torch.equal(row["many"], table[ids(" many ")])
    again, _ = add_new_words(small_model(), processor, ["Dog", "walnut", "many"], seed=4)
    other, _ = add_new_words(small_model(), processor, ["Dog", "walnut", "many"], seed=5)
    place = new.tokenizer.encode_text("walnut")[0]
    assert torch.equal(row["walnut"], again.llm.embed_tokens.weight[place])
    assert not torch.equal(row["walnut"], other.llm.embed_tokens.weight[place])
    words = [i for p, i in processor.tokenizer.backend.get_vocab().items() if p.strip().isalpha()]
    lengths = (
        small_model().llm.embed_tokens.weight[[i for i in words if len(words) > 1]].norm(dim=1)
    )
    assert lengths.min() <= row["walnut"].norm() <= lengths.max()


@pytest.mark.parametrize("tied", [True, False])
def test_with_more_words_than_reserved_tokens_the_table_grows(tied: bool) -> None:
    processor = small_processor()
    config = small_config(processor)
    config = dataclasses.replace(
        config, llm_config=dataclasses.replace(config.llm_config, tie_word_embeddings=tied)
    )
    torch.manual_seed(0)
    old = NanoMolmo2(config).eval()
    state = {name: tensor.clone() for name, tensor in old.state_dict().items()}
    model, new = add_new_words(old, processor, MANY)
    more = len(MANY) - RESERVED
    base = config.llm_config.vocab_size
    assert model.config.llm_config.vocab_size == base + more
    check_agreement(model.config, new)
    assert new.image_token_id == model.config.image_token_id == config.image_token_id + more
    assert new.stop_token_ids == model.config.eos_token_ids == config.eos_token_ids
    assert new.pad_token_id == model.config.pad_token_id == config.pad_token_id
    for word in MANY:
        assert len(new.tokenizer.encode_text(word)) == 1
    vocabulary = new.tokenizer.backend.get_vocab()
    assert sorted(vocabulary.values()) == list(range(base + more + 16))
    for name, id in processor.tokenizer.special_ids.items():
        if "reserved" not in name:
            assert new.tokenizer.special_ids[name] == id + more * (id >= base)
            ours = model.llm.embed_tokens.weight[new.tokenizer.special_ids[name]]
            assert torch.equal(ours, state["llm.embed_tokens.weight"][id])
    before = NanoMolmo2(config).eval()
    before.load_state_dict(state)
    ids = torch.tensor([new.tokenizer.encode_text("How many dogs are there?")])
    with torch.no_grad():
        theirs, ours = before(ids)[..., :711], model.eval()(ids)[..., :711]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_words_can_be_added_again_and_known_ones_are_left() -> None:
    model, processor = add_new_words(small_model(), small_processor(), MANY[:30])
    row = model.llm.embed_tokens.weight[processor.tokenizer.encode_text(MANY[3])[0]].clone()
    again, more = add_new_words(model, processor, [MANY[3], "walnut"])
    assert more.tokenizer.vocab_size == processor.tokenizer.vocab_size + 1
    assert torch.equal(again.llm.embed_tokens.weight[more.tokenizer.encode_text(MANY[3])[0]], row)
    assert pieces(more.tokenizer, QUESTION)[2:4] == ["walnut", "s"]
    assert add_new_words(again, more, ["walnut"]) == (again, more)


def test_a_model_with_new_words_is_saved_quantised_and_exported(tmp_path: Path) -> None:
    model, processor = add_new_words(small_model(), small_processor(), MANY)
    ids = torch.tensor([processor.tokenizer.encode_text(f"How many {MANY[-1]} are there?")])

    def logits(one: NanoMolmo2) -> torch.Tensor:
        with torch.no_grad():
            return one.eval()(ids)

    expected = logits(model)
    model.save_pretrained(tmp_path / "plain", processor=processor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_molmo2(model, tmp_path / "exported", processor)
    for name in ("plain", "exported"):
        found, its = load(str(tmp_path / name))
        assert its.tokenizer.encode_text(MANY[-1]) == processor.tokenizer.encode_text(MANY[-1])
        torch.testing.assert_close(logits(found), expected, rtol=1e-5, atol=1e-5)
    model.quantize("int8")
    model.save_pretrained(tmp_path / "int8", processor=processor)
    torch.testing.assert_close(logits(load(str(tmp_path / "int8"))[0]), logits(model))


# ---- in a run ----


def recipe_of(tmp_path: Path, *records: dict, **changes: object) -> Recipe:
    """A run of a small model on own data whose new words are looked for."""
    folder = tmp_path / "start"
    if not folder.exists():
        small_model().save_pretrained(folder, processor=small_processor())
    parts = ("connector", "llm", "embeddings")
    fields: dict = {
        "model": str(folder),
        "architecture": None,
        "data": (open_source_config(str(write_records(tmp_path / "my.jsonl", *records))),),
        "steps": 2,
        "train": parts,
        "optimisers": dict.fromkeys(parts, adamw(1e-2, 0)),
        "new_words": None,
    }
    return toy(smoke(), **{**fields, **changes})


def open_source_config(path: str):
    from nanomolmo2.data.sources import SourceConfig

    return SourceConfig(path)


def test_a_run_writes_down_its_new_words_and_they_learn(tmp_path: Path, capsys) -> None:
    recipe = recipe_of(tmp_path, *WALNUTS)
    assert train_recipe(recipe, tmp_path / "run", workers=0)
    assert "2 new words: walnut, hazelnuts; each becomes a token" in capsys.readouterr().err
    assert Recipe.load(tmp_path / "run" / "recipe.json").new_words == ("walnut", "hazelnuts")
    model, processor = load(str(tmp_path / "run" / "model"))
    place = processor.tokenizer.encode_text("walnut")[0]
    start, _ = build(dataclasses.replace(recipe, new_words=("walnut", "hazelnuts")))
    moved = (model.llm.embed_tokens.weight - start.llm.embed_tokens.weight)[place].abs().max()
    assert moved > 1e-3

    again = dataclasses.replace(recipe, model=str(tmp_path / "run" / "model"))
    assert train_recipe(again, tmp_path / "again", workers=0)
    assert Recipe.load(tmp_path / "again" / "recipe.json").new_words == ()  # all are known
    assert "new word" not in capsys.readouterr().err


def test_new_words_learn_beside_lora(tmp_path: Path) -> None:
    parts = ("connector", "lora", "embeddings")
    recipe = recipe_of(
        tmp_path,
        *WALNUTS,
        train=parts,
        optimisers=dict.fromkeys(parts, adamw(1e-2, 0)),
        lora=LoraConfig(),
    )
    assert train_recipe(recipe, tmp_path / "run", workers=0, quiet=True)
    model, processor = load(str(tmp_path / "run" / "model"))
    start, _ = build(dataclasses.replace(recipe, new_words=("walnut", "hazelnuts")))
    place = processor.tokenizer.encode_text("walnut")[0]
    moved = (model.llm.embed_tokens.weight - start.llm.embed_tokens.weight)[place].abs().max()
    assert moved > 1e-3


def test_where_embeddings_do_not_learn_words_stay_spelled(tmp_path: Path, capsys) -> None:
    parts = ("connector", "llm")
    recipe = recipe_of(
        tmp_path, *WALNUTS, train=parts, optimisers=dict.fromkeys(parts, adamw(1e-2, 0))
    )
    assert train_recipe(recipe, tmp_path / "run", workers=0)
    assert "walnut, hazelnuts are no tokens" in " ".join(capsys.readouterr().err.split())
    _, processor = load(str(tmp_path / "run" / "model"))
    assert pieces(processor.tokenizer, "walnut") == list("walnut")


def test_a_run_that_is_resumed_keeps_the_words_it_began_with(tmp_path: Path) -> None:
    """It goes on as one that was never stopped, and its recipe.json says them."""
    # Rounding differs from call to call where several threads add up. AdamW turns the last bits of
    # a gradient near zero into a step of up to the rate, so the rate is small here.
    parts = ("connector", "llm", "embeddings")
    recipe = recipe_of(tmp_path, *WALNUTS, steps=4, optimisers=dict.fromkeys(parts, adamw(1e-3, 0)))
    assert train_recipe(recipe, tmp_path / "whole", workers=0, quiet=True)
    assert not train_recipe(recipe, tmp_path / "run", workers=0, quiet=True, stop_after=2)
    stored = Recipe.load(tmp_path / "run" / "recipe.json")
    assert stored.new_words == ("walnut", "hazelnuts")
    assert stored.differences(recipe) == []
    other = dataclasses.replace(stored, new_words=("walnut",))
    assert stored.differences(other) == ["new_words"]
    assert train_recipe(recipe, tmp_path / "run", workers=0, quiet=True, resume=True)
    ours, theirs = (load(str(tmp_path / n / "model"))[0].state_dict() for n in ("run", "whole"))
    table = build(stored)[0].llm.embed_tokens.weight
    assert (theirs["llm.embed_tokens.weight"] - table).abs().max() > 1e-3
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("word", ["<|im_end|>", "two words", "x", "a" * 33, ""])
def test_only_words_are_new_words(word: str) -> None:
    with pytest.raises(ValueError, match="new_words has"):
        dataclasses.replace(smoke(), new_words=(word,))


def test_processors_with_new_words_are_read_back(tmp_path: Path) -> None:
    _, processor = add_new_words(small_model(), small_processor(), ["walnut"])
    processor.save(tmp_path)
    again = Processor.load(tmp_path)
    assert again.tokenizer.special_ids == processor.tokenizer.special_ids
    assert pieces(again.tokenizer, QUESTION)[2] == "walnut"


# ---- a vocabulary that spells in pairs of letters, of a model that selects points and finds ----


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("How many walnuts are there?", ["walnuts"]),
        ("Point to the hex nuts.", ["hex", "nuts"]),
        ("Is there an ox or a penny?", ["ox", "penny"]),
        ("How many dogs are there? Point to everything like it.", []),
        (
            "Where are the \u0444\u0438\u0448\u043a\u0430 and the Walnu\u00df?",
            ["\u0444\u0438\u0448\u043a\u0430", "Walnu\u00df"],
        ),
    ],
)
def test_words_in_pairs_of_letters_are_spelled_too(text: str, spelled: list[str]) -> None:
    """They were taken for words that the model has, and never became tokens."""
    assert list(spelled_words(text, find_processor().tokenizer)) == spelled


def test_a_model_that_finds_takes_any_number_of_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, processor = NanoMolmo2(CONFIG), find_processor()
    words = [f"{a}{b}ute" for a in "bdfghkl" for b in "aeiouyr"]  # more than are reserved
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (192, 192, 3), np.uint8))
    content = [{"type": "text", "text": "Like"}, {"type": "point", "x": 40.0, "y": 60.0}]

    scores: list[np.ndarray] = []
    things_of = finding.things_of
    monkeypatch.setattr(
        finding, "things_of", lambda given, *rest: scores.append(given) or things_of(given, *rest)
    )

    def found(vlm: Pipeline) -> list[np.ndarray]:
        """What is said of each patch with words, and without."""
        scores.clear()
        encoded = vlm.processor.encode([{"role": "user", "content": content}], [image])
        points = finding.finding_request(vlm.model, encoded).points
        assert points is not None and points.find is not None
        points.find([], [])
        assert vlm.find(image, [(40.0, 60.0)], min_confidence=0).count
        return list(scores)

    before = found(Pipeline(model, processor))
    grown, more = add_new_words(model, processor, words)
    added = grown.config.llm_config.vocab_size - CONFIG.llm_config.vocab_size
    assert 0 < added < len(words)
    ids = [more.tokenizer.encode_text(word) for word in words]
    assert all(len(one) == 1 for one in ids) and len(set(ids)) == len(words)
    rule, old = grown.config.point_config, CONFIG.point_config
    assert rule is not None and old is not None
    assert rule.marker_ids == tuple(id + added for id in old.marker_ids)
    assert grown.config.finder_dim == CONFIG.finder_dim == 64
    grown.save_pretrained(tmp_path / "model", processor=more)
    again = Pipeline(tmp_path / "model", device="cpu")
    after = found(again)
    assert len(before) == len(after) == 1 + 2 * finding.LOOKS  # random weights see many things
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    assert again.ask(image, f"Point to the {words[-1]}.", max_new_tokens=4).input_tokens > 0
