"""The folder of an evaluation of finding: every outcome as it comes, so that it may go on.

evaluation.json      the model and the options, to tell whether one may go on
NAME.jsonl           one line a click, in order, of each row of the table
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanomolmo2.evaluation.breakdown import Tally
from nanomolmo2.evaluation.finding import Outcome
from nanomolmo2.evaluation.store import MOST_LINE, open_folder
from nanomolmo2.files import open_regular
from nanomolmo2.processor.point import Point


class FindStore:
    """Outcomes in a folder; those of an earlier call are not asked for again."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        """
        Args: about: what must be the same to go on, as plain JSON types.
        Raises: ValueError for a folder that holds something else, or another evaluation.
        """
        open_folder(folder, about)
        self.folder = folder

    def path(self, row: str) -> Path:
        return self.folder / f"{re.sub(r'[^a-z0-9-]+', '_', row)}.jsonl"

    def known(self, row: str) -> list[Outcome]:
        """What is there of a row. Raises: ValueError for lines that are no outcomes."""
        found: list[Outcome] = []
        path = self.path(row)
        if not path.exists():
            return found
        with open_regular(path) as stream:
            while (line := stream.readline(MOST_LINE)).endswith(b"\n"):
                outcome = read_outcome(line)
                if outcome is None or outcome.number != len(found):
                    raise ValueError(
                        f"{path}, line {len(found) + 1} is no answer of this evaluation: name a "
                        f"new folder"
                    )
                found.append(outcome)
        return found

    def adding(self, row: str, known: int, new: Iterable[Outcome]) -> Iterator[Outcome]:
        """New outcomes of a row as they come, each on disk before the next.

        Args: known: how many there are; a line that was being written when an earlier call ended
            is written again.
        """
        path, whole = self.path(row), 0
        if path.exists():
            with open_regular(path) as stream:
                whole = sum(len(stream.readline(MOST_LINE)) for _ in range(known))
        with path.open("ab") as stream:
            stream.truncate(whole)
            for outcome in new:
                stream.write(_line(outcome))
                stream.flush()
                yield outcome


def _line(outcome: Outcome) -> bytes:
    points = [[point.x, point.y, point.confidence] for point in outcome.points]
    values = {
        "number": outcome.number,
        "name": outcome.name,
        "tally": asdict(outcome.tally),
        "points": points,
        "size": outcome.size,
        "seconds": outcome.seconds,
    }
    return (json.dumps(values, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def read_outcome(line: bytes) -> Outcome | None:
    """Of a line of the file; None for any other."""
    try:
        values = json.loads(line)
        return Outcome(
            number=int(values["number"]),
            name=str(values["name"]),
            tally=Tally(**values["tally"]),
            points=tuple(
                Point(float(x), float(y), label="thing", confidence=sure)
                for x, y, sure in values["points"]
            ),
            size=(int(values["size"][0]), int(values["size"][1])),
            seconds=float(values["seconds"]),
        )
    except (ValueError, TypeError, KeyError, IndexError):
        return None
