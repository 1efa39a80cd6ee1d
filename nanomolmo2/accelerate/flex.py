"""Long rows: the rule of the mask without a mask of T x T numbers in memory.

A dense mask of 36,864 positions has 1.36 GB, and attention makes floats of it. Here the rule is
evaluated block by block: by FlexAttention where it can be compiled, else for some queries at a
time.

B rows, T positions, H heads, K key/value heads, Dh head width.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanomolmo2.accelerate.swap import swap
from nanomolmo2.batch import Batch
from nanomolmo2.models.attention import Cache, attend, may_attend, sequence_mask
from nanomolmo2.models.face import NanoMolmo2
from nanomolmo2.models.nanomolmo2 import positions

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Model = TypeVar("Model", bound=nn.Module)

DENSE_LENGTH = 8192  # positions up to which a dense mask is sensible: 67 MB a row
QUERY_BLOCK = 512  # queries at a time where FlexAttention is not compiled


def block_masks(model: Model) -> Model:
    """Let rows of more than `DENSE_LENGTH` positions do without a dense mask.

    Swaps `NanoMolmo2` for `LongRowNanoMolmo2`.
    """
    return swap(model, {NanoMolmo2: LongRowNanoMolmo2})


class LongRowNanoMolmo2(NanoMolmo2):
    """`NanoMolmo2` whose long rows attend block by block."""

    dense_length = DENSE_LENGTH

    def states(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        parts, T = self.mask_parts(batch), batch.input_ids.shape[1]
        if cache is not None or self.dense_length >= T or all(p is None for p in parts.values()):
            return super().states(batch, cache)
        whole = whole_sequence(T, **parts, device=batch.input_ids.device)
        return self.llm.states(self.embed(batch), positions(batch), None, whole)


class WholeSequence(ABC):
    """Attention over whole sequences in place of the layers' own; it remembers nothing."""

    @abstractmethod
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, T, Dh), k and v (B, K, T, Dh) -> (B, H, T, Dh)."""


def whole_sequence(length: int, *, device: torch.device, **parts: Tensor | None) -> WholeSequence:
    """The attention of a sequence whose mask follows from ``parts``, see `sequence_mask`."""
    if device.type == "cuda":
        return FlexAttention(block_mask(length, **parts, device=device))
    return QueryBlocks(length, parts)


class FlexAttention(WholeSequence):
    """By torch's FlexAttention, compiled on CUDA. Elsewhere torch computes the same densely."""

    def __init__(self, mask: BlockMask) -> None:
        self.mask = mask

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        flex = _flex_attention(q.device.type == "cuda")
        y: Tensor = flex(q, k, v, block_mask=self.mask, enable_gqa=grouped)
        return y


@functools.cache
def _flex_attention(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    run: Callable[..., Any] = flex_attention
    return torch.compile(run, dynamic=False) if compiled else run


class QueryBlocks(WholeSequence):
    """Some queries at a time, each block with its part of the dense mask, which is not kept."""

    def __init__(self, length: int, parts: dict[str, Tensor | None]) -> None:
        self.length, self.parts = length, parts

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = []
        for start in range(0, self.length, QUERY_BLOCK):
            queries = slice(start, min(start + QUERY_BLOCK, self.length))
            if torch.is_grad_enabled():
                y = checkpoint(self._block, q[:, :, queries], k, v, queries, use_reentrant=False)
            else:
                y = self._block(q[:, :, queries], k, v, queries)
            blocks.append(y)
        return torch.cat(blocks, dim=2)

    def _block(self, q: Tensor, k: Tensor, v: Tensor, queries: slice) -> Tensor:
        mask = sequence_mask(self.length, **self.parts, queries=queries, device=q.device)
        return attend(q, k, v, mask)


def block_mask(
    length: int,
    *,
    key_mask: Tensor | None = None,
    image_tokens: Tensor | None = None,
    subsegment_ids: Tensor | None = None,
    device: torch.device,
) -> BlockMask:
    """The mask of `sequence_mask` as FlexAttention takes it: never T x T numbers in memory.

    `LanguageModel` takes it in place of the dense one.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        def pair(values: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            return (None, None) if values is None else (values[b, q], values[b, k])

        allowed = may_attend(q, k, *pair(image_tokens), *pair(subsegment_ids))
        if key_mask is not None:
            allowed = allowed & key_mask[b, k]
        return allowed | (q == k)

    given = [x for x in (key_mask, image_tokens, subsegment_ids) if x is not None]
    rows = given[0].shape[0] if given else 1
    mask: BlockMask = create_block_mask(mask_mod, rows, None, length, length, device=str(device))
    return mask
