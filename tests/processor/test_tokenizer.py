"""Tokenizer: lossless text, special tokens only where the chat format puts them."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomolmo2.emoji.vocabulary import build_tokenizer
from nanomolmo2.processor import Tokenizer
from nanomolmo2.processor.tokenizer import MOLMO2_TOKENS, molmo2_tokenizer
from tests.processor.helpers import SPECIAL, small_backend

SMALL = Tokenizer(small_backend())
TINY = Tokenizer(build_tokenizer())  # of the bundled model
hostile_text = st.lists(
    st.text(max_size=8) | st.sampled_from(SPECIAL) | st.sampled_from(["<|", "|>", "\n", "im_end"])
).map("".join)


@pytest.mark.parametrize("tokenizer", [SMALL, TINY], ids=["small", "tiny"])
@given(text=hostile_text)
@settings(deadline=None)
def test_text_never_holds_a_special_token_and_comes_back_whole(tokenizer, text):
    ids = tokenizer.encode_text(text)
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert tokenizer.decode(ids) == text


@given(hostile_text)
@settings(deadline=None, max_examples=50)
def test_control_strings_come_back_whole(text):
    assert SMALL.decode(SMALL.encode_control(text), skip_special_tokens=False) == text


def test_the_longest_special_token_wins():
    ids = SMALL.special_ids
    turn = "<|im_end|>\n<|im_start|>assistant\n"
    assert SMALL.encode_control(turn) == (ids[turn],)
    assert SMALL.encode_control("<|im_start|>user\n") == (ids["<|im_start|>user\n"],)
    newline = SMALL.encode_text("\n")
    assert SMALL.encode_control("<|im_end|>\n<|im_start|>") == (
        ids["<|im_end|>"],
        *newline,
        ids["<|im_start|>"],
    )


def test_tiny_takes_a_turn_as_one_token_and_a_noun_as_the_same_everywhere():
    for control in ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"):
        assert len(TINY.encode_control(control)) == 1
    (dog,) = TINY.encode_text("dog")
    for text in ("Point to the dogs.", '<points coords="1 1 100 100">dog</points>', "A dog."):
        assert dog in TINY.encode_text(text)


def test_decode_leaves_special_tokens_out_or_in(tokenizer):
    ids = tokenizer.encode_control("<|im_start|>yes<|im_end|>")
    assert tokenizer.decode(ids) == "yes"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>yes<|im_end|>"
    assert tokenizer.decode([]) == ""


def test_special_id_by_name(tokenizer):
    assert tokenizer.special_id("<|im_end|>") == tokenizer.special_ids["<|im_end|>"]
    with pytest.raises(ValueError, match=r"no special token '<im_pach>'; it has <\|endoftext\|>"):
        tokenizer.special_id("<im_pach>")


def test_vocab_size_counts_special_tokens(tokenizer):
    assert tokenizer.vocab_size == max(tokenizer.special_ids.values()) + 1
    assert tokenizer.vocab_size == tokenizer.backend.get_vocab_size()


def test_split_control():
    assert SMALL.split_control("<|vision_start|>user\n") == ("<|vision_start|>", "user\n")
    assert SMALL.split_control("<|im_start|>user\n") == ("<|im_start|>user\n", "")
    assert SMALL.split_control("plain") == ("", "plain")


def test_a_special_token_that_is_also_a_word_is_refused():
    """A user could write it: the added token would not be found, but the word would be."""
    backend = small_backend()
    backend.add_special_tokens(["yes"])
    with pytest.raises(ValueError, match="'yes' is also a piece of the vocabulary"):
        Tokenizer(backend)


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "tokenizer.json")
    for path in (tmp_path / "new", tmp_path / "new" / "tokenizer.json"):
        again = Tokenizer.from_file(path)
        assert again.special_ids == tokenizer.special_ids
        assert again.encode_text("<|im_end|> dogs") == tokenizer.encode_text("<|im_end|> dogs")
        assert again.encode_control("<|im_end|>\n") == tokenizer.encode_control("<|im_end|>\n")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["tokenizer.json"]


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        Tokenizer.from_file(tmp_path)
    for number, content in enumerate([b"", b"{", b"{}", b"\xff\xfe", b"[1, 2]"]):
        path = tmp_path / f"{number}.json"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is not a tokenizer\.json") as caught:
            Tokenizer.from_file(path)
        assert caught.value.__suppress_context__


def test_qwen3_ids(qwen3_tokenizer):
    """Ids of the released tokenizer, as transformers gives them too."""
    assert qwen3_tokenizer.vocab_size == 151669
    assert qwen3_tokenizer.special_id("<|image_pad|>") == 151655
    assert qwen3_tokenizer.encode_text("What is the capital of France?") == (
        *(3838, 374, 279, 6722, 315, 9625, 30),
    )
    assert qwen3_tokenizer.encode_control("<|im_start|>user\n") == (151644, 872, 198)


@given(text=hostile_text)
@settings(deadline=None, max_examples=60)
def test_qwen3_text_is_never_special(qwen3_tokenizer, text):
    ids = qwen3_tokenizer.encode_text(text)
    assert not set(ids) & set(qwen3_tokenizer.special_ids.values())


def test_qwen3_words_that_are_added_but_not_special_stay_words(qwen3_tokenizer):
    (think,) = qwen3_tokenizer.encode_text("<think>")
    assert think == 151667 and qwen3_tokenizer.decode([think]) == "<think>"


# ---- Molmo2's tokens behind a base vocabulary ----


def test_molmo2_tokens_behind_qwen3(released):
    tokenizer = released.tokenizer
    assert [tokenizer.special_id(name) for name in MOLMO2_TOKENS] == list(range(151936, 151946))
    assert tokenizer.special_id("|<EXTRA_TOKENS_0>|") == 151669
    assert tokenizer.special_id("|<EXTRA_TOKENS_266>|") == 151935
    assert "|<EXTRA_TOKENS_267>|" not in tokenizer.special_ids
    assert tokenizer.special_id("<|im_end|>") == 151645
    assert tokenizer.special_id("<|endoftext|>") == 151643
    assert tokenizer.vocab_size == 151946


@pytest.fixture
def base(tmp_path):
    small_backend(("<|endoftext|>", "<|im_start|>", "<|im_end|>")).save(
        str(tmp_path / "tokenizer.json")
    )
    return tmp_path


def test_molmo2_tokens_behind_a_small_vocabulary(base):
    used = Tokenizer.from_file(base).vocab_size
    for vocab_size in (used, used + 1, 512):
        tokenizer = molmo2_tokenizer(base, vocab_size=vocab_size)
        ids = [tokenizer.special_id(name) for name in MOLMO2_TOKENS]
        assert ids == list(range(vocab_size, vocab_size + 10))
        assert tokenizer.vocab_size == vocab_size + 10
        # Once extended it is taken as it is.
        tokenizer.save(base / "extended.json")
        for given_size in (None, vocab_size):
            again = molmo2_tokenizer(base / "extended.json", vocab_size=given_size)
            assert again.special_ids == tokenizer.special_ids
    with pytest.raises(ValueError, match=rf"has {used} tokens, more than vocab_size \(100\)"):
        molmo2_tokenizer(base, vocab_size=100)


def test_molmo2_tokens_at_other_ids(base, tmp_path):
    molmo2_tokenizer(base, vocab_size=512).save(tmp_path / "extended.json")
    with pytest.raises(ValueError, match=r"ids \[512, .* one after the other from 600 on"):
        molmo2_tokenizer(tmp_path / "extended.json", vocab_size=600)
    # SPECIAL has some of them, in another order.
    small_backend().save(str(tmp_path / "part.json"))
    with pytest.raises(ValueError, match="one after the other"):
        molmo2_tokenizer(tmp_path / "part.json")
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        molmo2_tokenizer(tmp_path / "none.json")


def test_text_that_is_no_unicode_is_refused() -> None:
    """JSON can hold half a surrogate pair; the library calls that a TypeError."""
    with pytest.raises(ValueError, match="expected a text of Unicode characters"):
        SMALL.encode_text("\ud800 dog")


# ---- files of strangers ----


def changed_file(path, **changes):
    values = json.loads(small_backend().to_str())
    path.write_text(json.dumps({**values, **changes}), encoding="utf-8")
    return path


def token(content, id=900):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": content, "special": True, **flags}


REPLACE = {"type": "Replace", "pattern": {"String": "<"}, "content": "<" * 1000}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Each of the first four makes the library panic.
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "Precompiled"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "must be non-zero"),
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
            "larger than",
        ),
        ({"model": {"type": "Unigram", "unk_id": None, "vocab": []}}, "unk_id"),
        ({"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 4}}, "1,000,000 times as"),
        ({"added_tokens": [token(f"<|{n}|>", n) for n in range(20_000)]}, "20,000 added tokens of"),
        ({"added_tokens": [token("x" * 10**6)]}, "1 added tokens of 1,000,000 letters"),
        ({"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}] * 10**5}}, "10,000 steps"),
        ({"model": 5}, "not a tokenizer.json"),
    ],
)
def test_a_file_that_breaks_the_library_is_named(changes, message, tmp_path):
    """A panic of Rust is no Exception in Python: it went through every net."""
    path = changed_file(tmp_path / "tokenizer.json", **changes)
    with pytest.raises(ValueError, match=rf"tokenizer\.json.*{message}") as caught:
        Tokenizer.from_file(path)
    assert len(str(caught.value).replace(str(path), "")) < 500


def test_a_section_behind_the_vocabulary_or_by_another_spelling_is_seen(tmp_path):
    values = json.loads(small_backend().to_str())
    path = tmp_path / "tokenizer.json"
    bad = {"type": "Sequence", "normalizers": [REPLACE] * 4}
    del values["normalizer"]
    path.write_text(json.dumps({**values, "normalizer": bad}))
    with pytest.raises(ValueError, match="times as long"):
        Tokenizer.from_file(path)
    path.write_text(json.dumps({**values, "normalizer": bad}).replace('"norm', '"\\u006eorm'))
    with pytest.raises(ValueError, match="times as long"):
        Tokenizer.from_file(path)


def test_a_panic_while_text_is_decoded(tmp_path):
    strip = {"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9}
    tokenizer = Tokenizer.from_file(changed_file(tmp_path / "tokenizer.json", decoder=strip))
    with pytest.raises(ValueError, match=r"the tokenizer fails .*index out of bounds"):
        tokenizer.decode(tokenizer.encode_text("aaa é"))


@pytest.mark.parametrize("kind", ["pipe", "device", "of the kernel", "too large"])
def test_only_regular_tokenizer_files_are_read(kind, tmp_path):
    path = tmp_path / "tokenizer.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "too large":
        with open(path, "wb") as stream:
            stream.truncate(40_000_001)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "/proc/self/status")
    for read in (Tokenizer.from_file, molmo2_tokenizer):
        with pytest.raises(ValueError, match=r"tokenizer\.json (is|has) .*expected"):
            read(path)


def test_the_error_of_a_special_token_is_one_line(tokenizer):
    with pytest.raises(ValueError, match="has no special token '<missing>'; it has <") as caught:
        tokenizer.special_id("<missing>")
    assert "\n" not in str(caught.value)


def test_no_text_is_encoded_that_no_model_could_read() -> None:
    """Ten million characters took 20 s and 3 GB."""
    assert len(TINY.encode_text("dog " * 1000)) > 999
    with pytest.raises(ValueError, match="10,000,000 characters, expected at most 1,048,576"):
        TINY.encode_text("dog, cats" + " " * 9_999_991)
