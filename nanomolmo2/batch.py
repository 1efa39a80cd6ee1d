"""Batch: what the processor hands to the model. B rows of T tokens, I pictures in reading order.

With crops: M crops of N patches of P x P pixels, flat over the batch, and n image tokens of K
patches each.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

IGNORED_LABEL = -100  # nothing is learned at this position
# Of the prefix of a message tree, whose branches are 0, 1, ...: they see it, it sees no branch.
PREFIX_SUBSEGMENT = 10_000
PACK_SUBSEGMENT = 100_000  # times the number of an example in a pack, added to its subsegments


@dataclass
class Batch:
    """Padded tensors of several examples; ``None`` where a part is not used.

    ``labels`` are not shifted: the label at t is the token at t (the model shifts); -100 = ignored.
    """

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor | None = None  # (B, T) bool, True = a real token
    position_ids: Tensor | None = None  # (B, T) int64; branches restart after the prefix
    labels: Tensor | None = None  # (B, T) int64
    loss_weights: Tensor | None = None  # (B, T) float32, aligned with labels
    subsegment_ids: Tensor | None = None  # (B, T) int64; as above; padding -1
    pixel_values: Tensor | None = None  # (I, 3, H, W) or (M, N, 3*P*P) float32
    image_token_pooling: Tensor | None = None  # (n, K) int64, crop * N + patch; -1 = empty slot

    def to(self, device: torch.device | str) -> Self:
        """The same batch with every tensor on ``device``."""
        moved = {k: v.to(device, non_blocking=True) for k, v in self.tensors().items()}
        return dataclasses.replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """The parts that are there, by name: ``model(**batch.tensors())``."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}
