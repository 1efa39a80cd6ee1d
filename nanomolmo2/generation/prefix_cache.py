"""PrefixCache: what was computed for the beginning of a prompt is not computed again.

Keys and values of a position depend on the positions before it alone, so they are found by content:
every position has a number, the token's id or, where an image is, a hash of its pixels and the
place in it. Which prompts share a beginning, the second question about an image or the next turn of
a chat, then shows by comparing numbers.

Where image tokens see each other in both directions, a position also depends on those it sees ahead
of it. ``lookahead`` is how far that goes; a beginning can be reused only if it reaches that far.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nanomolmo2.generation.kv_cache import RowCache

Keys = NDArray[np.int64]

Encoded = TypeVar("Encoded", Tensor, tuple[Tensor, ...])

DEFAULT_BYTES = 1 << 30
# Free slots that an entry may keep, as a share of its size; more are cut off by a copy.
_SLACK = 0.25


@dataclass
class Prefix:
    """Keys and values of a sequence that begins a row's life, or did."""

    keys: Keys  # (T,), a number of every position
    lookahead: int  # no position sees ahead of itself from here on, nor further than this
    row: RowCache
    point_keys: Tensor | None = None  # (k, E) of its first visual tokens, where points select them

    @property
    def nbytes(self) -> int:
        """Bytes of all that it keeps."""
        return self.row.nbytes + (0 if self.point_keys is None else self.point_keys.nbytes)

    def shared(self, keys: Keys, lookahead: int) -> int:
        """Positions that a prompt can take from here."""
        n, least = min(len(self.keys), len(keys), self.row.length), max(self.lookahead, lookahead)
        # Of thousands, most are of other images: one number tells, the last of those.
        if n < least or (least and self.keys[least - 1] != keys[least - 1]):
            return 0
        unequal = np.flatnonzero(self.keys[:n] != keys[:n])
        n = int(unequal[0]) if len(unequal) else n
        return n if n >= least else 0


