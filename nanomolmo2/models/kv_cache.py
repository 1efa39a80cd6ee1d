"""KVCache: keys and values of the past, written in place."""

from __future__ import annotations

import torch
from torch import Tensor

# Slots; a cache made without a capacity grows by blocks, so that appending stays cheap.
GROWTH = 256


class KVCache:
    """Keys and values of every layer, plus which slots hold real tokens.

    Rows may be padded on either side: ``key_mask`` remembers it, and ``positions`` counts the real
    tokens of each row, so the next token's rotary position is right for every row.

    Args:
        num_layers: decoder layers.
        capacity: slots to allocate at the first write; it grows when more are needed.
    """

    def __init__(self, num_layers: int, capacity: int = 0) -> None:
        self.capacity = capacity
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
            grown = new.new_empty(B, K, slots, Dh)
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
