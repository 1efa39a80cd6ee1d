"""A mixture of sources: which example comes next, exactly, for every slot of a step.

A slot is one row of a training step. Each has an endless stream of its own, so that the number of
processes and workers changes nothing. Its n-th draw follows from the seed, the slot and n alone:

    which source    a hash of (seed, slot, n) between 0 and 1, cut at the sampling weights
    which example   the examples of a source stand in one endless line, epoch after epoch, each in a
                    new order; of S slots, slot j takes places j, j + S, j + 2 S, ... of the line

So no two slots see the same place, over all slots every epoch holds every example once, and the
state of a stream is how often it drew from each source.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from nanomolmo2.data.example import Source

ROUNDS = 6  # of the shuffling network; from 4 on its orders look random


class Mixture:
    """Sources, how often each is drawn from, and in which order."""

    def __init__(
        self,
        sources: Sequence[Source],
        sampling_weights: Sequence[float | None] | None = None,
        seed: int = 0,
    ) -> None:
        """
        Args:
            sampling_weights: share of each source in the examples drawn. Sources whose weight is
                None share what the others leave, by the square root of their sizes; None: all of
                them do. If every weight is given, only their proportions count.
        Raises: ValueError for no or empty sources, and for weights that do not add up.
        """
        self.sources, self.seed = list(sources), seed
        self.sizes = [len(source) for source in self.sources]
        if not self.sources:
            raise ValueError("a mixture needs at least one source")
        for source, size in zip(self.sources, self.sizes, strict=True):
            if size < 1:
                raise ValueError(f"the source {source.name!r} is empty: leave it out")
        weights = [None] * len(self.sources) if sampling_weights is None else sampling_weights
        self.weights = self._shares(weights)
        self._cuts = list(accumulate(self.weights))

    def _shares(self, weights: Sequence[float | None]) -> list[float]:
        if len(weights) != len(self.sources):
            raise ValueError(
                f"found {len(weights)} weights for {len(self.sources)} sources: give one each, "
                f"None for a share by size"
            )
        given = [weight for weight in weights if weight is not None]
        if not all(math.isfinite(weight) and weight >= 0 for weight in given):
            raise ValueError(f"found the weights {given}, expected numbers of 0 or more")
        total, is_open = sum(given), len(given) < len(weights)
        if total == 0 and not is_open:
            raise ValueError("all weights are 0, so nothing would be drawn")
        if is_open and total >= 1:
            raise ValueError(
                f"the given weights add up to {total:g} and leave nothing for the "
                f"{len(weights) - len(given)} sources without one: give shares that add up to less "
                f"than 1, or a weight for every source"
            )
        roots = sum(math.sqrt(s) for s, w in zip(self.sizes, weights, strict=True) if w is None)
        return [
            (1 - total) * math.sqrt(size) / roots
            if weight is None
            else weight / (1 if is_open else total)
            for size, weight in zip(self.sizes, weights, strict=True)
        ]

    def slot(self, j: int, slots: int) -> SlotStream:
        """The stream of slot ``j`` of ``slots``, from its beginning."""
        return SlotStream(self, j, slots)

    def source_of(self, slot: int, n: int) -> int:
        """Number of the source of a slot's n-th draw."""
        place = _hash(self.seed, slot, n) / 2**64 * self._cuts[-1]
        # Rounding may lead to the very end, where a source of weight 0 may lie.
        last = max(k for k, weight in enumerate(self.weights) if weight > 0)
        return min(bisect.bisect_right(self._cuts, place), last)

    def example_at(self, source: int, place: int) -> int:
        """Number of the example at a place of a source's endless line."""
        epoch, position = divmod(place, self.sizes[source])
        if getattr(self.sources[source], "in_order", False):  # one that cannot jump
            return position
        return shuffled(position, self.sizes[source], _hash(self.seed, source, epoch, 1))


class SlotStream:
    """Draws of one slot. ``state_dict`` after n draws, loaded anywhere, goes on at draw n + 1."""

    def __init__(self, mixture: Mixture, j: int, slots: int) -> None:
        if not 0 <= j < slots:
            raise ValueError(f"found slot {j} of {slots}, expected 0 to {slots - 1}")
        self.mixture, self.j, self.slots = mixture, j, slots
        self.drawn = [0] * len(mixture.sources)

    def next(self) -> tuple[int, int]:
        """(number of the source, number of its example)."""
        source = self.mixture.source_of(self.j, sum(self.drawn))
        place = self.j + self.drawn[source] * self.slots
        self.drawn[source] += 1
        return source, self.mixture.example_at(source, place)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON types: what the stream is of, and how often it drew from each source."""
        return {**self._identity(), "drawn": list(self.drawn)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises: ValueError if the state is of another stream, which would go on elsewhere."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(
                    f"the state of the data has {name} {state.get(name)!r}, this run {value!r}: "
                    f"resume with the same sources, sampling weights, seed and batch size, or "
                    f"start a new run"
                )
        self.drawn = list(state["drawn"])

    def _identity(self) -> dict[str, Any]:
        mixture = self.mixture
        return {
            "seed": mixture.seed,
            "slot": self.j,
            "slots": self.slots,
            "sources": [source.name for source in mixture.sources],
            "sizes": list(mixture.sizes),
            "rates": list(mixture.weights),
        }


def shuffled(position: int, size: int, key: int) -> int:
    """Where ``position`` of 0 .. size - 1 goes in the order number ``key``.

    A Feistel network on pairs of numbers below the root of the size: one to one for any key, and
    without a table, so that a source may have billions of examples. What lands beyond the size is
    sent on until it lies within.
    """
    side = math.isqrt(size - 1) + 1
    while True:
        left, right = divmod(position, side)
        for round in range(ROUNDS):
            left, right = right, (left + _hash(key, round, right)) % side
        position = left * side + right
        if position < size:
            return position


def _hash(*numbers: int) -> int:
    """64 bits that look random; the same on every machine (Python's own hash is not meant to be).

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), chained.
    """
    mask, mixed = 2**64 - 1, 0
    for number in numbers:
        mixed = (mixed + number + 0x9E3779B97F4A7C15) & mask
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        mixed ^= mixed >> 31
    return mixed
