"""Packing: several examples share a row, and none sees another.

    Packer    which of the waiting examples share the next row: a knapsack of tokens and crops
    join      their `Encoded`s as one

A row that is half full costs nearly as much as a full one. M crops (or images) of an example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from nanomolmo2.batch import IGNORED_LABEL, PACK_SUBSEGMENT
from nanomolmo2.data.example import BadExample
from nanomolmo2.processor import Encoded
from nanomolmo2.processor.collate import (
    check_targets,
    join_targets,
    join_windows,
    labels_of,
    subsegments_of,
    weights_of,
)

PACKING_BUFFER = 48  # examples that wait for a row
STEPS = 512  # at least so many different lengths are told apart when a row is chosen


class Sized(Protocol):
    """What is packed into a row."""

    @property
    def tokens(self) -> int: ...

    @property
    def crops(self) -> int: ...


@dataclass(frozen=True)
class Waiting:
    """An encoded example that waits for its row."""

    encoded: Encoded

    @property
    def tokens(self) -> int:
        return len(self.encoded.input_ids)

    @property
    def crops(self) -> int:
        return count_crops(self.encoded)


def count_crops(encoded: Encoded) -> int:
    """Crops, or images where they are not cut."""
    return 0 if encoded.pixel_values is None else len(encoded.pixel_values)


Item = TypeVar("Item", bound=Sized)


class Packer(Generic[Item]):
    """Examples in the order of their arrival, and rows chosen from them.

    Every row takes the example that has waited longest, so none stays for more rows than the
    buffer has places, however badly it fits.
    """

    def __init__(
        self,
        max_tokens: int,
        max_crops: int,
        packing_buffer: int = PACKING_BUFFER,
        crop_weight: float = 1.0,
    ) -> None:
        """
        Args:
            max_tokens, max_crops: what a row holds; its images, where they are not cut.
            packing_buffer: examples to choose from.
            crop_weight: how many tokens a crop is worth; see `choose`.
        Raises: ValueError for limits below 1 or a negative weight.
        """
        for name, value in (("max_tokens", max_tokens), ("packing_buffer", packing_buffer)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if max_crops < 0 or not crop_weight >= 0:
            raise ValueError(
                f"max_crops is {max_crops} and crop_weight {crop_weight}, expected 0 or more"
            )
        self.max_tokens, self.max_crops = max_tokens, max_crops
        self.packing_buffer, self.crop_weight = packing_buffer, crop_weight
        self.waiting: list[Item] = []  # the oldest first

    @property
    def full(self) -> bool:
        return len(self.waiting) >= self.packing_buffer

    def add(self, item: Item) -> None:
        """Let an example wait for its row.

        Raises: BadExample if no row is large enough for it; nothing is ever cut off.
        """
        if item.tokens > self.max_tokens or item.crops > self.max_crops:
            raise BadExample(
                "too long",
                f"{item.tokens} tokens and {item.crops} crops, but a row holds {self.max_tokens} "
                f"and {self.max_crops}",
            )
        self.waiting.append(item)

    def take(self) -> list[Item]:
        """The examples of the next row, the oldest first; they wait no longer."""
        chosen = choose(
            [item.tokens for item in self.waiting],
            [item.crops for item in self.waiting],
            self.max_tokens,
            self.max_crops,
            self.crop_weight,
        )
        row = [self.waiting[i] for i in chosen]
        self.waiting = [item for i, item in enumerate(self.waiting) if i not in chosen]
        return row


def choose(
    tokens: Sequence[int],
    crops: Sequence[int],
    max_tokens: int,
    max_crops: int,
    crop_weight: float = 1.0,
) -> list[int]:
    """Which examples fill a row best: the first one, and of the others those that maximise

        tokens + crop_weight * crops,    tokens <= max_tokens, crops <= max_crops

    exactly, by dynamic programming, but for this: lengths are rounded up to multiples of
    ``max_tokens // 512``, so that long rows take no longer to choose than short ones.

    Args:
        tokens, crops: of each example; each fits a row alone.
    Returns: their numbers, ascending.
    Source: Molmo2, "Packing" (olmo/data/dynamic_packer.py), where the first one is not forced.
    """
    quantum = max(1, max_tokens // STEPS)
    capacity = max_tokens // quantum
    # What is longer than all whole quanta, but not than the row, fills the row.
    sizes = [min(-(-length // quantum), capacity) for length in tokens]
    values = [t + crop_weight * c for t, c in zip(tokens, crops, strict=True)]
    T, C = capacity - sizes[0], max_crops - crops[0]
    # Mostly only the tokens are scarce, and that is 1 to 100 times less work to find out.
    others = _knapsack(sizes[1:], [0] * len(sizes[1:]), values[1:], T, 0)
    if sum(crops[1 + i] for i in others) > C:
        others = _knapsack(sizes[1:], crops[1:], values[1:], T, C)
    return [0, *(1 + i for i in others)]


def _knapsack(
    tokens: Sequence[int], crops: Sequence[int], values: Sequence[float], T: int, C: int
) -> list[int]:
    """Which items are worth most together, within T tokens and C crops; ascending."""
    T, C = min(T, sum(tokens)), min(C, sum(crops))  # the tables need no more
    best = np.zeros((C + 1, T + 1), dtype=np.float32)  # value of at most c crops and t tokens
    sums = np.empty_like(best)
    # Whether an item is part of the best value at the time when it is tried.
    taken = np.zeros((len(tokens), C + 1, T + 1), dtype=bool)
    # Only what the items to come can lead from to the full row is needed: little for the last ones,
    # so the smallest come last.
    order = sorted(range(len(tokens)), key=lambda i: -tokens[i])
    low_t, low_c = T - sum(tokens), C - sum(crops)
    for i in order:
        low_t, low_c = low_t + tokens[i], low_c + crops[i]
        t, c = max(low_t, tokens[i]), max(low_c, crops[i])
        if t > T or c > C:
            continue
        without, with_it = best[c:, t:], sums[c:, t:]
        smaller = best[c - crops[i] : C + 1 - crops[i], t - tokens[i] : T + 1 - tokens[i]]
        np.add(smaller, np.float32(values[i]), out=with_it)
        np.greater(with_it, without, out=taken[i, c:, t:])
        np.maximum(with_it, without, out=without)
    chosen = []
    for i in reversed(order):
        if taken[i, C, T]:
            chosen.append(i)
            T, C = T - tokens[i], C - crops[i]
    return sorted(chosen)


def join(examples: Sequence[Encoded]) -> Encoded:
    """Several examples as one row, in which the model computes for each what it does alone.

    Subsegments grow by 100000 an example, which keeps both text and images apart; positions go on
    restarting; crops, and the rows and lists of points, are counted through the row. For designs
    that write out one image token a visual token; the model refuses others.

    What only describes the images (sizes, grids, times) stays with the examples.

    Raises: ValueError for no examples, and for markers of points that do not fit their targets.
    """
    if not examples:
        raise ValueError("there is nothing to join: give at least one encoded example")
    for example in examples:
        check_targets(example)
    labels = np.concatenate([labels_of(e) for e in examples])
    weights = np.concatenate([weights_of(e) for e in examples])
    # Nothing is predicted at the beginning of an example, so not by the example before it either.
    firsts = np.cumsum([0, *(len(e.input_ids) for e in examples[:-1])])
    labels[firsts], weights[firsts] = IGNORED_LABEL, 0
    images = [e.pixel_values for e in examples if e.pixel_values is not None]
    targets, lists = join_targets(examples)
    return Encoded(
        input_ids=np.concatenate([e.input_ids for e in examples]),
        position_ids=np.concatenate([e.position_ids for e in examples]),
        labels=labels if any(e.labels is not None for e in examples) else None,
        loss_weights=weights if any(e.loss_weights is not None for e in examples) else None,
        subsegment_ids=np.concatenate(
            [subsegments_of(e) + PACK_SUBSEGMENT * k for k, e in enumerate(examples)]
        ),
        pixel_values=np.concatenate(images) if images else None,
        image_token_pooling=join_windows(examples),
        point_targets=targets,
        point_lists=lists,
    )
