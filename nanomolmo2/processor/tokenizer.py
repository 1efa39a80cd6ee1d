"""Tokenizer: text <-> ids over a ``tokenizer.json``, with special tokens kept apart from text.

What a person writes is *text*: a question that holds ``<|im_end|>`` must not end its own turn. What
the chat format writes is *control*. The two have their own methods:

    encode_text("a<|im_end|>")     -> ids of the characters <, |, im, ... ; never a special token
    encode_control("<|im_end|>\\n") -> the special token's id, then the ids of the text between
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import AddedToken

from nanomolmo2.files import atomic_path
from nanomolmo2.processor.tokenizer_file import is_library_failure, read_backend

# What Molmo2 adds behind Qwen3's vocabulary, in order of their ids from vocab_size on.
MOLMO2_TOKENS = (
    "<im_start>",
    "<im_end>",
    "<im_patch>",
    "<im_col>",
    "<low_res_im_start>",
    "<|image|>",
    "<im_low>",
    "<frame_start>",
    "<frame_end>",
    "<|video|>",
)
# Of MolmoPoint, behind them: a word of the format that is never written, and the three markers of a
# selection (row, slot, cell).
POINT_MARKERS = ("<|token_index|>", "<|vit_index|>", "<|vit_loc|>")
MOLMO_POINT_TOKENS = (*MOLMO2_TOKENS, "<|points|>", *POINT_MARKERS)
ADDITIONAL_TOKENS = 128  # ids that a released model has behind its base vocabulary
QWEN3_VOCAB_SIZE = 151936  # rows of Qwen3's embedding; its tokens are fewer

_CACHED_TEXTS = 65536  # questions and answers of synthetic data repeat; each is encoded once
MAX_TEXT = 2**20  # characters of one text; none that long fits into a model's context
_CACHED_TEXT_LENGTH = 256  # characters; longer texts hardly repeat


class Tokenizer:
    """The fast ``tokenizers`` library behind two encode methods and a lossless decode."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """
        Args:
            backend: loaded tokenizer; its padding, truncation and special-token handling are set
                here, so it should not be shared.
        Raises: ValueError if a special token is also an ordinary piece of the vocabulary, so that
            text could produce it.
        """
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # "encode them as text", the safe default
        self.backend = backend
        self.special_ids: dict[str, int] = {
            token.content: id
            for id, token in backend.get_added_tokens_decoder().items()
            if token.special
        }
        self._special_token = re.compile(
            # Longest first, so that the longest of several that start here wins.
            "|".join(re.escape(name) for name in sorted(self.special_ids, key=len, reverse=True))
            or "(?!)"
        )
        self._cached_text = lru_cache(maxsize=_CACHED_TEXTS)(self._encode_text)
        self._cached_control = lru_cache(maxsize=_CACHED_TEXTS)(self._encode_control)
        for name, id in self.special_ids.items():
            if id in self._encode_text(name):
                raise ValueError(
                    f"the special token {name!r} is also a piece of the vocabulary, so a user "
                    f"could write it: keep special tokens only among the added tokens"
                )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.backend,)  # for worker processes: without the caches

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Load a ``tokenizer.json``, or the one in a folder.

        Raises: FileNotFoundError; ValueError if the file is not a tokenizer.
        """
        backend = read_backend(path)
        try:
            return cls(backend)
        except ValueError as error:
            raise ValueError(f"the tokenizer {path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write ``tokenizer.json``; complete or not at all."""
        with atomic_path(path) as temporary:
            temporary.write_text(self.backend.to_str(pretty=True), encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, special tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def special_id(self, name: str) -> int:
        """Id of a special token by its text. Raises: ValueError naming those there are."""
        if name not in self.special_ids:
            known = sorted(self.special_ids, key=lambda n: self.special_ids[n])
            shown = ", ".join(repr(n)[1:-1][:40] for n in known[:8]) + (
                ", ..." if len(known) > 8 else ""
            )
            raise ValueError(
                f"the tokenizer has no special token {name!r:.60}; it has {shown or 'none'}: use "
                f"the tokenizer.json that belongs to the model"
            )
        return self.special_ids[name]

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Ids of a text in which nothing is special, not even what looks like a special token.

        Tokens that the vocabulary adds without calling them special (Qwen's ``<think>``) are words
        like others and stay one id.

        Raises: ValueError for more than `MAX_TEXT` characters, and for half a surrogate pair.
        """
        return (
            self._cached_text(text) if len(text) <= _CACHED_TEXT_LENGTH else self._encode_text(text)
        )

    def encode_control(self, text: str) -> tuple[int, ...]:
        """Ids of a string of the chat format: special tokens, longest match first, text between."""
        return self._cached_control(text)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD. Inverse of ``encode_text``."""
        with _explained():
            return str(
                self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)
            )

    def split_control(self, text: str) -> tuple[str, str]:
        """(up to the last special token, plain rest): ``("<|im_start|>", "user\\n")``."""
        end = max((match.end() for match in self._special_token.finditer(text)), default=0)
        return text[:end], text[end:]

    def _encode_text(self, text: str) -> tuple[int, ...]:
        if len(text) > MAX_TEXT:
            raise ValueError(
                f"found a text of {len(text):,} characters, expected at most {MAX_TEXT:,}: no "
                f"model reads so much at once; cut it into pieces"
            )
        try:
            with _explained():
                return tuple(self.backend.encode(text, add_special_tokens=False).ids)
        except TypeError:  # half a surrogate pair, which JSON can hold
            raise ValueError(
                f"found {text[:40]!r}, expected a text of Unicode characters: it has to be encoded "
                f"again from its source"
            ) from None

    def _encode_control(self, text: str) -> tuple[int, ...]:
        ids: list[int] = []
        position = 0
        for match in self._special_token.finditer(text):
            ids.extend(self._encode_text(text[position : match.start()]))
            ids.append(self.special_ids[match[0]])
            position = match.end()
        ids.extend(self._encode_text(text[position:]))
        return tuple(ids)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if not is_library_failure(error):
            raise
        raise ValueError(
            f"the tokenizer fails ({str(error)[:200]}): its tokenizer.json is damaged or not made "
            f"for this text, use the one that belongs to the model"
        ) from None


def molmo2_tokenizer(path: str | Path, *, vocab_size: int | None = None) -> Tokenizer:
    """Load a ``tokenizer.json`` and see to it that it has Molmo2's tokens, at their ids.

    They stand at vocab_size + 0, 1, ...: behind the rows of the language model's embedding, which
    are more than Qwen3 has tokens. So fillers ``|<EXTRA_TOKENS_0>|``, ... come first. A tokenizer
    that has the tokens already is taken as it is.

    Args:
        path: file or folder.
        vocab_size: rows of the base embedding; None: 151936, or what the tokens that are already
            there say.
    Raises: FileNotFoundError; ValueError for a file that is no tokenizer, one with more tokens
        than vocab_size, and one that has Molmo2's tokens in part or at other ids.
    """
    backend = read_backend(path)
    _extend(backend, path, MOLMO2_TOKENS, "Molmo2", vocab_size)
    return Tokenizer(backend)


def molmo_point_tokenizer(
    path: str | Path, *, vocab_size: int | None = None, additional: int = ADDITIONAL_TOKENS
) -> Tokenizer:
    """As `molmo2_tokenizer`, and with the markers of MolmoPoint behind Molmo2's tokens.

    Fillers ``<EXTRA_TOKENS_POINT_0>``, ... follow up to ``additional`` tokens behind vocab_size, so
    that the first id that is no token is V, the id of the first class of a point.

    Raises: as `molmo2_tokenizer`.
    """
    backend = read_backend(path)
    known = backend.get_vocab(with_added_tokens=True)
    if all(name in known for name in MOLMO2_TOKENS) and not any(
        name in known for name in MOLMO_POINT_TOKENS[len(MOLMO2_TOKENS) :]
    ):
        _extend(backend, path, MOLMO2_TOKENS, "Molmo2", vocab_size)
        if max(known.values()) == known[MOLMO2_TOKENS[-1]]:  # nothing stands where the markers do
            _add(backend, MOLMO_POINT_TOKENS[len(MOLMO2_TOKENS) :])
    first = _extend(backend, path, MOLMO_POINT_TOKENS, "MolmoPoint", vocab_size)
    free = first + additional - _used(backend)
    _add(backend, [f"<EXTRA_TOKENS_POINT_{number}>" for number in range(free)])
    return Tokenizer(backend)


def _extend(
    backend: tokenizers.Tokenizer,
    path: str | Path,
    names: Sequence[str],
    whose: str,
    vocab_size: int | None,
) -> int:
    """Add tokens at vocab_size + 0, 1, ..., unless they are there; the id of the first."""
    ids = [backend.token_to_id(name) for name in names]
    if any(id is not None for id in ids):
        first = vocab_size if vocab_size is not None else ids[0]
        if first is None or ids != list(range(first, first + len(ids))):
            raise ValueError(
                f"{path} has {whose}'s tokens at the ids {ids}, expected {len(ids)} ids one after "
                f"the other from {first if first is not None else 'vocab_size'} on: use the "
                f"tokenizer.json that belongs to the model, or Qwen3's own"
            )
        return first
    first = vocab_size if vocab_size is not None else QWEN3_VOCAB_SIZE
    used = _used(backend)
    if used > first:
        raise ValueError(
            f"{path} has {used} tokens, more than vocab_size ({first}): use the tokenizer of the "
            f"language model, or give its vocab_size"
        )
    _add(backend, [*(f"|<EXTRA_TOKENS_{number}>|" for number in range(first - used)), *names])
    return first


def _used(backend: tokenizers.Tokenizer) -> int:
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _add(backend: tokenizers.Tokenizer, names: Iterable[str]) -> None:
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
