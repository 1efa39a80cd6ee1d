"""Sources: data sets of any format as `Example`s by number.

    SourceConfig -> open_source -> source[i]     records.py   file -> record i
                                                 layouts.py   record -> Example

Nothing is decoded before it is asked for, and sources can be pickled for worker processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np

from nanomolmo2.config import Config
from nanomolmo2.data.emoji.source import EmojiConfig, EmojiScenes
from nanomolmo2.data.example import BadExample, Example
from nanomolmo2.data.layouts import LAYOUTS, Prompts, Record, address_key, layout_of
from nanomolmo2.data.mixture import Mixture
from nanomolmo2.data.records import Rows, open_rows

__all__ = ["BadExample", "Source", "SourceConfig", "address_key", "open_mixture", "open_source"]

EMOJI = "emoji"
Format = Literal[
    "auto", "own", "llava", "cauldron", "pixmo_cap", "pixmo_points", "cosyn_point", "emoji"
]


class Source(Protocol):
    """Examples by number; the same number is always the same example."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Example:
        """Raises: `BadExample` where there is nothing to learn from; IndexError past the end."""
        ...


@dataclass(frozen=True)
class SourceConfig(Config):
    """Where examples come from, and how often.

    Attributes:
        path: a file (.jsonl, .json, .parquet, .tar), a folder or a pattern of them, ``hub:`` and
            the name of a data set on the Hugging Face hub, or ``emoji``.
        format: layout of the records; ``auto`` tells it from their fields. See docs/data.md.
        rate: share of the examples drawn, 0 to 1; None shares what the given rates leave by the
            square root of the sizes.
        name: for reports; taken from the path where it is empty.
        pictures: folder of the pictures; empty: paths are relative to the file of records.
        prompts: how a data set without questions asks: ``natural`` sentences, or ``styles``, the
            bare style names of Molmo2's first stage (``long_caption 42:``, ``pointing: dogs``).
        separate_turns: the questions of a conversation do not build on each other: each becomes a
            branch of its own.
        subset, split: which part of a data set on the hub.
        seed: of what is drawn within an example: scenes, wordings.
        emoji: which scenes, for the path ``emoji``.
    """

    path: str
    format: Format = "auto"
    rate: float | None = None
    name: str = ""
    pictures: str = ""
    prompts: Prompts = "natural"
    separate_turns: bool = False
    subset: str = ""
    split: str = "train"
    seed: int = 0
    emoji: EmojiConfig = field(default_factory=EmojiConfig)

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty: give a file, a folder, hub:NAME or emoji")
        for name, kind in (("format", Format), ("prompts", Prompts)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of "
                    f"{', '.join(get_args(kind))}"
                )
        if self.rate is not None and not 0 <= self.rate <= 1:
            raise ValueError(f"rate is {self.rate}, expected a share from 0 to 1, or None")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, expected 0 or more")

    @property
    def is_emoji(self) -> bool:
        return self.format == EMOJI or (self.format == "auto" and self.path == EMOJI)


class RecordSource:
    """Records of files or of the hub, read by a layout."""

    def __init__(self, rows: Rows, config: SourceConfig) -> None:
        self.rows, self.config = rows, config
        self.name = config.name or Path(config.path.removeprefix("hub:")).stem
        self.in_order = getattr(rows, "in_order", False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name} has no example {i}, only {len(self)}")
        config, (values, where, folder) = self.config, self.rows[i]
        layout = layout_of(values) if config.format == "auto" else config.format
        record = Record(
            values,
            where,
            Path(config.pictures).expanduser() if config.pictures else folder,
            np.random.default_rng([config.seed, i]),
            config.prompts,
            config.separate_turns,
        )
        return LAYOUTS[layout](record)


def open_source(spec: str | Path | SourceConfig) -> Source:
    """Open a source by its path or config.

    Raises: FileNotFoundError; ValueError for a file that is of no known kind, broken as a whole or
        empty; ImportError naming the extra that reading it needs. What is wrong with one record
        shows when that is asked for.
    """
    config = spec if isinstance(spec, SourceConfig) else SourceConfig(str(spec))
    if config.is_emoji:
        return EmojiScenes(config.emoji, config.seed, config.name or EMOJI)
    source = RecordSource(open_rows(config.path, config.subset, config.split), config)
    if not len(source):
        raise ValueError(f"{config.path} holds no records: was it written to the end?")
    return source


def open_mixture(configs: Sequence[SourceConfig], seed: int = 0) -> Mixture:
    """Open sources and mix them at their rates."""
    return Mixture([open_source(c) for c in configs], [c.rate for c in configs], seed)
