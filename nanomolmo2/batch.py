"""Batch: what the processor hands to the model. B rows of T tokens, I images in reading order.

With crops: M crops of N patches of P x P pixels, flat over the batch, and n image tokens of up to K
patches each.
"""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100  # nothing is learned at this position
# Of the prefix of a message tree, whose branches are 0, 1, ...: they see it, it sees no branch.
PREFIX_SUBSEGMENT = 10_000
NO_MORE_POINTS = 1_000_000  # in place of a row: the class that ends a list of points (NMP)
PACK_SUBSEGMENT = 100_000  # times the number of an example in a pack, added to its subsegments


@dataclass
class Batch:
    """Padded tensors of several examples; ``None`` where a part is not used.

    The model takes one image token for every visual token. ``labels`` are not shifted: the label at
    t is the token at t (the model shifts); -100 = ignored.
    """

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor | None = None  # (B, T) bool, True = a real token
    position_ids: Tensor | None = None  # (B, T) int64; branches restart after the prefix
    labels: Tensor | None = None  # (B, T) int64
    loss_weights: Tensor | None = None  # (B, T) float32, aligned with labels
    subsegment_ids: Tensor | None = None  # (B, T) int64; as above; padding -1
    pixel_values: Tensor | None = None  # (I, 3, H, W) or (M, N, 3*P*P) float32
    image_token_pooling: Tensor | None = None  # (n, K) int64, crop * N + patch; -1 = empty slot
    visual_features: Tensor | None = None  # in place of pixel_values: what the encoder gave
    visual_tokens: Tensor | None = None  # (n, D), in place of both: what the connector gave
    point_targets: Tensor | None = None  # (P, 3) int64: row, slot, cell behind every PATCH token
    point_lists: Tensor | None = None  # (P,) int64, the list of each; None: a list ends with NMP
    loss_rows: Tensor | None = None  # (N,) int64, see `prepared`

    def prepared(self) -> Self:
        """The same batch with all that needs a look at values, found while they are on the CPU.

        A mask of ones goes, and ``loss_rows`` names the positions, of all B * T, whose next token
        carries loss. On a GPU each of these looks would make the host wait.
        """
        mask, rows = self.attention_mask, None
        if mask is not None and bool(mask.all()):
            mask = None
        if self.labels is not None:
            chosen = self.labels[:, 1:] != IGNORED_LABEL
            if self.loss_weights is not None:
                chosen = chosen & (self.loss_weights[:, 1:] > 0)
            rows = F.pad(chosen, (0, 1)).flatten().nonzero()[:, 0]
        return dataclasses.replace(self, attention_mask=mask, loss_rows=rows)

    def to(self, device: torch.device | str) -> Self:
        """The same batch with every tensor on ``device``."""
        moved = {k: v.to(device, non_blocking=True) for k, v in self.tensors().items()}
        return dataclasses.replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """The parts that are there, by name: ``model(**batch.tensors())``."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def __getattr__(name: str) -> Any:
    """`expand_image_tokens` has moved to the other forms of input; its name here stays."""
    if name != "expand_image_tokens":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("nanomolmo2.models.forms").expand_image_tokens
