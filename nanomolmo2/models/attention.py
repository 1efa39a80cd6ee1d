"""The attention call, and who may attend to whom.

B rows, T queries, S keys, H heads, K key/value heads, Dh head width. In a boolean mask True means
that the query may attend to the key.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomolmo2.batch import PACK_SUBSEGMENT, PREFIX_SUBSEGMENT


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Scaled dot-product attention; each key/value head serves a group of query heads.

    Args:
        q: (B, H, T, Dh). k, v: (B, K, S, Dh), H a multiple of K.
        mask: (B or 1, 1, T, S) bool, or floats that are added to the scores.
        causal: query t attends to keys 0..t; only without a mask.
    Returns: (B, H, T, Dh).
    """
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )


class Cache(Protocol):
    """Takes the place of :func:`attend` in every decoder layer: it adds keys and values of earlier
    positions (generation/kv_cache.py), or computes the same otherwise (accelerate/)."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, T, Dh) attends to k, v (B, K, T, Dh) and what came before -> (B, H, T, Dh)."""
        ...


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """(T, S): the T queries are the last of S positions and attend to all up to themselves."""
    queries = torch.arange(S - T, S, device=device)[:, None]
    return torch.arange(S, device=device)[None, :] <= queries


def may_attend(
    q: Tensor,
    k: Tensor,
    image_q: Tensor | None = None,
    image_k: Tensor | None = None,
    subsegment_q: Tensor | None = None,
    subsegment_k: Tensor | None = None,
) -> Tensor:
    """The rule of the mask: may position q attend to position k? Elementwise, with broadcasting.

        (k <= q or both are image tokens of one example) and subsegment(q) <= subsegment(k)

    The prefix of a message tree has subsegment 10000 and its branches 0, 1, ...; every earlier
    example of a pack adds 100000. The second condition and causality together then say that k is in
    the prefix or in the branch of q.

    Args:
        q, k: positions in the row, int.
        image_q, image_k: whether they hold image tokens, bool; None = no token looks ahead.
        subsegment_q, subsegment_k: their subsegments, int; None = one sequence, one example.
    Source: Molmo2, mask of the released models, "Message Trees" and "Packing"
    (olmo/models/molmo2/molmo2.py, olmo/data/dynamic_packer.py).
    """
    allowed = k <= q
    if image_q is not None and image_k is not None:
        both = image_q & image_k
        if subsegment_q is not None and subsegment_k is not None:
            # Else the images of packed examples would attend to each other.
            both = both & (subsegment_q // PACK_SUBSEGMENT == subsegment_k // PACK_SUBSEGMENT)
        allowed = allowed | both
    if subsegment_q is not None and subsegment_k is not None:
        allowed = allowed & (subsegment_q <= subsegment_k)
    return allowed


def sequence_mask(
    length: int,
    *,
    key_mask: Tensor | None = None,
    image_tokens: Tensor | None = None,
    subsegment_ids: Tensor | None = None,
    device: torch.device,
    queries: slice = slice(None),
) -> Tensor:
    """The dense mask of whole sequences: :func:`may_attend`, and no padding among the keys.

    Every query also attends to itself, so that no softmax of a padding query is empty.

    Args:
        length: S. key_mask: (B, S) bool, False = padding. image_tokens: (B, S) bool.
        subsegment_ids: (B, S) int. queries: which of the S positions are queries; all by default.
    Returns: (B or 1, 1, T, S) bool.
    """

    def pair(values: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if values is None else (values[:, queries, None], values[:, None, :])

    positions = torch.arange(length, device=device)[None]
    q, k = positions[:, queries, None], positions[:, None, :]
    mask = may_attend(q, k, *pair(image_tokens), *pair(subsegment_ids))
    if key_mask is not None:
        mask = mask & key_mask[:, None, :]
    return (mask | (q == k))[:, None]


def tree_positions(subsegment_ids: Tensor) -> Tensor:
    """(B, T) subsegments of message trees, packed or not -> (B, T) rotary positions.

    In every example the prefix has positions 0 .. P-1 and each branch starts again at P; padding
    (subsegment -1) gets 0.
    """
    B, T = subsegment_ids.shape
    index = torch.arange(T, device=subsegment_ids.device).expand(B, T)
    begins = torch.ones_like(subsegment_ids, dtype=torch.bool)
    begins[:, 1:] = subsegment_ids[:, 1:] != subsegment_ids[:, :-1]
    start = (index * begins).cummax(dim=1).values  # of the run that a token belongs to
    example = subsegment_ids.clamp(min=0) // PACK_SUBSEGMENT  # below T: each has a token or more
    in_prefix = (subsegment_ids % PACK_SUBSEGMENT == PREFIX_SUBSEGMENT) & (subsegment_ids >= 0)
    counts = torch.zeros_like(subsegment_ids)
    lengths = counts.scatter_add(1, example, in_prefix.to(counts.dtype))  # of every prefix
    prefix = lengths.gather(1, example)  # P of a token's example
    positions = index - start + prefix.masked_fill(in_prefix, 0)
    return positions.masked_fill(subsegment_ids < 0, 0)
