"""Rename the tensors of a checkpoint by a table, in both directions, and strictly."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

from nanomolmo2.convert.tables import Table


class Shaped(Protocol):
    """A tensor, or one still in its file."""

    @property
    def shape(self) -> Sequence[int]: ...


T = TypeVar("T")
S = TypeVar("S", bound=Shaped)

_LISTED = 8  # names that an error spells out before it only counts


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
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing: {_some(missing)}")
    if unused:
        parts.append(f"{len(unused)} not known: {_some(unused)}")
    if misshapen:
        shapes = [f"{n} is {list(f)}, expected {list(e)}" for n, (f, e) in misshapen.items()]
        parts.append(f"{len(misshapen)} of another shape: {_some(shapes, separator='; ')}")
    if parts:
        raise ValueError(
            f"the tensors of {source} do not fit the model ({'. '.join(parts)}): "
            f"is config.json the one these weights were saved with?"
        )


def _some(names: Iterable[str], separator: str = ", ") -> str:
    names = list(names)
    rest = [f"and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
    return separator.join(names[:_LISTED] + rest)


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
