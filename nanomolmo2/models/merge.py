"""Where pictures meet text: visual tokens take their places in the token sequence.

B rows, L tokens a row, T positions after the merge, I pictures, n visual tokens a picture, D width.

An image token stands for one picture, which widens it to its n visual tokens; or the row already
holds one image token for every visual token (Molmo2's processor writes them), and nothing moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Pictures = Tensor | Sequence["Tensor | None"] | None


@dataclass
class Placement:
    """Where everything goes: computed from the ids alone, before any weight is used."""

    source: Tensor  # (B, T) index into the row's L tokens
    visual: Tensor  # (B, T) bool, positions that take a feature, in reading order
    real: Tensor | None  # (B, T) bool, False = padding; None = no padding anywhere

    def spread(self, values: Tensor, fill: int | float | None = None) -> Tensor:
        """(B, L) values of the tokens -> (B, T); visual positions and padding get ``fill``."""
        spread = values.gather(1, self.source)
        if fill is None:
            return spread
        keep = ~self.visual if self.real is None else ~self.visual & self.real
        return spread.masked_fill(~keep, fill)


def list_pictures(
    pixel_values: Pictures, image_counts: list[int], visual_tokens: int
) -> tuple[list[Tensor], list[int] | None]:
    """Every picture (3, H, W) in reading order, and how many each row brings if the form says so.

    Args:
        pixel_values: (I, 3, H, W), pictures in reading order, as many as the rows have;
            (B, M, 3, H, W), row by row, all-zero pictures behind a row's own are padding;
            a list of (3, H, W) in reading order; a list of B entries, each None or (m, 3, H, W).
        image_counts: image tokens of every row.
        visual_tokens: n of a picture of this size; only read for the padded form.
    Raises: ValueError for other shapes.
    """
    rows = len(image_counts)
    if pixel_values is None:
        return [], None
    if isinstance(pixel_values, Tensor):
        if pixel_values.ndim == 4:
            return list(pixel_values), None
        if pixel_values.ndim != 5:
            raise ValueError(
                f"expected pixel_values of shape (I, 3, H, W) or (B, M, 3, H, W), found "
                f"{tuple(pixel_values.shape)}: crops (M, N, 3*P*P) come with image_token_pooling"
            )
        if pixel_values.shape[0] != rows:
            raise ValueError(
                f"pixel_values {tuple(pixel_values.shape)} holds {pixel_values.shape[0]} rows "
                f"of pictures, input_ids has {rows} rows"
            )
        given = _unpadded(pixel_values, image_counts, visual_tokens)
        return [p for row, own in zip(pixel_values, given, strict=True) for p in row[:own]], given
    pictures: list[Tensor] = []
    for i, entry in enumerate(pixel_values):
        if entry is None:
            continue
        if entry.ndim == 3:
            pictures.append(entry)
        elif entry.ndim == 4:
            pictures.extend(entry)
        else:
            raise ValueError(
                f"entry {i} of pixel_values must be None, (3, H, W) or (m, 3, H, W), found "
                f"{tuple(entry.shape)}"
            )
    if all(entry is not None and entry.ndim == 3 for entry in pixel_values):
        return pictures, None
    if len(pixel_values) != rows:
        raise ValueError(
            f"pixel_values lists {len(pixel_values)} rows of pictures, input_ids has {rows}"
        )
    return pictures, [0 if e is None else 1 if e.ndim == 3 else len(e) for e in pixel_values]


def _unpadded(pixel_values: Tensor, image_counts: list[int], visual_tokens: int) -> list[int]:
    """Pictures of every row of (B, M, 3, H, W): up to the last that is not all zero."""
    filled = pixel_values.flatten(2).any(dim=2)  # (B, M)
    numbers = torch.arange(1, filled.shape[1] + 1, device=filled.device)
    own: list[int] = (filled * numbers).amax(dim=1).tolist() if len(numbers) else [0] * len(filled)
    if image_counts == [count * visual_tokens for count in own]:
        return own
    # An all-zero picture that has an image token is one.
    return [max(a, min(b, len(numbers))) for a, b in zip(own, image_counts, strict=True)]


def place(
    is_image: Tensor,
    visual_counts: list[int],
    attention_mask: Tensor | None,
    given_by_row: list[int] | None = None,
) -> Placement:
    """Lay out the merged rows.

    Args:
        is_image: (B, L) bool, the image tokens.
        visual_counts: visual tokens n of every picture, in reading order.
        attention_mask: (B, L), 0 = padding on either side; None = no padding.
        given_by_row: pictures of every row, if known.
    Raises: ValueError if image tokens and pictures do not agree.
    """
    B, L = is_image.shape
    counts = is_image.sum(dim=1).tolist()
    tokens, pictures, visual = sum(counts), len(visual_counts), sum(visual_counts)
    expand = tokens == pictures
    if not expand and tokens != visual:
        per_row = ", ".join(map(str, counts[:8])) + (", ..." if B > 8 else "")
        raise ValueError(
            f"the prompt holds {tokens} image tokens (by row: {per_row}), but {pictures} "
            f"picture(s) with {visual} visual tokens were given: write one image token for every "
            f"picture (or one for every visual token), and send one picture for each"
        )
    if given_by_row is not None:
        starts = [0]
        for given in given_by_row:
            starts.append(starts[-1] + given)
        for b, (count, given) in enumerate(zip(counts, given_by_row, strict=True)):
            wanted = given if expand else sum(visual_counts[starts[b] : starts[b + 1]])
            if count != wanted:
                raise ValueError(
                    f"row {b} holds {count} image tokens, but its {given} picture(s) want {wanted}:"
                    f" give each row its own pictures"
                )
    real = None if attention_mask is None else attention_mask.bool()
    if real is not None and bool(real.all()):
        real = None
    if not expand or visual == pictures:
        source = torch.arange(L, device=is_image.device).expand(B, L)
        return Placement(source, is_image, real)

    # The place of every token is the running sum of the widths before it.
    width = torch.ones_like(is_image, dtype=torch.long)
    width[is_image] = torch.tensor(visual_counts, device=is_image.device)
    lengths = width.sum(dim=1)
    T = int(lengths.max())
    left = real is not None and bool((~real[:, 0]).any())
    offset = (T - lengths) if left else torch.zeros_like(lengths)
    source = torch.zeros(B, T, dtype=torch.long, device=is_image.device)
    inside = torch.zeros(B, T, dtype=torch.bool, device=is_image.device)
    for b in range(B):
        span = slice(int(offset[b]), int(offset[b] + lengths[b]))
        source[b, span] = torch.arange(L, device=is_image.device).repeat_interleave(width[b])
        inside[b, span] = True
    visual_mask = is_image.gather(1, source) & inside
    if real is not None:
        inside &= real.gather(1, source)
    return Placement(source, visual_mask, None if bool(inside.all()) else inside)
