"""Sources: data sets of any format as `Example`s by number.

    SourceConfig -> open_source -> source[i]     records.py   file -> record i
                                                 layouts.py   record -> Example
                                                 registry.py  sources that are known by a name

Nothing is decoded before it is asked for, and sources can be pickled for worker processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

import numpy as np

from nanomolmo2.config import Config
from nanomolmo2.data.example import NOT_OF_A_RECORD, BadExample, Example, Source, named
from nanomolmo2.data.fields import (
    READ,
    UNREAD_PICTURE,
    RowLimits,
    declared,
    unread_fields,
)
from nanomolmo2.data.layouts import LAYOUTS, layout_of
from nanomolmo2.data.mixture import Mixture
from nanomolmo2.data.record import Confined, PointsScale, Prompts, Record, address_key
from nanomolmo2.data.records import Row, Rows, open_rows
from nanomolmo2.data.registry import SOURCES

__all__ = ["BadExample", "Source", "SourceConfig", "address_key", "open_mixture", "open_source"]


@dataclass(frozen=True)
class SourceConfig(Config):
    """Where examples come from, and how often.

    Attributes:
        path: a file (.jsonl, .json, .parquet, .tar), a folder or a pattern of them, ``hub:`` and
            the name of a data set on the Hugging Face hub, or the name of a registered source, such
            as ``emoji``.
        format: layout of the records; ``auto`` tells it from their fields. See docs/data.md.
        sampling_weight: share of the examples drawn, 0 to 1; None shares what the given weights
            leave by the square root of the sizes.
        name: for reports; taken from the path where it is empty.
        image_folder: where the images lie; empty: paths are relative to the file of records.
        prompts: how a data set without questions asks: ``natural`` sentences, or ``styles``, the
            bare style names of Molmo2's first stage (``long_caption 42:``, ``pointing: dogs``).
        separate_turns: the questions of a conversation do not build on each other: each becomes a
            branch of its own.
        points_scale: of the points that records give: ``pixels``; ``unit``, 0 to 1 of each side;
            ``percent``; ``thousandths``. A field of the same name in a record goes first.
        subset, split: which part of a data set on the hub.
        seed: of what is drawn within an example: scenes, wordings.
        options: of a registered source, as plain JSON types, such as ``{"length": 1000}``; those
            that are left out have its defaults.
    """

    RENAMED: ClassVar[dict[str, str]] = {"rate": "sampling_weight", "pictures": "image_folder"}

    path: str
    format: str = "auto"
    sampling_weight: float | None = None
    name: str = ""
    image_folder: str = ""
    prompts: Prompts = "natural"
    separate_turns: bool = False
    points_scale: PointsScale = "pixels"
    subset: str = ""
    split: str = "train"
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty: give a file, a folder, hub:NAME or emoji")
        formats = ("auto", *LAYOUTS, *SOURCES)
        for name, known in (
            ("format", formats),
            ("prompts", get_args(Prompts)),
            ("points_scale", get_args(PointsScale)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}"
                )
        weight = self.sampling_weight
        if weight is not None and not 0 <= weight <= 1:
            raise ValueError(f"sampling_weight is {weight}, expected a share from 0 to 1, or None")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, expected 0 or more")
        if self.options and self.registered is None:
            raise ValueError(
                f"options are for the registered sources ({', '.join(SOURCES)}), and {self.path} "
                f"is none of them: leave them out"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """As `Config.from_dict`; files of before the registry have a block by a source's name,
        whichever source they are about.
        """
        if isinstance(values, dict):
            values = dict(values)
            path, format = values.get("path"), values.get("format", "auto")
            for name in SOURCES:
                block = values.pop(name, None)
                if block and name == (path if format == "auto" else format):
                    values.setdefault("options", block)
        return super().from_dict(values)

    @property
    def registered(self) -> str | None:
        """Name of the registered source that this is; None for records."""
        name = self.path if self.format == "auto" else self.format
        return name if name in SOURCES else None

    def with_all_options(self) -> Self:
        """The same source with every option written out.

        Raises: ValueError for options that the registered source does not know.
        """
        if self.registered is None:
            return self
        options = SOURCES[self.registered].from_dict(self.options)
        return replace(self, options=options.to_dict())


class RecordSource:
    """Records of files or of the hub, read by a layout.

    Attributes:
        needs_answer, needs_truth: as of `Record`; evaluation does not need answers in words, and
            who only asks needs none at all.
    """

    def __init__(self, rows: Rows, config: SourceConfig) -> None:
        self.rows, self.config = rows, config
        self.name = config.name or _name_of(config.path.removeprefix("hub:"))
        self.in_order = getattr(rows, "in_order", False)
        self.needs_answer = self.needs_truth = True

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Example:
        return self.read(i)

    def read(self, i: int, limits: RowLimits | None = None) -> Example:
        """Example i.

        Args:
            limits: refuse what can never fit before anything of it is decoded.
        Raises: `BadExample` for whatever is wrong with this record; IndexError past the end.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name} has no example {i}, only {len(self)}")
        where = f"{self.name}, example {i}"
        try:
            row = self.rows[i]
            where = row.where
            return self._read(row, i, limits)
        except (BadExample, *NOT_OF_A_RECORD):
            raise
        except Exception as error:  # nobody can foresee what is in the records of the world
            raise BadExample("bad record", f"{where} cannot be read ({named(error)})") from None

    def layout(self, row: Row) -> str:
        """How the fields of a record are read."""
        return layout_of(row.values) if self.config.format == "auto" else self.config.format

    def record(self, row: Row, i: int) -> Record:
        """Row ``i`` with how this source reads its fields, its pictures not opened yet."""
        config = self.config
        confined: Confined = "no"
        if row.confined:
            confined = "folder" if config.image_folder else "itself"
        return Record(
            row.values,
            row.where,
            Path(config.image_folder).expanduser() if config.image_folder else row.folder,
            np.random.default_rng([config.seed, i]),
            config.prompts,
            config.separate_turns,
            config.points_scale,
            confined,
            self.needs_answer,
            self.needs_truth,
        )

    def _read(self, row: Row, i: int, limits: RowLimits | None) -> Example:
        layout = self.layout(row)
        reason = limits.refuse(declared(row.values, layout)) if limits is not None else None
        if reason is not None:
            raise BadExample("too long", f"{row.where}: {reason}")
        record = self.record(row, i)
        pictures, others = unread_fields({**row.values, **row.unread}, layout)
        try:
            example = LAYOUTS[layout](record)
        except BadExample as bad:  # of which such a field is often the cause
            also = f"; {unread_note(pictures[0])}" if pictures else ""
            raise BadExample(bad.cause, f"{bad.detail}{also}") from None
        notes = [(UNREAD_PICTURE, f"{row.where}: {unread_note(name)}") for name in pictures]
        return replace(
            example,
            notes=(*notes, *record.notes),
            unread=tuple(others),
            outside=tuple(record.outside),
        )


