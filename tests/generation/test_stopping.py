"""Stop texts against a search in the whole answer, however it is cut."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomolmo2.generation.pipeline import TextStream
from nanomolmo2.generation.stopping import StopText

TEXT = st.text("ab<é", max_size=30)
STOPS = st.lists(st.text("ab<é", min_size=1, max_size=4), max_size=3)


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """(answer, the stop text): letter by letter, is one complete?"""
    for end in range(len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            stop = max(done, key=len)
            return text[: end - len(stop)], stop
    return text, None


def pass_on(pieces: list[str], stops: list[str]) -> tuple[list[str], str | None]:
    stop = StopText(stops)
    passed = []
    for piece in pieces:
        passed.append(stop.put(piece))
        if stop.found is not None:
            break
    return [*passed, stop.end()], stop.found


@given(TEXT, STOPS, st.lists(st.integers(0, 30), max_size=8))
@settings(max_examples=500, deadline=None)
def test_where_the_pieces_are_cut_does_not_matter(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    places = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    answer, found = cut(text, stops)
    for split in (pieces, list(text), [text]):
        passed, stopped = pass_on(split, stops)
        assert ("".join(passed), stopped) == (answer, found)


@given(TEXT, STOPS)
@settings(max_examples=300, deadline=None)
def test_only_what_may_become_a_stop_text_is_held_back(text: str, stops: list[str]) -> None:
    stop = StopText(stops)
    passed = ""
    for at, letter in enumerate(text, start=1):
        passed += stop.put(letter)
        if stop.found is not None:
            break
        held = text[len(passed) : at]
        assert text[:at] == passed + held
        assert not held or any(s.startswith(held) and s != held for s in stops)
        for length in range(len(held) + 1, at + 1):  # and everything that may
            assert not any(s.startswith(text[at - length : at]) for s in stops)


def test_by_hand() -> None:
    assert pass_on(["I see a d", "og.\nUs", "er", ": more"], ["\nUser:"]) == (
        ["I see a d", "og.", "", "", ""],
        "\nUser:",
    )
    assert pass_on(["og.\nUs", "ual"], ["\nUser:"]) == (["og.", "\nUsual", ""], None)
    assert pass_on(["og.\nUs"], ["\nUser:"]) == (["og.", "\nUs"], None)
    assert pass_on(["aab"], ["ab", "b"]) == (["a", ""], "ab")
    assert pass_on(["abcd"], ["abcd", "b"]) == (["a", ""], "b")  # it is complete first
    assert pass_on(["", "x"], []) == (["", "x", ""], None)
    assert pass_on(["aaab"], ["aab"]) == (["a", ""], "aab")
    assert StopText("ab").put("xaby") == "x"
    stop = StopText("ab")
    assert [stop.put("ab"), stop.put("more"), stop.end()] == ["", "", ""]
    with pytest.raises(ValueError, match="a stop text is empty"):
        StopText(["a", ""])


@pytest.mark.parametrize("stop", ["é", "né", "</b>", "e\n\n"])
def test_behind_a_stream_of_tokens_that_split_characters(stop: str) -> None:
    """Each byte a token: half a character must neither pass nor stop."""
    text = "naïve café née <b>ne\n\n</b> end"

    def decode(ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    watch, passed = StopText(stop), ""

    def on_text(piece: str) -> None:
        nonlocal passed
        passed += watch.put(piece)

    processor = SimpleNamespace(decode=decode, config=SimpleNamespace(points=None))
    stream = TextStream(cast(Any, processor), on_text)
    for byte in text.encode():
        stream.put(byte)
        if watch.found is not None:
            break
    assert (passed, watch.found) == cut(text, [stop])
