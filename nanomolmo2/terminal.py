"""Text from strangers, for a terminal."""

from __future__ import annotations

import re

# C0 codes but line feed and tab, DEL, C1 codes; what turns the direction of text; half pairs.
_CODES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Replace what a terminal would obey or could not print by its escape, such as ``\\x1b``.

    Answers, file names and notes of data come from others: a code in them could set the title of
    the window, fill the clipboard or hide a line.
    """
    return _CODES.sub(lambda code: code[0].encode("unicode_escape").decode("ascii"), text)
