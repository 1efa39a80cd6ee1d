"""The one attention call and the masks.

B batch, T queries, S keys, H heads, K key/value heads, Dh head width. A boolean mask: True = see.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Scaled dot-product attention with grouped key/value heads.

    Args:
        q: (B, H, T, Dh).
        k, v: (B, K, S, Dh), H a multiple of K.
        mask: (B or 1, 1, T, S) bool, or None.
        causal: query t sees keys 0..t; only where T == S and mask is None.
    Returns: (B, H, T, Dh).
    """
    B, H, T, Dh = q.shape
    K = k.shape[1]
    if H == K:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    if T == 1:
        # One query a head: the group becomes the query length, so no key is repeated or copied.
        grouped = q.reshape(B, K, H // K, Dh)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(B, H, 1, Dh)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
    )


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """(T, S): the T queries are the last of S positions and see everything up to themselves."""
    queries = torch.arange(S - T, S, device=device)[:, None]
    return torch.arange(S, device=device)[None, :] <= queries


def sequence_mask(
    length: int,
    *,
    key_mask: Tensor | None = None,
    image_tokens: Tensor | None = None,
    subsegment_ids: Tensor | None = None,
    device: torch.device,
) -> Tensor:
    """The mask of whole sequences: causal, plus what a picture and a message tree add.

    see(q, k) = (k <= q or both are image tokens) and sub(q) <= sub(k) and k is no padding; every
    query also sees itself, so that padding has something to attend to and no softmax is empty.

    Args:
        length: T.
        key_mask: (B, T) bool, False = padding.
        image_tokens: (B, T) bool; image tokens of a row see each other in both directions.
        subsegment_ids: (B, T) int: prefix 10000, branches 0, 1, ...
    Returns: (B or 1, 1, T, T) bool.
    Source: Molmo2, mask of the released models and "Message Trees" (olmo/models/molmo2/molmo2.py).
    """
    mask = causal_mask(length, length, device)[None]
    if image_tokens is not None:
        mask = mask | (image_tokens[:, :, None] & image_tokens[:, None, :])
    if subsegment_ids is not None:
        mask = mask & (subsegment_ids[:, :, None] <= subsegment_ids[:, None, :])
    if key_mask is not None:
        mask = mask & key_mask[:, None, :]
    return (mask | torch.eye(length, dtype=torch.bool, device=device))[:, None]
