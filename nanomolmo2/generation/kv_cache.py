"""Keys and values of the past, written in place.

KVCache and PaddedStep: a batch of one length, padded. RowCache and RaggedStep: rows of their own
lengths, which join and leave between steps. A step is what one call of the decoder gets as its
cache (`nanomolmo2.models.attention.Cache`). B rows, T new positions, S all positions, N new
positions of all rows, H heads, K key/value heads, Dh head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanomolmo2.models import attention
from nanomolmo2.models.attention import causal_mask

# Up to so many queries the group of query heads is folded into the query length. Measured on 793
# keys, against enable_gqa: in float32 0.65 of its time at 2 queries, 0.85 at 8; in bfloat16 0.15 at
# 1, 0.6 at 2; 0.95 at 16, no gain at 64.
FOLDED_QUERIES = 16


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """:func:`nanomolmo2.models.attention.attend` for few queries and many keys.

    The keys may have another dtype, where a cache keeps them in 16 bit.
    """
    B, H, T, Dh = q.shape
    K = k.shape[1]
    if q.dtype != k.dtype:
        return attend(q.to(k.dtype), k, v, mask, causal).to(q.dtype)
    if H == K or T > FOLDED_QUERIES or (causal and T > 1):
        return attention.attend(q, k, v, mask, causal)
    # The query heads of a group become more queries of their key/value head: (B, K, G * T, Dh), so
    # keys and values are read once a group, and nothing of the past is repeated or copied.
    G = H // K
    folded = q.reshape(B, K, G * T, Dh)
    if mask is not None and T > 1:
        mask = mask.repeat(1, 1, G, 1)
    return attention.attend(folded, k, v, mask).reshape(B, H, T, Dh)


# Slots; a cache made without a capacity grows by blocks, so that appending stays cheap.
GROWTH = 256


class KVCache:
    """Keys and values of every layer, plus which slots hold real tokens.

    Rows may be padded on either side: ``key_mask`` remembers it, and ``positions`` counts the real
    tokens of each row, so the next token's rotary position is right for every row.

    Args:
        num_layers: decoder layers.
        capacity: slots to allocate at the first write; it grows when more are needed.
        dtype: of what is kept; None = of what is written.
    """

    def __init__(
        self, num_layers: int, capacity: int = 0, dtype: torch.dtype | None = None
    ) -> None:
        self.capacity = capacity
        self.dtype = dtype
        self.length = 0  # slots written, padding included
        self.key_mask: Tensor | None = None  # (B, length) bool; None = every slot is real
        self.positions: Tensor | None = None  # (B, 1) next position of each row
        self.keys: list[Tensor | None] = [None] * num_layers  # each (B, K, capacity, Dh)
        self.values: list[Tensor | None] = [None] * num_layers

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, K, T, Dh) behind the past of ``layer``; return all (B, K, length + T, Dh).

        ``length`` moves only in :meth:`advance`, after the last layer.
        """
        end = self.length + k.shape[2]
        return self._write(self.keys, layer, k, end), self._write(self.values, layer, v, end)

    def advance(self, tokens: int, key_mask: Tensor | None, positions: Tensor) -> None:
        """Count ``tokens`` new slots; ``key_mask`` covers all slots, ``positions`` is (B, 1)."""
        self.length += tokens
        self.key_mask = key_mask
        self.positions = positions

    def _write(self, store: list[Tensor | None], layer: int, new: Tensor, end: int) -> Tensor:
        buffer = store[layer]
        if buffer is None or buffer.shape[2] < end:
            B, K, _, Dh = new.shape
            slots = self.capacity if end <= self.capacity else -(-end // GROWTH) * GROWTH
            grown = new.new_empty(B, K, slots, Dh, dtype=self.dtype or new.dtype)
            if buffer is not None:
                grown[:, :, : self.length] = buffer[:, :, : self.length]
            store[layer] = buffer = grown
        if torch.is_grad_enabled() and new.requires_grad:
            # In-place writes would break the graph of earlier steps: pay for a copy instead.
            past = buffer[:, :, : self.length]
            store[layer] = joined = torch.cat([past, new], dim=2)
            return joined
        buffer[:, :, self.length : end] = new
        return buffer[:, :, :end]


@dataclass
class PaddedStep:
    """One call over a KVCache: new positions of all rows stand in columns.

    ``mask``: (B or 1, 1, T, S) over all slots; None = causal.
    """

    cache: KVCache
    mask: Tensor | None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k, v (B, K, T, Dh) and attend: q (B, H, T, Dh) -> (B, H, T, Dh).

        q may have fewer positions than k: the last ones.
        """
        T = q.shape[2]
        mask = None if self.mask is None else self.mask[:, :, -T:]
        causal = mask is None and T > 1
        return attend(q, *self.cache.update(layer, k, v), mask, causal)


# Slots; a row in fixed blocks attends to whole blocks of them, and its cache holds whole blocks.
KEY_BLOCK = 64
# Queries of a block; divides KEY_BLOCK.
QUERY_BLOCK = 16


class RowCache:
    """Keys and values of one row: every slot is a real token, slot 0 the first.

    Attributes:
        length: slots written.
        layers: (keys, values) of every layer, each (1, K, capacity, Dh); None before the first
            write.
    """

    def __init__(
        self, num_layers: int, capacity: int = 0, dtype: torch.dtype | None = None
    ) -> None:
        """
        Args:
            capacity: slots to allocate at the first write; it grows when more are needed.
            dtype: of what is kept; None = of what is written.
        """
        self.length = 0
        self.dtype = dtype
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        self._capacity = capacity

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (1, K, T, Dh) behind the past; return the buffers (1, K, capacity, Dh).

        ``length`` does not move: it counts once for all layers.
        """
        end = self.length + k.shape[2]
        held = self.layers[layer]
        if held is None or held[0].shape[2] < end:
            held = self.layers[layer] = self._grown(held, k, max(end, self._capacity))
        for buffer, new in zip(held, (k, v), strict=True):
            buffer[:, :, self.length : end] = new
        return held

    def truncate(self, length: int) -> None:
        """Forget everything behind the first ``length`` slots."""
        if not 0 <= length <= self.length:
            raise ValueError(f"{length} slots are to be kept, but {self.length} are written")
        self.length = length

    def fork(self, length: int, capacity: int = 0) -> RowCache:
        """A row of its own that begins with a copy of the first ``length`` slots."""
        row = RowCache(len(self.layers), max(length, capacity), self.dtype)
        for i, held in enumerate(self.layers):
            if held is not None and length:
                row.write(i, held[0][:, :, :length], held[1][:, :, :length])
        row.length = length
        return row

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, free slots included."""
        return sum(2 * held[0].nbytes for held in self.layers if held is not None)

    @property
    def capacity(self) -> int:
        """Slots of the buffers."""
        return next((held[0].shape[2] for held in self.layers if held is not None), 0)

    def _grown(
        self, held: tuple[Tensor, Tensor] | None, like: Tensor, slots: int
    ) -> tuple[Tensor, Tensor]:
        """Buffers of at least ``slots`` slots that hold the past; unwritten slots are zero."""
        if held is not None:
            slots = max(slots, held[0].shape[2] + GROWTH)
        slots = -(-slots // KEY_BLOCK) * KEY_BLOCK
        _, K, _, Dh = like.shape
        dtype = self.dtype or like.dtype
        grown = tuple(like.new_zeros(1, K, slots, Dh, dtype=dtype) for _ in range(2))
        if held is not None:
            for new, old in zip(grown, held, strict=True):
                new[:, :, : self.length] = old[:, :, : self.length]
        return grown[0], grown[1]


class RaggedStep:
    """One step of several rows, each with its own past: takes the place of a KVCache.

    The N new positions of all rows stand behind one another in a single row (1, N, D): linear
    layers see no padding. Attention runs row by row over the row's own keys, so no row depends on
    another.

    Args:
        rows: the caches, one a row.
        counts: new positions of every row, N together.
        mask: (T, S) bool, True = see, of the only row, where it is more than causal.
        fixed_blocks: attend in blocks of one size at fixed slots, so that a query's result has the
            same bits however many positions its step has.
    """

    def __init__(
        self,
        rows: Sequence[RowCache],
        counts: Sequence[int],
        *,
        mask: Tensor | None = None,
        fixed_blocks: bool = False,
    ) -> None:
        self.rows = list(rows)
        self.counts = list(counts)
        self.mask = mask
        self.fixed_blocks = fixed_blocks
        self.longest = max(r.length + n for r, n in zip(rows, counts, strict=True))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k, v (1, K, N, Dh) and attend: q (1, H, N, Dh) -> (1, H, N, Dh).

        A step of one row may have fewer queries than keys: those of its last positions.
        """
        if len(self.rows) == 1:
            return self._attend_row(self.rows[0], layer, q, k, v)
        pieces = (x.split(self.counts, dim=2) for x in (q, k, v))
        mixed = [
            self._attend_row(row, layer, *piece)
            for row, *piece in zip(self.rows, *pieces, strict=True)
        ]
        return torch.cat(mixed, dim=2)

    def advance(self) -> None:
        """Count the new positions, after the last layer."""
        for row, count in zip(self.rows, self.counts, strict=True):
            row.length += count

    def _attend_row(self, row: RowCache, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T, S = q.shape[2], row.length + k.shape[2]
        past = S - T
        keys, values = row.write(layer, k, v)
        mask = None if self.mask is None else self.mask[-T:]
        if self.fixed_blocks:
            return _attend_in_blocks(q, keys, values, past, mask)
        if mask is None and past and T > 1:
            mask = causal_mask(T, S, q.device)
        return attend(
            q,
            keys[:, :, :S],
            values[:, :, :S],
            None if mask is None else mask[None, None],
            causal=mask is None and T > 1,
        )


def _attend_in_blocks(
    q: Tensor, keys: Tensor, values: Tensor, past: int, mask: Tensor | None
) -> Tensor:
    """Attention whose bits depend on a query's slot, its keys and nothing else.

    Queries are cut where their slot is a multiple of QUERY_BLOCK and each keeps its place in its
    block, the rest of which is zeros; keys are whole blocks of slots, the unseen ones masked. So
    the kernel gets the same shapes for a query, whether it comes alone or with the whole prompt.
    """
    T = q.shape[2]
    mixed = []
    for begin in range(past - past % QUERY_BLOCK, past + T, QUERY_BLOCK):
        first, last = max(begin, past), min(begin + QUERY_BLOCK, past + T)  # slots of this block
        inside = slice(first - begin, last - begin)
        if mask is None:
            see = causal_mask(last - first, last, q.device)
        else:
            see = mask[first - past : last - past]
            seen = see.any(dim=0).nonzero()
            see = see[:, : int(seen[-1]) + 1]
        limit = -(-max(see.shape[1], begin + QUERY_BLOCK) // KEY_BLOCK) * KEY_BLOCK
        block = q.new_zeros(1, q.shape[1], QUERY_BLOCK, q.shape[3])
        block[:, :, inside] = q[:, :, first - past : last - past]
        see_block = see.new_zeros(QUERY_BLOCK, limit)
        see_block[:, 0] = True  # no softmax over nothing where there is no query
        see_block[inside, 0] = False
        see_block[inside, : see.shape[1]] = see
        y = attend(block, keys[:, :, :limit], values[:, :, :limit], see_block[None, None])
        mixed.append(y[:, :, inside])
    return torch.cat(mixed, dim=2)
