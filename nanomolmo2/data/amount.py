"""How much data there is, told in the rows of a run: how often are they seen in so many steps?

Some examples are encoded to learn their lengths. Then the first rows are packed as the run will
pack them, in its own order, without their contents. Of small data all examples are encoded, so that
these rows are exactly those of the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanomolmo2.data.example import BadExample, Source
from nanomolmo2.data.fields import RowLimits
from nanomolmo2.data.inspect import Encode, read_record
from nanomolmo2.data.loader import RowPlan
from nanomolmo2.data.mixture import Mixture
from nanomolmo2.data.packing import Packer, count_crops
from nanomolmo2.data.sources import RecordSource

ENCODED = 48  # examples of a source, evenly spaced; of one that cannot jump, the first
PACKED = 64  # rows
COUNTED = 20_000  # records whose pictures are counted


@dataclass(frozen=True)
class Amount:
    """The records of a run's data, and how many of them a row holds.

    Sources that make their examples up, such as ``emoji``, are not counted beside records of
    people, and what a model is reminded of is never.

    Attributes:
        records: of all sources that count.
        pictures: different ones that they name; None where that is not known without opening them.
        examples_per_row: mean, of all sources.
        share: of the examples drawn, those from sources that count.
        made_up: no source has records: ``records`` is the number that can be made.
    """

    records: int
    pictures: int | None
    examples_per_row: float
    share: float = 1.0
    made_up: bool = False

    def epochs(self, steps: int, batch_size: int) -> float:
        """How often a record is seen, in the mean, in so many steps of so many rows."""
        return steps * batch_size * self.examples_per_row * self.share / self.records

    def steps(self, epochs: float, batch_size: int) -> int:
        """The fewest steps in which every record is seen so often."""
        one_step = self.epochs(1, batch_size)
        return max(1, math.ceil(epochs / one_step - 1e-9))


def measure(mixture: Mixture, encode: Encode, rows: RowPlan) -> Amount:
    """The amount of a run's data.

    Args:
        encode, rows: of the run.
    Raises: ValueError where none of the examples looked at can be learned from.
    """
    limits = RowLimits.of(getattr(encode, "processor", None), rows.max_tokens, rows.max_crops)
    records = [isinstance(source, RecordSource) for source in mixture.sources]
    replayed = [getattr(source, "is_replay", False) for source in mixture.sources]
    counted = records if any(records) else [not again for again in replayed]
    own = [source for source, counts in zip(mixture.sources, counted, strict=True) if counts]
    needs = [
        _needs(source, encode, rows, limits) if weight else {}
        for source, weight in zip(mixture.sources, mixture.weights, strict=True)
    ]
    for source, found in zip(mixture.sources, needs, strict=True):
        if found and not any(found.values()):
            raise ValueError(
                f"none of the {len(found)} examples looked at of {source.name} can be learned "
                f"from: nanomolmo2 inspect --audit says why"
            )
    return Amount(
        records=sum(len(source) for source in own),
        pictures=count_pictures(own),
        examples_per_row=_examples_per_row(mixture, needs, rows),
        share=sum(w for w, counts in zip(mixture.weights, counted, strict=True) if counts),
        made_up=not any(records),
    )


def count_pictures(sources: Sequence[Source]) -> int | None:
    """Different pictures that records name; None where some hold them, or there are too many."""
    names: set[tuple[int, str]] = set()
    for k, source in enumerate(sources):
        rows = getattr(source, "rows", None)
        if rows is None or not getattr(rows, "is_cheap", False) or len(source) > COUNTED:
            return None
        for i in range(len(source)):
            try:
                values = rows[i].values
            except (BadExample, ValueError, OSError, LookupError):
                continue
            shown = values.get("images") or values.get("image") or values.get("image_url") or []
            shown = shown if isinstance(shown, list) else [shown]
            if not all(isinstance(one, str) for one in shown):
                return None
            names.update((k, one) for one in shown)
    return len(names)


@dataclass(frozen=True)
class _Need:
    """What an example takes of a row."""

    tokens: int
    crops: int


def _needs(
    source: Source, encode: Encode, rows: RowPlan, limits: RowLimits
) -> Mapping[int, _Need | None]:
    """Of some examples, by their numbers; None for those that will be left out."""
    number = min(len(source), ENCODED)
    in_order = getattr(source, "in_order", False)
    chosen = range(number) if in_order else [i * len(source) // number for i in range(number)]
    found: dict[int, _Need | None] = {}
    for i in chosen:
        try:
            encoded = read_record(source, i, encode, limits).encoded
        except BadExample:
            found[i] = None
            continue
        crops = count_crops(encoded)
        fits = len(encoded.input_ids) <= rows.max_tokens and crops <= rows.max_crops
        found[i] = _Need(len(encoded.input_ids), crops) if fits else None
    return found


def _examples_per_row(
    mixture: Mixture, needs: Sequence[Mapping[int, _Need | None]], rows: RowPlan
) -> float:
    """The mean over the first rows of every slot, good examples and bad ones alike."""
    looked_at: list[list[Any]] = [list(found.values()) for found in needs]
    drawn = packed = 0
    slots = min(rows.batch_size, PACKED)
    for j in range(slots):
        stream = mixture.slot(j, rows.batch_size)
        packer: Packer[_Need] = Packer(
            rows.max_tokens, rows.max_crops, rows.packing_buffer, rows.crop_weight
        )
        for _ in range(max(1, PACKED // slots)):
            while not packer.full:
                source, index = stream.next()
                known = looked_at[source]
                # One that was not looked at is like another that was.
                need = needs[source].get(index, known[index % len(known)])
                drawn += 1
                if need is not None:
                    packer.add(need)
            packer.take()
            packed += 1
        drawn -= len(packer.waiting)
    return drawn / packed
