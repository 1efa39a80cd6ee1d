"""Things known by a name: a table whose entries are imported when they are asked for.

A general package owns the table (`data/registry.py`, `recipes`, `evaluation/registry.py`); what
lies above it is entered as ``"module:name"``, so the table imports nothing and every process knows
the same names.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar, cast

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry], Generic[Entry]):
    """Names and what they stand for; iterating over it imports nothing."""

    def __init__(self, **entries: str | Entry) -> None:
        """
        Args:
            entries: the thing itself, or where it is: ``"package.module:name"``.
        """
        self._entries: dict[str, str | Entry] = dict(entries)

    def register(self, name: str, entry: str | Entry) -> None:
        """Add an entry, or replace one."""
        self._entries[name] = entry

    def __getitem__(self, name: str) -> Entry:
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = cast(Entry, getattr(importlib.import_module(module), attribute))
            self._entries[name] = entry
        return entry

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # Mapping's own would import

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
