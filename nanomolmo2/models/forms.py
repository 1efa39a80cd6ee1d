"""The forms that inputs come in, and the checks of their values: for face.py.

B rows, L tokens a row, T new positions, S all positions, I images, n visual tokens of an image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomolmo2.batch import IGNORED_LABEL, NO_MORE_POINTS, Batch
from nanomolmo2.models.point_predictor import CELLS

if TYPE_CHECKING:
    from nanomolmo2.models.language_model import LanguageModel
    from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config

Images: TypeAlias = "Tensor | Sequence[Tensor | None] | None"


class Past(Protocol):
    """What is asked of a cache: slots written, which of them are real (B, S), next positions."""

    length: int
    key_mask: Tensor | None
    positions: Tensor | None


def check_ids(input_ids: Tensor, num_embeddings: int) -> None:
    """Raises: ValueError for token ids of another form, or outside the vocabulary."""
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError(
            f"expected token ids of shape (B, T) and an integer type, found "
            f"{tuple(input_ids.shape)} {input_ids.dtype}"
        )
    # One comparison costs nothing on a CPU; elsewhere it would make every decode step wait.
    if input_ids.numel() and (input_ids.device.type == "cpu" or input_ids.shape[1] > 1):
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= num_embeddings:
            raise ValueError(
                f"token ids run from {low} to {high}, but the vocabulary has "
                f"{num_embeddings} (0..{num_embeddings - 1}): "
                f"is this the tokenizer of another model?"
            )


def check_labels(labels: Tensor, vocab_size: int) -> None:
    """Raises: ValueError for labels that are neither -100 nor a token that can be written."""
    real = labels[labels != IGNORED_LABEL]
    if real.numel() and (int(real.min()) < 0 or int(real.max()) >= vocab_size):
        raise ValueError(
            f"labels run from {int(real.min())} to {int(real.max())}, but the model writes "
            f"tokens 0..{vocab_size - 1}; positions without loss are marked {IGNORED_LABEL}"
        )


def check_batch(batch: Batch, config: NanoMolmo2Config) -> Batch:
    """A `Batch` on the CPU, before it goes to a model that does not look at values itself.

    Returns: the batch.
    Raises: ValueError for ids and labels outside the vocabulary, or where the image tokens are not
        as many as the visual tokens that will be made for them.
    """
    check_ids(batch.input_ids, config.llm_config.num_embeddings)
    if batch.labels is not None:
        check_labels(batch.labels, config.llm_config.num_logits)
    image_tokens = int(config.is_visual(batch.input_ids).sum())
    visual = 0
    if batch.image_token_pooling is not None:
        visual = len(batch.image_token_pooling)
    elif batch.pixel_values is not None:
        P = config.vision_config.patch_size
        rows, columns = (side // P for side in batch.pixel_values.shape[-2:])
        visual = len(batch.pixel_values) * config.connector.num_visual_tokens(rows * columns)
    if image_tokens != visual:
        raise ValueError(
            f"the batch holds {image_tokens} image tokens, but its images make {visual} visual "
            f"tokens: was a prompt cut off, or does the processor belong to another model?"
        )
    check_points(batch, config)
    return batch


POINT_PARTS = ("point_targets", "point_lists")


def check_points(batch: Batch, config: NanoMolmo2Config) -> None:
    """Check the points of a batch on the CPU: each PATCH has its line, each line its tokens.

    ``point_targets`` are (P, 3) int64: for every PATCH token, in reading order, its row (number of
    a visual token of the batch), slot and cell, or (`NO_MORE_POINTS`, -1, -1); a slot or cell whose
    token was cut off is -1. ``point_lists`` (P,): points of one number are of one list; by default
    a list ends with no-more-points.

    Raises: ValueError for lines and tokens that do not belong together, rows, slots and cells that
        are not there or cannot be selected, and points where the model has none.
    """
    rule, targets, ids = config.point_config, batch.point_targets, batch.input_ids
    if rule is None:
        if targets is not None:
            raise ValueError(
                "found point_targets, but the model has no point_config: leave them out"
            )
        return
    patch, subpatch, location = rule.marker_ids
    places = (ids.flatten() == patch).nonzero()[:, 0]
    found = 0 if targets is None else len(targets)
    if found != len(places):
        raise ValueError(
            f"the batch holds {len(places)} points (tokens {patch}), but point_targets has {found} "
            f"lines: pass row, slot and cell of each"
        )
    if targets is None:
        return
    if targets.ndim != 2 or targets.shape[1] != 3 or targets.is_floating_point():
        raise ValueError(
            f"point_targets {tuple(targets.shape)} {targets.dtype} must be (points, 3) of an "
            f"integer type: row, slot and cell of each"
        )
    if batch.point_lists is not None and batch.point_lists.shape != (found,):
        raise ValueError(
            f"point_lists {tuple(batch.point_lists.shape)} must have {found} numbers, one for each "
            f"line of point_targets; leave them out where every list ends with no-more-points"
        )
    row, slot, cell = targets.unbind(dim=1)
    is_row = row != NO_MORE_POINTS
    _check_rows_of_points(row[is_row], slot[is_row], cell[is_row], batch, config)
    # Behind PATCH come SUBPATCH and LOCATION, in the same row of the batch.
    T = ids.shape[1]
    for marker, step, wanted in (
        (subpatch, 1, is_row & (slot >= 0)),
        (location, 2, is_row & (slot >= 0) & (cell >= 0)),
    ):
        behind = places + step
        inside = places % T + step < T
        there = inside & (ids.flatten()[behind.clamp(max=ids.numel() - 1)] == marker)
        if not torch.equal(there & (is_row if step == 1 else slot >= 0), wanted):
            raise ValueError(
                "a point is cut off: its row, slot and cell must be followed by their tokens "
                f"{(patch, subpatch, location)}, and what is missing must be -1 in point_targets"
            )
        if int((ids == marker).sum()) != int(wanted.sum()):
            raise ValueError(
                f"token {marker} stands alone in the batch: it belongs behind a point's {patch}"
            )


def _check_rows_of_points(
    row: Tensor, slot: Tensor, cell: Tensor, batch: Batch, config: NanoMolmo2Config
) -> None:
    """Check that rows can be selected, and that slots and cells are there."""
    ids = batch.input_ids.flatten()
    visual = ids[config.is_visual(ids)]
    n, index = len(visual), batch.image_token_pooling
    slots = config.connector.pooling_size**2 if index is None else index.shape[1]
    for name, values, least, most in (
        ("row", row, 0, n - 1),
        ("slot", slot, -1, slots - 1),
        ("cell", cell, -1, CELLS - 1),
    ):
        if len(values) and not (least <= int(values.min()) and int(values.max()) <= most):
            raise ValueError(
                f"point_targets has {name}s from {int(values.min())} to {int(values.max())}, but "
                f"the batch has {f'0 to {most}' if most >= 0 else 'none'}: rows count its visual "
                f"tokens, slots the patches of a row, cells the ninths of a patch"
            )
    overviews = row[visual[row] != config.image_token_id]
    if len(overviews):
        raise ValueError(
            f"a point selects row {int(overviews[0])}, a visual token of an overview: take the row "
            f"of the details that shows the place"
        )
    if index is None:
        return
    empty = ((slot >= 0) & (index[row, slot.clamp(min=0)] < 0)).nonzero()[:, 0].tolist()
    if empty:
        found, patch = int(row[empty[0]]), int(slot[empty[0]])
        filled = (index[found] >= 0).nonzero()[:, 0].tolist()
        raise ValueError(
            f"a point selects patch {patch} of visual token {found}, which has only {filled}: the "
            f"others are -1 in image_token_pooling"
        )


def over_all_crops(index: Tensor, is_overview: Tensor, M: int, N: int) -> Tensor:
    """The pooling index (n, W) of M crops of N patches, counted over all of them.

    MolmoPoint's own processor counts the patches of every image from 0. Such an index is known by
    its overviews, each of which begins with patch 0, and by the number of crops, which must come
    out; any other stays as it is.

    Args:
        is_overview: (n,) bool, the visual tokens that show an overview.
    """
    before = F.pad(is_overview[:-1], (1, 0))
    starts = (is_overview & ~before).nonzero()[:, 0].tolist()
    if len(starts) < 2 or starts[0] != 0:
        return index
    images = index.split([b - a for a, b in zip(starts, [*starts[1:], len(index)], strict=True)])
    crops = [int(image.max()) // N + 1 for image in images]
    from_zero = all(bool((image == 0).any()) for image in images)
    if not from_zero or sum(crops) != M:
        return index
    firsts = torch.tensor([0, *crops[:-1]], device=index.device).cumsum(dim=0) * N
    shifted = [image + first for image, first in zip(images, firsts, strict=True)]
    return torch.where(index < 0, index, torch.cat(shifted))


def list_images(
    pixel_values: Images, image_counts: list[int], visual_tokens: int
) -> tuple[list[Tensor], list[int] | None]:
    """Every image (3, H, W) in reading order, and how many each row brings if the form says so.

    Args:
        pixel_values: (I, 3, H, W), images in reading order, as many as the rows have;
            (B, M, 3, H, W), row by row, all-zero images behind a row's own are padding;
            a list of (3, H, W) in reading order; a list of B entries, each None or (m, 3, H, W).
        image_counts: image tokens of every row.
        visual_tokens: n of an image of this size; only read for the padded form.
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
    images: list[Tensor] = []
    for i, entry in enumerate(pixel_values):
        if entry is None:
            continue
        if entry.ndim not in (3, 4):
            raise ValueError(
                f"entry {i} of pixel_values must be None, (3, H, W) or (m, 3, H, W), found "
                f"{tuple(entry.shape)}"
            )
        images.extend([entry] if entry.ndim == 3 else entry)
    if all(entry is not None and entry.ndim == 3 for entry in pixel_values):
        return images, None
    if len(pixel_values) != rows:
        raise ValueError(
            f"pixel_values lists {len(pixel_values)} rows of pictures, input_ids has {rows}"
        )
    return images, [0 if e is None else 1 if e.ndim == 3 else len(e) for e in pixel_values]


