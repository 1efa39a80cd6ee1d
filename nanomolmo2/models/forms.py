"""The forms that inputs come in, and the checks of their values: for face.py.

B rows, L tokens a row, T new positions, S all positions, I images, n visual tokens of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomolmo2.batch import IGNORED_LABEL, Batch

if TYPE_CHECKING:
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
        check_labels(batch.labels, config.llm_config.vocab_size)
    image_tokens = int((batch.input_ids == config.image_token_id).sum())
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
    return batch


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
