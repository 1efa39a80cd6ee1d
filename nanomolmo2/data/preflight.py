"""What is probably a mistake in data, found before training from what its records declare.

Nothing is decoded, and of large sources only some records are looked at: the audit looks at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from nanomolmo2.data.example import BadExample, Source
from nanomolmo2.data.fields import RowLimits, declared, unread_fields
from nanomolmo2.data.records import Row
from nanomolmo2.data.sources import RecordSource, unread_note
from nanomolmo2.terminal import visible

# Records that are looked at: of texts, evenly spaced; of files that hold pictures too, where those
# beside each other cost least; of streams.
LOOKED_AT, WITH_PICTURES, STREAMED = 20_000, 100, 20


def preflight(sources: Sequence[Source], limits: RowLimits) -> list[str]:
    """Sentences on fields that are not read, and on records that fit into no row.

    Args:
        limits: of the rows of the training.
    Returns: one sentence for each, codes of terminals made visible; none for sources that are no
        records of a file.
    """
    sentences = []
    for source in sources:
        if not isinstance(source, RecordSource):
            continue
        pictures, others, too_long = Counter[str](), Counter[str](), list[str]()
        looked = 0
        for row in some_rows(source):
            looked += 1
            layout = source.layout(row)
            look_like, unknown = unread_fields({**row.values, **row.unread}, layout)
            pictures.update(look_like)
            others.update(unknown)
            if (reason := limits.refuse(declared(row.values, layout))) is not None:
                too_long.append(f"{row.where}, can never be learned from: {reason}")
        of = f"of {looked} records looked at"
        sentences += [
            f"{source.name}: {unread_note(name)} ({count} {of})" for name, count in pictures.items()
        ]
        if others:
            listed = ", ".join(f"{name} ({count})" for name, count in others.most_common())
            sentences.append(f"{source.name}: fields that are not read, {of}: {listed}")
        if too_long:
            more = f" ({len(too_long)} such {of})" if too_long[1:] else ""
            sentences.append(f"{too_long[0]}{more}")
    return [visible(sentence) for sentence in sentences]


def some_rows(source: RecordSource) -> Iterator[Row]:
    """Some records; those that cannot be read are left to the training."""
    size = len(source)
    if getattr(source.rows, "is_cheap", False):
        numbers = range(0, size, -(-size // LOOKED_AT))
    else:
        numbers = range(min(size, STREAMED if source.in_order else WITH_PICTURES))
    for i in numbers:
        try:
            row = source.rows[i]
        except (BadExample, ValueError, OSError, ArithmeticError, LookupError, MemoryError):
            continue
        yield row
