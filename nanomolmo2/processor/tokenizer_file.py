"""Reading a ``tokenizer.json``: a file of the tokenizers library, which trusts what it reads.

A small file can ask the library for gigabytes, and some files make it panic: Rust's word for an
error that nobody foresaw, which is no `Exception` in Python.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from nanomolmo2.files import read_regular

# Qwen3's has 11 MB and 300 added tokens, Gemma's 33 MB and 6,000 of them.
_LARGEST = 40_000_000  # bytes
_MOST_ADDED = 10_000  # tokens, which are searched for in every text
_MOST_ADDED_LETTERS = 400_000  # the search takes a hundred bytes a letter
_MOST_STEPS = 10_000  # values in all that is done before and after the vocabulary's part
_MOST_CLASSES = 1_000_000  # of points: 384 frames need 31,123
_MOST_GROWTH = 1_000  # times that a text may become longer before it is encoded
_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
# Beside the vocabulary, which takes half a second to parse, nothing else is expected: neither
# another section nor letters written as numbers, which could hide one.
_UNEXPECTED = (*(f'"{name}"'.encode() for name in ("added_tokens", *_STEPS)), b"\\u00")


def read_backend(path: str | Path) -> tokenizers.Tokenizer:
    """Read a ``tokenizer.json``, or the one in a folder.

    Raises: FileNotFoundError; ValueError naming the file if it is no tokenizer, or one that would
        take more memory than a tokenizer does.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(
            f"there is no tokenizer at {path}: expected a tokenizer.json of the tokenizers library"
        )
    content = read_regular(path, _LARGEST)
    try:
        values, rest = _without_vocabulary(content)
        first_class = _drop_classes(values) if b"<POINT_0>" in content else None
        if first_class is not None:
            head = json.dumps(values, ensure_ascii=False).encode()
            content = head[:-1] + b", " + rest if rest else head
        _check(values)
        backend = tokenizers.Tokenizer.from_buffer(content)
        if first_class is not None:
            _fill(backend, first_class)
        return backend
    except BaseException as error:
        if not (isinstance(error, Exception) or is_library_failure(error)):
            raise
        raise ValueError(
            f"{path} is not a tokenizer.json of the tokenizers library ({str(error)[:300]}): copy "
            f"the file again, or export it with the library's save()"
        ) from None


def is_library_failure(error: BaseException) -> bool:
    """Whether the library failed without saying at what: it has plain Exceptions and panics."""
    return type(error) is Exception or type(error).__module__ == "pyo3_runtime"


def _without_vocabulary(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The sections of the file, and what stands behind them: ``model`` where that is the last one,
    as it mostly is, else nothing.
    """
    head, model, tail = content.partition(b'"model"')
    try:
        values = json.loads(head.rstrip().removesuffix(b",") + b"}")
    except (ValueError, RecursionError):  # not the section, but a word in another one
        values = None
    rest = model + tail
    if values is None or any(part in tail for part in _UNEXPECTED):
        values, rest = json.loads(content), b""
    if not isinstance(values, dict):
        raise ValueError(f"it holds {type(values).__name__}, expected an object")
    return values, rest


def _drop_classes(values: dict[str, Any]) -> int | None:
    """Take the names of point classes, ``<POINT_0>``, ``<POINT_1>``, ..., out of the added tokens.

    MolmoPoint's tokenizer ends with 31,200 of them, so that it can write what a model selects. No
    model reads them: they stand behind the rows of the embedding, and a question that holds
    ``<POINT_3>`` must not become one. `Processor.decode` writes them by itself.

    Returns: V, the id of the first; None if there were none.
    """
    added = values.get("added_tokens")
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        return None
    names = [str(token.get("content")) for token in added]
    if "<POINT_0>" not in names:
        return None
    first = names.index("<POINT_0>")
    classes = added[first:]
    V = classes[0].get("id")
    if len(classes) > _MOST_CLASSES or [(t.get("content"), t.get("id")) for t in classes] != [
        (f"<POINT_{number}>", V + number) for number in range(len(classes))
    ]:
        raise ValueError("its tokens <POINT_0>, <POINT_1>, ... are not the last ones, in order")
    del added[first:]
    return int(V)


def _fill(backend: tokenizers.Tokenizer, first_class: int) -> None:
    """Let the tokens end where the classes begin: V is then one more than the largest id."""
    used = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if used > first_class:
        raise ValueError(
            f"its token <POINT_0> has the id {first_class}, but others go up to {used}"
        )
    fillers = [f"<|unused_{id}|>" for id in range(used, min(first_class, used + _MOST_ADDED))]
    backend.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in fillers])


def _check(values: dict[str, Any]) -> None:
    """Raises: ValueError for a file that says little and means a lot."""
    added = values.get("added_tokens")
    if isinstance(added, list):
        letters = sum(len(str(t.get("content"))) for t in added if isinstance(t, dict))
        if len(added) > _MOST_ADDED or letters > _MOST_ADDED_LETTERS:
            raise ValueError(
                f"{len(added):,} added tokens of {letters:,} letters, expected at most "
                f"{_MOST_ADDED:,} of {_MOST_ADDED_LETTERS:,}"
            )
    growth = 1
    for number, step in enumerate(_inside([values.get(name) for name in _STEPS])):
        if number > _MOST_STEPS:
            raise ValueError(f"more than {_MOST_STEPS:,} steps, expected a few")
        if not isinstance(step, dict):
            continue
        for name in ("content", "prepend", "replacement"):
            growth *= max(len(str(step.get(name, ""))), 1)
        if growth > _MOST_GROWTH:
            raise ValueError(f"its steps make a text {growth:,} times as long")
        table = step.get("precompiled_charsmap")
        if isinstance(table, str):
            start = base64.b64decode(table[:8])  # the size of a part of what follows
            if int.from_bytes(start[:4], "little") > len(table):
                raise ValueError("a table of letters that is larger than the file")


def _inside(value: Any) -> Iterator[Any]:
    """A JSON value and all in it."""
    todo = [value]
    while todo:
        found = todo.pop()
        yield found
        if isinstance(found, (dict, list)):
            todo += found.values() if isinstance(found, dict) else found
