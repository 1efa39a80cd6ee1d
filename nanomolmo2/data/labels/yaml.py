"""The few forms of YAML that the data.yaml of YOLO uses, for the keys that are asked for.

    key: value                              key:
    key: [a, 'b', "c"]                        - a          (also not indented)
    key: {0: a, 1: b}                       key:
                                              0: a

Values come as texts. What else stands under such a key is refused with its line, never guessed;
other keys, a script to download with for instance, are passed over.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

Value = str | list[str] | dict[str, str]

_QUOTED = r"""(?:'(?:[^']|'')*'|"[^"\\]*")"""
_PLAIN = r"""[^\s,'"\[\]{}][^,\[\]{}]*?"""
_PAIR = re.compile(rf"""({_QUOTED}|[^\s'":#\[\]{{}},][^:#]*?)\s*:(?:\s+(.*))?""")
_ITEM = re.compile(rf"""\s*((?:[^\s,'":\[\]{{}}]+\s*:\s+)?(?:{_QUOTED}|{_PLAIN}))\s*(?:,|$)""")
# Quotes are some at the beginning of a value only, and a comment begins after a space.
_COMMENT = re.compile(rf"""((?:(?<![^\s,\[{{:]){_QUOTED}|[^#]|(?<=\S)#)*?)(?:(?:^|\s)#.*)?""")


def parse_yaml(text: str, path: Path, keys: Collection[str]) -> dict[str, Value]:
    """The values of some keys of the outermost level.

    Raises: ValueError with the line of a value in another form.
    """
    values: dict[str, Value] = {}
    key: str | None = None
    for number, line in _lines(text):
        body = line.strip()
        pair = _PAIR.fullmatch(body)
        if not line[0].isspace() and not body.startswith("- "):
            key = None if pair is None else _plain(pair[1])
            if key in keys and pair is not None and key is not None:
                values[key] = _value(pair[2] or "", path, number)
        elif key in keys and key is not None:
            block = values[key]
            if body.startswith("- ") and (block == "" or isinstance(block, list)):
                values[key] = [*block, _scalar(body[2:], path, number)]
            elif pair is not None and (block == "" or isinstance(block, dict)):
                inner = block if isinstance(block, dict) else {}
                values[key] = inner | {_plain(pair[1]): _scalar(pair[2] or "", path, number)}
            else:
                raise _unknown(path, number, line)
    return values


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """(number, line) without comments and blank lines; a list over several lines as one."""
    held, start = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        found = _COMMENT.fullmatch(line)
        line = (found[1] if found else line).rstrip()
        if not line.strip() or line in ("---", "..."):
            continue
        if held or re.match(r"[^\s:]+:\s+[\[{]", line):
            held, start = (f"{held} {line.strip()}", start) if held else (line, number)
            if sum(map(held.count, "[{")) > sum(map(held.count, "]}")):
                continue
            yield start, held
            held = ""
        else:
            yield number, line
    if held:
        yield start, held


def _value(text: str, path: Path, number: int) -> Value:
    if text[:1] not in ("[", "{"):
        return _scalar(text, path, number) if text else ""
    inner, items, place = text[1:-1].strip(), [], 0
    if text[-1] != {"[": "]", "{": "}"}[text[0]]:
        raise _unknown(path, number, text)
    while place < len(inner):
        item = _ITEM.match(inner, place)
        if item is None:
            raise _unknown(path, number, text)
        items.append(item[1])
        place = item.end()
    if text[0] == "[":
        return [_plain(item) for item in items]
    pairs = [_PAIR.fullmatch(item) for item in items]
    if not all(pairs):
        raise _unknown(path, number, text)
    return {_plain(pair[1]): _plain(pair[2] or "") for pair in pairs if pair is not None}


def _scalar(text: str, path: Path, number: int) -> str:
    text = text.strip()
    if text[:1] in ("[", "{", "|", ">", "&", "*", "!", "%", "@", "`") or text.startswith("- "):
        raise _unknown(path, number, text)
    return _plain(text)


def _plain(text: str) -> str:
    """Without its quotes."""
    if text[:1] == "'" == text[-1:] and len(text) > 1:
        return text[1:-1].replace("''", "'")
    return text[1:-1] if text[:1] == '"' == text[-1:] and len(text) > 1 else text


def _unknown(path: Path, number: int, line: str) -> ValueError:
    return ValueError(
        f"{path}, line {number} ({line.strip()[:60]!r}) is YAML of a form that is not read here: "
        f"write 'names: [cat, dog]', or one '0: cat' a line below 'names:'"
    )
