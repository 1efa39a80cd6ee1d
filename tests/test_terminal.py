"""Nothing that a stranger wrote can drive the terminal."""

from __future__ import annotations

import pytest

from nanomolmo2.terminal import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jgone", r"\x1b[2Jgone"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b31mred", r"\x9b31mred"),
        ("over\rwritten\x08", r"over\rwritten\x08"),
        ("gpj\u202e.exe", r"gpj\u202e.exe"),
        ("half \ud800", r"half \ud800"),
        ("two\nlines\tand a tab, Grün, 東京, \U0001f40c", None),
    ],
)
def test_codes_are_shown_and_text_stays(text: str, shown: str | None) -> None:
    assert visible(text) == (text if shown is None else shown)