class PrefixCache:
    """Keys and values, and visual tokens, of recent prompts: the least recently used go first.

    For one model, whose threads may share it. When the model's weights change (an optimiser's step,
    another precision, other tensors), everything is forgotten by itself; a change that PyTorch does
    not count, such as through ``.data``, needs :meth:`clear`.

    Attributes:
        max_bytes: most bytes of everything held.
        nbytes: bytes held now.
        reused_tokens: positions that were not computed again, since it was made.
        reused_images: images that were not encoded again, likewise.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be 0 (keeps nothing) or more, found {max_bytes}")
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.reused_tokens = 0
        self.reused_images = 0
        self._entries: OrderedDict[Any, tuple[Any, int]] = OrderedDict()  # key -> value, bytes
        self._stamps: dict[str, int] = {}
        self._lock = threading.RLock()  # of all that changes; nothing is computed under it

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self.nbytes = 0

    def check(self, part: str, module: nn.Module) -> None:
        """Forget everything if the weights of ``part`` are not those of the last call."""
        weights = (*module.parameters(), *module.buffers())
        stamp = hash(
            (id(module), *((w.data_ptr(), w._version, w.dtype, w.device) for w in weights))
        )
        with self._lock:
            if self._stamps.setdefault(part, stamp) != stamp:
                self.clear()
                self._stamps[part] = stamp

    def find(self, keys: Keys, lookahead: int, others: Iterable[Prefix] = ()) -> tuple[Prefix, int]:
        """The longest reusable beginning of a prompt, and its length; 0 if there is none.

        Args:
            keys: (T,) of the prompt; at least its last position is always left to compute.
            others: prefixes that are held elsewhere, of rows that still run.
        """
        best, most = Prefix(keys[:0], 0, RowCache(0)), 0
        found: Any = None
        for key, prefix in (*self._prefixes(), *((None, p) for p in others)):
            shared = min(prefix.shared(keys, lookahead), len(keys) - 1)
            if shared > most and shared >= max(lookahead, prefix.lookahead):
                best, most, found = prefix, shared, key
        with self._lock:
            self._touch(found)
            self.reused_tokens += most
        return best, most

    def keep(self, prefix: Prefix) -> None:
        """Hold a sequence that ended; it must not be written to any more."""
        length = prefix.row.length
        if not length or length < prefix.lookahead:
            return
        keys = prefix.keys[:length]
        row = prefix.row
        if row.capacity > (1 + _SLACK) * length:
            row = row.fork(length)
        with self._lock:
            for key, held in self._prefixes():
                n = min(len(held.keys), length)
                last = (prefix.lookahead or n) - 1
                if held.lookahead != prefix.lookahead or held.keys[last] != keys[last]:
                    continue  # as in `Prefix.shared`
                if np.array_equal(held.keys[:n], keys[:n]):
                    if len(held.keys) >= length:
                        self._touch(key)
                        return  # it is the beginning of one that is held
                    self._drop(key)  # the other way round
            kept = replace(prefix, keys=keys, row=row)
            self._put(object(), kept, kept.nbytes)

    def visual_tokens(
        self, digests: Sequence[str], encode: Callable[[list[int]], Iterable[Encoded]]
    ) -> list[Encoded]:
        """Features of images, encoded together where they are new.

        Args:
            digests: of each image.
            encode: gives the features of those with these numbers, each a tensor or several.
        """
        features: dict[str, Encoded] = {}
        with self._lock:
            for name in digests:
                if name in self._entries:
                    self._touch(name)
                    features[name] = self._entries[name][0]
            self.reused_images += sum(name in features for name in digests)
        new = {name: i for i, name in enumerate(digests) if name not in features}
        if new:
            for name, encoded in zip(new, encode(list(new.values())), strict=True):
                given = encoded if isinstance(encoded, tuple) else (encoded,)
                parts = tuple(part.detach().clone() for part in given)
                features[name] = parts if isinstance(encoded, tuple) else parts[0]
                with self._lock:
                    self._put(name, features[name], sum(part.nbytes for part in parts))
        return [features[name] for name in digests]

    # ---- the entries: call these with the lock ----

    def _prefixes(self) -> list[tuple[Any, Prefix]]:
        with self._lock:
            return [(k, v) for k, (v, _) in self._entries.items() if isinstance(v, Prefix)]

    def _touch(self, key: Any) -> None:
        """It was used just now; another thread may have dropped it meanwhile."""
        if key in self._entries:
            self._entries.move_to_end(key)

    def _put(self, key: Any, value: Any, nbytes: int) -> None:
        if nbytes > self.max_bytes:
            return
        if key in self._entries:  # two threads encoded one image
            self._drop(key)
        self._entries[key] = value, nbytes
        self.nbytes += nbytes
        while self.nbytes > self.max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: Any) -> None:
        self.nbytes -= self._entries.pop(key)[1]


def digest(*parts: Tensor | NDArray[Any]) -> str:
    """Of contents, shapes and types."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        hashed.update(f"{tuple(part.shape)} {part.dtype};".encode())
        if isinstance(part, Tensor):
            part = part.detach().cpu().contiguous().view(torch.uint8).numpy()
        hashed.update(np.ascontiguousarray(part).data)
    return hashed.hexdigest()


def visual_keys(digests: Sequence[str], images: NDArray[np.int64], offsets: Keys) -> Keys:
    """A negative number for every visual token: the same for the same place in the same image.

    Args:
        digests: of every image, or crop.
        images: (n, K) number of the image that each of a token's K patches comes from, -1 = none.
        offsets: (n, K) place of the patch in it.
    Returns: (n,).
    """
    halves = np.array([int(digest[:16], 16) for digest in digests] + [0], dtype=np.uint64)
    keys = np.zeros(len(images), dtype=np.uint64)
    for hashes, places in zip(halves[images].T, offsets.T, strict=True):
        keys = _mixed(keys ^ _mixed(hashes + _mixed(places.astype(np.uint64))))
    return -1 - (keys >> np.uint64(1)).astype(np.int64)


def point_key(visual: int, *places: int) -> int:
    """A negative number for a part of a point: the same for the same place in the same image.

    Args:
        visual: number of the visual token that was selected. places: in it.
    """
    content = b"point" + b"".join(n.to_bytes(8, "little", signed=True) for n in (visual, *places))
    hashed = hashlib.blake2b(content, digest_size=8).digest()
    return -1 - (int.from_bytes(hashed, "little") >> 1)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spreads every bit over all: the end of splitmix64 (Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def lookahead_of(mask: Tensor | None) -> int:
    """How far positions of a (T, T) mask see ahead: the last that an earlier one sees, plus 1."""
    if mask is None:
        return 0
    ahead = mask.triu(1).any(dim=0).nonzero()
    return int(ahead[-1]) + 1 if len(ahead) else 0
