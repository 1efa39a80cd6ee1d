"""Batch: what the processor hands to the model. B rows of T tokens, I images in reading order.

With crops: M crops of N patches of P x P pixels, flat over the batch, and n image tokens of up to K
patches each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100  # nothing is learned at this position
# Of the prefix of a message tree, whose branches are 0, 1, ...: they see it, it sees no branch.
PREFIX_SUBSEGMENT = 10_000
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


@dataclass
class Placement:
    """Where the L tokens of every row go once each image has a position for every visual token."""

    source: Tensor  # (B, T) index into the row's L tokens
    visual: Tensor  # (B, T) bool, positions of visual tokens, in reading order
    real: Tensor | None  # (B, T) bool, False = padding; None = no padding anywhere

    def expand(self, values: Tensor, fill: int | float | None = None) -> Tensor:
        """(B, L) values of the tokens -> (B, T); visual positions and padding get ``fill``."""
        expanded = values.gather(1, self.source)
        if fill is None:
            return expanded
        keep = ~self.visual if self.real is None else ~self.visual & self.real
        return expanded.masked_fill(~keep, fill)


def expand_image_tokens(
    batch: Batch,
    image_token_id: int,
    visual_counts: Sequence[int],
    given_by_row: Sequence[int] | None = None,
) -> tuple[Batch, Placement]:
    """One image token for every image -> one for every visual token; rows are padded to one length.

    Mask, labels and weights go along; visual positions carry no loss. A batch whose image tokens
    are written out already stays as it is.

    Args:
        visual_counts: visual tokens of every image, in reading order.
        given_by_row: images of every row, if known.
    Raises: ValueError if image tokens and images do not agree, or positions are given that the
        expansion would move.
    """
    is_image = batch.input_ids == image_token_id
    places = place(is_image, visual_counts, batch.attention_mask, given_by_row)
    if places.source.shape == batch.input_ids.shape:
        mask = places.real
        return dataclasses.replace(batch, attention_mask=mask), places
    if batch.position_ids is not None or batch.subsegment_ids is not None:
        raise ValueError(
            "position_ids and subsegment_ids need image tokens written out one a visual token: "
            "here each stands for a whole picture, so positions would move"
        )
    ids, labels, weights = places.expand(batch.input_ids), batch.labels, batch.loss_weights
    # Padding repeats the row's first token; no image token may stand there.
    padding = ~places.visual & (ids == image_token_id)
    expanded = dataclasses.replace(
        batch,
        input_ids=ids.masked_fill(padding, int(image_token_id == 0)),
        attention_mask=places.real,
        labels=None if labels is None else places.expand(labels, IGNORED_LABEL),
        loss_weights=None if weights is None else places.expand(weights, 0.0),
    )
    return expanded, places


def place(
    is_image: Tensor,
    visual_counts: Sequence[int],
    attention_mask: Tensor | None,
    given_by_row: Sequence[int] | None = None,
) -> Placement:
    """Lay out rows whose image tokens (B, L) stand for one image each, or one visual token each.

    Arguments and errors as in :func:`expand_image_tokens`.
    """
    B, L = is_image.shape
    counts = is_image.sum(dim=1).tolist()
    tokens, images, visual = sum(counts), len(visual_counts), sum(visual_counts)
    expand = tokens == images
    if not expand and tokens != visual:
        per_row = ", ".join(map(str, counts[:8])) + (", ..." if B > 8 else "")
        raise ValueError(
            f"the prompt holds {tokens} image tokens (by row: {per_row}), but {images} "
            f"picture(s) with {visual} visual tokens were given: write one image token for every "
            f"picture (or one for every visual token), and send one picture for each"
        )
    if given_by_row is not None:
        _check_rows(counts, visual_counts, given_by_row, expand)
    real = None if attention_mask is None else attention_mask.bool()
    if real is not None and bool(real.all()):
        real = None
    if not expand or visual == images:
        source = torch.arange(L, device=is_image.device).expand(B, L)
        return Placement(source, is_image, real)

    # The place of every token is the running sum of the widths before it.
    width = torch.ones_like(is_image, dtype=torch.long)
    width[is_image] = torch.tensor(visual_counts, device=is_image.device)
    lengths = width.sum(dim=1)
    T = int(lengths.max())
    left = real is not None and bool((~real[:, 0]).any())  # a left-padded batch grows to the left
    source = torch.zeros(B, T, dtype=torch.long, device=is_image.device)
    inside = torch.zeros(B, T, dtype=torch.bool, device=is_image.device)
    for b, length in enumerate(lengths.tolist()):
        span = slice(T - length, T) if left else slice(length)
        source[b, span] = torch.arange(L, device=is_image.device).repeat_interleave(width[b])
        inside[b, span] = True
    visual_places = is_image.gather(1, source) & inside
    if real is not None:
        inside &= real.gather(1, source)
    return Placement(source, visual_places, None if bool(inside.all()) else inside)


def _check_rows(
    counts: list[int], visual_counts: Sequence[int], given_by_row: Sequence[int], expand: bool
) -> None:
    """Every row must have the image tokens of its own images."""
    start = 0
    for b, (count, given) in enumerate(zip(counts, given_by_row, strict=True)):
        wanted = given if expand else sum(visual_counts[start : start + given])
        if count != wanted:
            raise ValueError(
                f"row {b} holds {count} image tokens, but its {given} picture(s) want {wanted}:"
                f" give each row its own pictures"
            )
        start += given
