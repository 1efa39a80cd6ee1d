"""The one attention call and the masks.

B batch, T queries, S keys, H heads, K key/value heads, G = H / K, Dh head width. A boolean mask:
True = see.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomolmo2.batch import PACK_SUBSEGMENT, PREFIX_SUBSEGMENT

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Mask: TypeAlias = "Tensor | BlockMask | None"

# Up to so many queries the group of query heads is folded into the query length. Measured on 793
# keys, against enable_gqa: in float32 0.65 of its time at 2 queries, 0.85 at 8; in bfloat16 0.15 at
# 1, 0.6 at 2; 0.95 at 16, no gain at 64.
FOLDED_QUERIES = 16


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, causal: bool = False) -> Tensor:
    """Scaled dot-product attention with grouped key/value heads.

    Args:
        q: (B, H, T, Dh).
        k, v: (B, K, S, Dh), H a multiple of K; of another dtype where a cache keeps them in 16 bit.
        mask: (B or 1, 1, T, S) bool or additive, a FlexAttention block mask, or None.
        causal: query t sees keys 0..t; only where T == S and mask is None.
    Returns: (B, H, T, Dh).
    """
    B, H, T, Dh = q.shape
    K = k.shape[1]
    if q.dtype != k.dtype:
        return attend(q.to(k.dtype), k, v, mask, causal).to(q.dtype)
    if mask is not None and not isinstance(mask, Tensor):
        from torch.nn.attention.flex_attention import flex_attention

        mixed = flex_attention(q, k, v, block_mask=mask, enable_gqa=H != K)
        assert isinstance(mixed, Tensor)
        return mixed
    if H == K:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    if T <= FOLDED_QUERIES and not (causal and T > 1):
        # The query heads of a group become more queries of their key/value head: (B, K, G * T, Dh),
        # so keys and values are read once a group, and nothing of the past is repeated or copied.
        G = H // K
        folded = q.reshape(B, K, G * T, Dh)
        if mask is not None and T > 1:
            mask = mask.repeat(1, 1, G, 1)
        return F.scaled_dot_product_attention(folded, k, v, attn_mask=mask).reshape(B, H, T, Dh)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
    )


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """(T, S): the T queries are the last of S positions and see everything up to themselves."""
    queries = torch.arange(S - T, S, device=device)[:, None]
    return torch.arange(S, device=device)[None, :] <= queries


def sees(
    q: Tensor,
    k: Tensor,
    image_q: Tensor | None = None,
    image_k: Tensor | None = None,
    subsegment_q: Tensor | None = None,
    subsegment_k: Tensor | None = None,
) -> Tensor:
    """The rule of the mask: may position q attend to position k? Elementwise, with broadcasting.

    see(q, k) = (k <= q or both are image tokens of one example) and sub(q) <= sub(k)

    With prefix 10000, branches 0, 1, ... and 100000 more for every earlier example of a pack, the
    last condition and the causal one together mean: k is in the prefix or the branch of q.

    Args:
        q, k: positions in the row, int.
        image_q, image_k: whether they hold image tokens, bool; None = no image token sees ahead.
        subsegment_q, subsegment_k: their subsegments, int; None = one sequence, one example.
    Source: Molmo2, mask of the released models, "Message Trees" and "Packing"
    (olmo/models/molmo2/molmo2.py, olmo/data/dynamic_packer.py).
    """
    see = k <= q
    if image_q is not None and image_k is not None:
        both = image_q & image_k
        if subsegment_q is not None and subsegment_k is not None:
            # Else the pictures of packed examples would see each other.
            both = both & (subsegment_q // PACK_SUBSEGMENT == subsegment_k // PACK_SUBSEGMENT)
        see = see | both
    if subsegment_q is not None and subsegment_k is not None:
        see = see & (subsegment_q <= subsegment_k)
    return see


def sequence_mask(
    length: int,
    *,
    key_mask: Tensor | None = None,
    image_tokens: Tensor | None = None,
    subsegment_ids: Tensor | None = None,
    device: torch.device,
) -> Tensor:
    """The dense mask of whole sequences: `sees`, and no padding among the keys.

    Every query also sees itself, so that padding has something to attend to and no softmax is
    empty.

    Args:
        length: T.
        key_mask: (B, T) bool, False = padding.
        image_tokens: (B, T) bool.
        subsegment_ids: (B, T) int.
    Returns: (B or 1, 1, T, T) bool.
    """

    def pair(values: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if values is None else (values[:, :, None], values[:, None, :])

    positions = torch.arange(length, device=device)[None]
    q, k = positions[:, :, None], positions[:, None, :]
    mask = sees(q, k, *pair(image_tokens), *pair(subsegment_ids))
    if key_mask is not None:
        mask = mask & key_mask[:, None, :]
    return (mask | torch.eye(length, dtype=torch.bool, device=device))[:, None]


def block_mask(
    length: int,
    *,
    key_mask: Tensor | None = None,
    image_tokens: Tensor | None = None,
    subsegment_ids: Tensor | None = None,
    device: torch.device,
) -> BlockMask:
    """The mask of `sequence_mask` as FlexAttention takes it: never T x T numbers in memory.

    `attend` and LanguageModel take it in place of the dense one. Compile FlexAttention to gain by
    it; without a compiler torch computes the same densely.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        def pair(values: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            return (None, None) if values is None else (values[b, q], values[b, k])

        see = sees(q, k, *pair(image_tokens), *pair(subsegment_ids))
        if key_mask is not None:
            see = see & key_mask[b, k]
        return see | (q == k)

    given = [x for x in (key_mask, image_tokens, subsegment_ids) if x is not None]
    rows = given[0].shape[0] if given else 1
    mask: BlockMask = create_block_mask(mask_mod, rows, None, length, length, device=str(device))
    return mask


def tree_positions(subsegment_ids: Tensor) -> Tensor:
    """(B, T) subsegments of message trees, packed or not -> (B, T) rotary positions.

    In every example the prefix has positions 0 .. P-1 and each branch starts again at P; padding
    (subsegment -1) gets 0.
    """
    index = torch.arange(subsegment_ids.shape[1], device=subsegment_ids.device).expand_as(
        subsegment_ids
    )
    begins = torch.ones_like(subsegment_ids, dtype=torch.bool)
    begins[:, 1:] = subsegment_ids[:, 1:] != subsegment_ids[:, :-1]
    start = (index * begins).cummax(dim=1).values  # of the run that a token belongs to
    example = subsegment_ids.clamp(min=0) // PACK_SUBSEGMENT
    in_prefix = (subsegment_ids % PACK_SUBSEGMENT == PREFIX_SUBSEGMENT) & (subsegment_ids >= 0)
    counts = torch.zeros(
        len(example), int(example.max()) + 1, dtype=torch.long, device=index.device
    )
    lengths = counts.scatter_add(1, example, in_prefix.long())  # (B, examples)
    prefix = lengths.gather(1, example)  # P of a token's example
    positions = index - start + prefix.masked_fill(in_prefix, 0)
    return positions.masked_fill(subsegment_ids < 0, 0)
