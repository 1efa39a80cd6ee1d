"""Label files of others, read with care: JSON of any size, and what is in it taken for nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nanomolmo2.files import open_regular, read_regular

MOST_TEXT = 2**31  # bytes of a label file; as Python objects they take several times as much


def read_text(path: Path) -> str:
    """A text in UTF-8. Raises: OSError; ValueError for anything else."""
    try:
        return read_regular(path, MOST_TEXT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}): save it as UTF-8") from None


def read_json(path: Path) -> object:
    """Raises: OSError; ValueError, which names the file, for what is no JSON."""
    with open_regular(path) as stream:
        try:
            return json.load(stream)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid JSON ({error}): export it again") from None


def objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """The objects of a list; of anything else none."""
    for item in value if isinstance(value, list) else ():
        if isinstance(item, Mapping):
            yield item


def side(value: Any) -> int | None:
    """A width or height in pixels; None if it is not given, or none."""
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 < value < 2**31 else None


def size(values: Mapping[str, Any], width: str, height: str) -> tuple[int, int] | None:
    """(width, height) if both fields have one."""
    found = side(values.get(width)), side(values.get(height))
    return None if found[0] is None or found[1] is None else (found[0], found[1])
