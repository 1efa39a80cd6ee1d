"""Rename the tensors of a checkpoint by a table, in both directions, and strictly."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Protocol, TypeVar

from torch import Tensor

from nanomolmo2.convert.tables import Rows, RowTable, Table
from nanomolmo2.convert.tensor_files import PatchTensor, Readable, StackedTensor, StoredTensor


class Shaped(Protocol):
    """A tensor, or one still in its file."""

    @property
    def shape(self) -> Sequence[int]: ...


T = TypeVar("T")
S = TypeVar("S", bound=Shaped)

_LISTED = 8  # names that an error spells out before it only counts
_LETTERS = 300  # of all of them
_ALL_LETTERS = 370  # with which none is left out


def from_reference(
    tensors: Mapping[str, S],
    table: Table,
    *,
    expected: Mapping[str, Shaped] | None = None,
    prefix: str = "",
    source: str = "the checkpoint",
) -> dict[str, S]:
    """Give the tensors of a reference checkpoint our names.

    Args:
        tensors: by reference name; values are passed on as they are.
        table: reference name -> our name, None = dropped.
        expected: our names and shapes, such as ``model.state_dict()`` on the meta device; without
            it only names that the table does not know are found.
        prefix: start of the reference names that a file may leave out.
        source: what to call the checkpoint in an error.
    Raises: ValueError listing every missing, unused and misshapen tensor.
    """
    renamed: dict[str, S] = {}
    reference_names: dict[str, str] = {}
    unused: list[str] = []
    for name, tensor in tensors.items():
        pattern, index = _split_index(name)
        if pattern not in table:
            pattern = prefix + pattern
        if pattern not in table:
            unused.append(name)
            continue
        ours = table[pattern]
        if ours is None:
            continue
        ours = ours.format(index)
        if ours in renamed or (expected is not None and ours not in expected):
            unused.append(name)
            continue
        renamed[ours], reference_names[ours] = tensor, name
    if expected is None:
        expected = renamed
    back = _inverse(table)
    check_keys(
        missing=[_rename(name, back) for name in expected if name not in renamed],
        unused=unused,
        misshapen={
            reference_names[name]: (tuple(tensor.shape), tuple(expected[name].shape))
            for name, tensor in renamed.items()
            if tuple(tensor.shape) != tuple(expected[name].shape)
        },
        source=source,
    )
    return renamed


def to_reference(tensors: Mapping[str, T], table: Table) -> dict[str, T]:
    """Give our tensors the names of the reference checkpoint: the inverse of ``from_reference``.

    Raises: ValueError listing the names that the reference format has no place for.
    """
    back = _inverse(table)
    unused = [name for name in tensors if _split_index(name)[0] not in back]
    check_keys(missing=[], unused=unused, misshapen={}, source="the model")
    return {_rename(name, back): tensor for name, tensor in tensors.items()}


def from_rows(
    tensors: Mapping[str, StoredTensor],
    table: RowTable,
    *,
    expected: Mapping[str, Shaped],
    heights: Mapping[str, int] | None = None,
    source: str = "the checkpoint",
) -> dict[str, Readable]:
    """Our tensors out of a file that keeps some of them stacked or in pieces; nothing is read.

    Args:
        tensors: by their name.
        expected: our names and shapes, such as ``model.state_dict()`` on the meta device.
        heights: rows of those that are pieces of one of ours, by their name.
        source: what to call the checkpoint in an error.
    Raises: ValueError listing every missing, unused and misshapen tensor by its name in the file.
    """
    found: dict[str, Readable] = {}
    missing: list[str] = []
    used: set[str] = set()
    misshapen: dict[str, tuple[Sequence[int], Sequence[int]]] = {}
    for rule, index in _rules_of(expected, table):
        theirs = [name.format(index) for name in rule.theirs]
        ours = [name.format(index) for name in rule.ours]
        used.update(theirs)
        missing += [name for name in theirs if name not in tensors]
        if not tensors.keys() >= set(theirs):
            continue
        shapes = [tuple(expected[name].shape) for name in ours]
        rest = (math.prod(shapes[0][1:]),) if rule.patches else shapes[0][1:]
        total = sum(shape[0] for shape in shapes)
        wrong = {}
        for name in theirs:
            shape = (total if len(theirs) == 1 else (heights or {})[name], *rest)
            if tensors[name].shape != shape:
                wrong[name] = (tensors[name].shape, shape)
        misshapen |= wrong
        if wrong:
            continue
        if rule.patches:
            found[ours[0]] = PatchTensor(tensors[theirs[0]], shapes[0])
            continue
        top = 0
        for name, shape in zip(ours, shapes, strict=True):
            found[name] = _cut([tensors[n] for n in theirs], top, top + shape[0])
            top += shape[0]
    unused = [name for name in tensors if name not in used]
    check_keys(missing=missing, unused=unused, misshapen=misshapen, source=source)
    return found


def to_rows(
    tensors: Mapping[str, Tensor], table: RowTable, *, heights: Mapping[str, int] | None = None
) -> dict[str, tuple[Tensor, ...]]:
    """The inverse of :func:`from_rows`.

    Returns: by their name the views that lie on top of each other in it.
    Raises: ValueError listing the names that the format has no place for.
    """
    unknown = [n for n in tensors if not any(_split_index(n)[0] in rule.ours for rule in table)]
    check_keys(missing=[], unused=unknown, misshapen={}, source="the model")
    stacked: dict[str, tuple[Tensor, ...]] = {}
    for rule, index in _rules_of(tensors, table):
        parts = tuple(tensors[name.format(index)] for name in rule.ours)
        if rule.patches:
            parts = tuple(part.permute(0, 2, 3, 1).flatten(1) for part in parts)
        theirs = [name.format(index) for name in rule.theirs]
        if len(theirs) == 1:
            stacked[theirs[0]] = parts
        else:
            pieces = parts[0].split([(heights or {})[name] for name in theirs])
            stacked |= {name: (piece,) for name, piece in zip(theirs, pieces, strict=True)}
    return stacked


def _rules_of(names: Iterable[str], table: RowTable) -> list[tuple[Rows, str]]:
    """The rules that names of ours fall under, with their index, each once and in order."""
    homes = {ours: rule for rule in table for ours in rule.ours}
    found: dict[tuple[Rows, str], None] = {}
    for name in names:
        pattern, index = _split_index(name)
        if pattern in homes:
            found[homes[pattern], index] = None
    return list(found)


def _cut(stack: Sequence[StoredTensor], start: int, stop: int) -> Readable:
    """Rows ``start`` to ``stop`` of tensors that lie on top of each other."""
    parts, top = [], 0
    for tensor in stack:
        first, last = max(start - top, 0), min(stop - top, tensor.shape[0])
        if first < last:
            parts.append(tensor.rows(first, last))
        top += tensor.shape[0]
    return parts[0] if len(parts) == 1 else StackedTensor(tuple(parts))


def check_keys(
    *,
    missing: Sequence[str],
    unused: Sequence[str],
    misshapen: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    source: str,
) -> None:
    """Raise one ValueError for all that is wrong between a checkpoint and a model, or return.

    ``misshapen`` maps a name to the shapes found and expected.
    """
    shapes = [f"{n} is {list(f)}, expected {list(e)}" for n, (f, e) in misshapen.items()]
    lists = {"missing": missing, "not known": unused, "of another shape": shapes}
    found = {what: names for what, names in lists.items() if names}
    total = sum(len(name) + len("; ") for names in found.values() for name in names)
    letters = _ALL_LETTERS if total <= _ALL_LETTERS else _LETTERS // max(1, len(found))
    parts = [f"{len(names)} {what}: {_some(names, letters)}" for what, names in found.items()]
    if parts:
        raise ValueError(
            f"the tensors of {source} do not fit the model ({'. '.join(parts)}): do they belong to "
            f"this config.json?"
        )


def _some(names: Sequence[str], letters: int) -> str:
    """The first names, at most ``letters`` together, and how many more there are."""
    names = [name if len(name) <= 110 else f"{name[:107]}..." for name in names]
    separator = "; " if any("," in name for name in names) else ", "
    ends = accumulate(len(name) + len(separator) for name in names)
    count = min(_LISTED, max(1, sum(end <= letters for end in ends)))
    rest = [f"and {len(names) - count} more"] if len(names) > count else []
    return separator.join(names[:count] + rest)


def _split_index(name: str) -> tuple[str, str]:
    """``layers.3.norm`` -> (``layers.{}.norm``, ``3``); a name without an index keeps its form."""
    match = re.search(r"(?<=\.)\d+(?=\.)", name)
    if match is None:
        return name, ""
    return f"{name[: match.start()]}{{}}{name[match.end() :]}", match.group()


def _rename(name: str, names: Mapping[str, str]) -> str:
    pattern, index = _split_index(name)
    return names.get(pattern, pattern).format(index)


def _inverse(table: Table) -> dict[str, str]:
    return {ours: reference for reference, ours in table.items() if ours is not None}