def _unpadded(pixel_values: Tensor, image_counts: list[int], visual_tokens: int) -> list[int]:
    """Images of every row of (B, M, 3, H, W): up to the last that is not all zero."""
    filled = pixel_values.flatten(2).any(dim=2)  # (B, M)
    numbers = torch.arange(1, filled.shape[1] + 1, device=filled.device)
    own: list[int] = (filled * numbers).amax(dim=1).tolist() if len(numbers) else [0] * len(filled)
    if image_counts == [count * visual_tokens for count in own]:
        return own
    # An all-zero image that has an image token is one.
    return [max(a, min(b, len(numbers))) for a, b in zip(own, image_counts, strict=True)]


def full_mask(mask: Tensor, B: int, T: int, S: int, dtype: torch.dtype) -> Tensor:
    if mask.shape[0] not in (1, B) or mask.shape[1] != 1 or tuple(mask.shape[2:]) != (T, S):
        raise ValueError(
            f"a 4-D attention mask must be (1 or {B}, 1, {T}, {S}), found {tuple(mask.shape)}"
        )
    return mask.to(dtype) if mask.is_floating_point() else mask.bool()


def key_mask_of(attention_mask: Tensor | None, B: int, T: int, cache: Past | None) -> Tensor | None:
    """(B, S) bool, or None where every slot is real."""
    past = 0 if cache is None else cache.length
    remembered = None if cache is None else cache.key_mask
    if attention_mask is None:
        return None if remembered is None else F.pad(remembered, (0, T), value=True)
    if attention_mask.ndim != 2 or attention_mask.shape[0] != B:
        raise ValueError(
            f"expected an attention mask of shape ({B}, {T}) or 4-D, found "
            f"{tuple(attention_mask.shape)}"
        )
    mask = attention_mask.bool()
    if past and mask.shape[1] == T:
        before = mask.new_ones(B, past) if remembered is None else remembered
        mask = torch.cat([before, mask], dim=1)
    if mask.shape[1] != past + T:
        raise ValueError(
            f"the attention mask covers {mask.shape[1]} positions, but there are {past} past "
            f"and {T} new ones: pass a column for each"
        )
    return None if bool(mask.all()) else mask


def new_positions(
    key_mask: Tensor | None, T: int, cache: Past | None, device: torch.device
) -> Tensor:
    """(B or 1, T): real tokens counted from 0; padding repeats its left neighbour."""
    past = 0 if cache is None else cache.length
    if key_mask is not None:
        return (key_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, past:]
    steps = torch.arange(T, device=device)[None]
    if cache is not None and cache.positions is not None:
        return cache.positions + steps
    return past + steps


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


@contextmanager
def collect_states(llm: LanguageModel, states: list[Tensor]) -> Iterator[None]:
    """Collect what goes into the first block, and what every block and the last norm give."""
    handles = [
        llm.layers[0].register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])),
        *(
            module.register_forward_hook(lambda _, inputs, y: states.append(y))
            for module in (*llm.layers, llm.norm)
        ),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
