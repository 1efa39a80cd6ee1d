"""The public benchmarks: one table of facts.

PUBLIC["chartqa"].open(folder, "test") -> a Source, whose examples ask in Molmo2's style
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanomolmo2.data.example import NOT_OF_A_RECORD, BadExample, Branch, Example, Message, named
from nanomolmo2.data.record import Record
from nanomolmo2.data.records import Rows
from nanomolmo2.evaluation.public.files import WORDS, Folder, Layout
from nanomolmo2.evaluation.public.questions import Question


@dataclass(frozen=True)
class PublicBenchmark:
    """A benchmark that others published.

    Attributes:
        name: also the task of its questions. title: for people.
        ask: a record of any layout -> its question.
        layouts: how it is published.
        splits: those with answers; the first is the one that Molmo2 reports, where both have them.
    """

    name: str
    title: str
    ask: Callable[[Record], Question]
    layouts: tuple[Layout, ...]
    splits: tuple[str, ...] = ("val",)

    def open(self, folder: str | Path, split: str | None = None) -> PublicSource:
        """Its questions, from files that someone has downloaded.

        Args:
            folder: that the files were unpacked into, however deep.
            split: ``train``, ``val``, ``dev`` or ``test``; by default that which is reported.
        Raises: FileNotFoundError; ValueError for a folder that holds something else; ImportError
            naming the extra for parquet files.
        """
        split = {"validation": "val"}.get(split or "", split) or self.splits[0]
        if split not in WORDS:
            raise ValueError(f"the split is {split!r}, expected one of {', '.join(WORDS)}")
        found = Folder(Path(folder).expanduser())
        for layout in self.layouts:
            rows = layout.open(found, split)
            if rows is not None and len(rows):
                return PublicSource(self, rows, found.path)
        wanted = "; or ".join(layout.describe(split) for layout in self.layouts)
        raise ValueError(
            f"{folder} holds no questions of {self.title}, split {split}: found {found.listing()}, "
            f"expected {wanted}"
        )


class PublicSource:
    """The questions of a benchmark, by number."""

    def __init__(self, benchmark: PublicBenchmark, rows: Rows, folder: Path) -> None:
        self.name, self.rows, self.folder = benchmark.name, rows, folder
        self._ask = benchmark.ask

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Example:
        """Question i. Raises: `BadExample` for whatever is wrong with its record; IndexError."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name} has no question {i}, only {len(self)}")
        where = f"{self.name}, question {i}"
        try:
            row = self.rows[i]
            where = row.where
            rng = np.random.default_rng(i)
            record = Record(row.values, where, self.folder, rng, confined="folder")
            question = self._ask(record)
        except (BadExample, *NOT_OF_A_RECORD):
            raise
        except Exception as error:  # nobody can foresee what is in the files of the world
            raise BadExample("bad record", f"{where} cannot be read ({named(error)})") from None
        messages: list[Message] = [{"role": "user", "content": question.text}]
        if question.answer:
            messages.append({"role": "assistant", "content": question.answer})
        truth = {**question.truth, **({"parts": question.parts} if question.parts else {})}
        return Example(question.images, [Branch(messages, self.name, truth)])