def _name_of(path: str) -> str:
    """A file's name without its ending; patterns whole, whose last part may be ``*.jsonl``."""
    return path if "*" in path else Path(path).stem


def unread_note(name: str) -> str:
    """What to say of a field that looks like a picture and is not read."""
    return (
        f"its field {name[:80]!r} looks like a picture and is not read: name it 'image', 'images' "
        f"or 'video', or leave it out"
    )


def open_source(spec: str | Path | SourceConfig) -> Source:
    """Open a source by its path or config.

    Raises: FileNotFoundError; ValueError for a file that is of no known kind, broken as a whole or
        empty; ImportError naming the extra that reading it needs. What is wrong with one record
        shows when that is asked for.
    """
    config = spec if isinstance(spec, SourceConfig) else SourceConfig(str(spec))
    if (known := config.registered) is not None:
        options = SOURCES[known].from_dict(config.options)
        return options.open(config.seed, config.name or known)
    source = RecordSource(open_rows(config.path, config.subset, config.split, READ), config)
    if not len(source):
        raise ValueError(f"{config.path} holds no records: was it written to the end?")
    return source


def open_mixture(configs: Sequence[SourceConfig], seed: int = 0) -> Mixture:
    """Open sources and mix them by their sampling weights."""
    weights = [config.sampling_weight for config in configs]
    return Mixture([open_source(config) for config in configs], weights, seed)
