"""What an import took over and what it left out, by cause."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from nanomolmo2.data.example import brief


@dataclass
class Dropped:
    """Cause -> how often, and which was the first."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def note(self, cause: str, where: str, times: int = 1) -> None:
        self.counts[cause] += times
        self.first.setdefault(cause, brief(where))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return {
            cause: {"count": count, "first": self.first[cause]}
            for cause, count in self.counts.most_common()
        }


@dataclass
class ImportReport:
    """Result of an import.

    Attributes:
        records: pictures that were written, each as one record.
        questions: task -> how many are asked.
        labels: label -> things that are marked.
        dropped: what was left out; ``notes``: what was changed or taken for granted.
    """

    format: str
    source: str
    out: str
    records: int = 0
    questions: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    dropped: Dropped = field(default_factory=Dropped)
    notes: Dropped = field(default_factory=Dropped)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "format": self.format,
            "source": self.source,
            "out": self.out,
            "records": self.records,
            "questions": dict(self.questions.most_common()),
            "labels": dict(self.labels.most_common()),
            "dropped": self.dropped.to_dict(),
            "notes": self.notes.to_dict(),
        }

    def lines(self) -> list[str]:
        """For people."""
        asked = ", ".join(f"{count} {task}" for task, count in self.questions.most_common())
        lines = [f"wrote {self.records} records to {self.out}: {asked}"]
        if self.labels:
            shown = [f"{label} {count}" for label, count in self.labels.most_common(8)]
            more = f", {len(self.labels) - 8} more" if len(self.labels) > 8 else ""
            lines.append(f"labels: {', '.join(shown)}{more}")
        for title, what in (("dropped", self.dropped), ("noted", self.notes)):
            for cause, found in what.to_dict().items():
                lines.append(f"{title}: {found['count']} x {cause}, first {found['first']}")
        return lines
