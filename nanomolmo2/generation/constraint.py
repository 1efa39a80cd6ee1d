"""A grammar of points for the tokens of an answer: a points or tracks tag is always well-formed.

    <points coords="1 1 210 455 2 640 480;2 3 100 042">dogs</points>

Outside of tags anything may come. Once ``<points`` or ``<tracks`` is written, only what continues
the tag as `nanomolmo2.processor.points` writes it, and the answer can not end before it is closed:

    images:   keys are numbers of images that the prompt has, in order
    a video:  keys are seconds with one decimal, in order
    points:   ids run on from 1; tracks: ids go up within a group
    x, y:     three digits, or 1000
    label:    any text without a tag

The automaton reads characters. A token is allowed if all of its text is, and which ones are is
found in a tree of the texts of all tokens: in a list of numbers only a few branches are walked. An
answer that is cut off at max_new_tokens can still end within a tag.

`PointsProposer` uses the same automaton the other way: much of a list is known before it comes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from nanomolmo2.processor.points import SCALE
from nanomolmo2.processor.tokenizer import Tokenizer

_TAGS = ("points", "tracks")
_OPENINGS = tuple(f"<{tag}" for tag in _TAGS)
_CLOSINGS = tuple(f"</{tag}>" for tag in _TAGS)
_SINGLE = "<point"
_COORDS = ' coords="'
_MOST = 10**9 - 1  # nine digits: largest id, number of an image, tenth of a second
_ASCII_BYTE = re.compile(r"<0x[0-7][0-9A-F]>")
_CACHED_STATES = 4096


class State(NamedTuple):
    """A place in the grammar.

    Attributes:
        phase: ``out`` (of tags), ``open``, ``key``, ``id``, ``x``, ``y``, ``end`` or ``label``.
        part: what was read of it.
        tag: ``points`` or ``tracks``.
        key: of the current group; before the first one -1. In a video tenths of a second.
        id: the last one.
    """

    phase: str = "out"
    part: str = ""
    tag: str = ""
    key: int = -1
    id: int = 0


class PointsGrammar:
    """The automaton: a state and a character give the next state, or None."""

    def __init__(self, num_images: int | None = 1, *, video: bool = False) -> None:
        """
        Args:
            num_images: images in the prompt; None = not known, any number.
            video: the keys are times; num_images says nothing.
        """
        if num_images is not None and num_images < 0:
            raise ValueError(f"num_images must be 0 or more, or None, found {num_images}")
        self.video = video
        self.last_key = _MOST if video or num_images is None else num_images

    def step(self, state: State, char: str) -> State | None:
        """The state behind one more character; None if it must not come."""
        phase, part, tag, key, id = state
        new = part + char
        if phase == "out":
            if new in _OPENINGS:
                # With no image and no video there is nothing to point at.
                return State("open", "", new[1:]) if self._key_left(-1) else None
            return State("out", _pending(new, _OPENINGS))
        if phase == "open":
            if new == _COORDS:
                return State("key", "", tag)
            return state._replace(part=new) if _COORDS.startswith(new) else None
        if phase == "key":
            if char == " ":
                value = self._whole_key(part)
                if value is None or not key < value <= self.last_key:
                    return None
                return State("id", "", tag, value, id if tag == "points" else 0)
            return state._replace(part=new) if self._begins_key(new, key) else None
        if phase == "id":
            if tag == "points":
                wanted = str(id + 1)
                if part == wanted:
                    return state._replace(phase="x", part="", id=id + 1) if char == " " else None
                return state._replace(part=new) if wanted.startswith(new) else None
            if char == " ":
                whole = part and int(part) > id
                return state._replace(phase="x", part="", id=int(part)) if whole else None
            return state._replace(part=new) if _begins_number(new, id + 1, _MOST) else None
        if phase in ("x", "y"):
            if char in _DIGITS:
                fits = len(new) <= 3 or new == str(SCALE)
                return state._replace(part=new) if fits else None
            if len(part) < 3:
                return None
            if phase == "x":
                return state._replace(phase="y", part="") if char == " " else None
            if char == " ":
                return state._replace(phase="id", part="") if id < _MOST else None
            if char == ";":
                return state._replace(phase="key", part="") if self._key_left(key) else None
            return State("end", "", tag) if char == '"' else None
        if phase == "end":
            return State("label", "", tag) if char == ">" else None
        # label
        if part == _SINGLE and (char.isspace() or char in "/>"):
            return None  # a tag of Molmo 1, which is read too
        if new == f"</{tag}>":
            return State()
        if part == f"</{tag}" or new in _OPENINGS or any(new == c[:-1] for c in self._others(tag)):
            return None
        return State("label", _pending(new, (*_OPENINGS, *_CLOSINGS)), tag)

    def run(self, state: State, text: str) -> State | None:
        """The state behind a text; None if some character must not come."""
        for char in text:
            following = self.step(state, char)
            if following is None:
                return None
            state = following
        return state

    def likely(self, state: State) -> str:
        """What comes next, as far as the grammar says it; "" where it is open.

        A list is taken to go on where it might also end.
        """
        phase, part, tag, key, id = state
        if phase == "open":
            return _COORDS[len(part) :] + self.likely(State("key", "", tag))
        if phase == "key":
            if not self.video and self.last_key == max(key, 0) + 1:
                return str(self.last_key)[len(part) :] + " " + ("1 " if key < 0 else "")
            return ""
        if phase == "id":
            return f"{id + 1}"[len(part) :] + " " if tag == "points" else ""
        if phase in ("x", "y") and (len(part) == 4 or (len(part) == 3 and part != "100")):
            more = f"{id + 1} " if phase == "y" and tag == "points" else ""
            return f" {more}"
        if phase == "end":
            return ">"
        closing = f"</{tag}>"
        if phase == "label" and part.startswith("</") and closing.startswith(part):
            return closing[len(part) :]
        return ""

    @staticmethod
    def _others(tag: str) -> tuple[str, ...]:
        return tuple(closing for closing in _CLOSINGS if closing != f"</{tag}>")

    def _key_left(self, key: int) -> bool:
        return max(key, -1 if self.video else 0) < self.last_key

    def _whole_key(self, part: str) -> int | None:
        if not self.video:
            return int(part) if part else None
        return int(part.replace(".", "")) if "." in part and part[-1] != "." else None

    def _begins_key(self, part: str, key: int) -> bool:
        if not self.video:
            return _begins_number(part, max(key, 0) + 1, self.last_key)
        whole, point, tenth = part.partition(".")
        if not point:
            # Tenths of a second of which these are the first digits, at least one more to come.
            return _begins_number(whole, (key + 1) // 10, self.last_key // 10)
        if not whole or not (tenth == "" or (len(tenth) == 1 and tenth in _DIGITS)):
            return False
        most = int(whole) * 10 + (int(tenth) if tenth else 9)
        return most > key


_DIGITS = frozenset("0123456789")


def _begins_number(part: str, least: int, most: int) -> bool:
    """Whether some number from ``least`` to ``most`` begins with these digits."""
    if not part or not _DIGITS.issuperset(part) or (part[0] == "0" and part != "0"):
        return False
    low, size = int(part), 1
    if low == 0:
        return least <= 0
    while low * size <= most:
        if low * size + size - 1 >= least:
            return True
        size *= 10
    return False


def _pending(text: str, words: Iterable[str]) -> str:
    """The end of a text that one of the words begins with; all of them begin with their only <."""
    at = text.rfind("<")
    return text[at:] if at >= 0 and any(word.startswith(text[at:]) for word in words) else ""


def _before(tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Ids to put before a token, and the length of their text.

    How a token reads at the beginning of a text may differ: some decoders drop a space.
    """
    before = list(tokenizer.encode_text("a"))
    return before, len(tokenizer.decode(before))


class TokenTexts:
    """What each token of a tokenizer writes, and a tree of it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        size = tokenizer.vocab_size
        before, skip = _before(tokenizer)
        texts = tokenizer.backend.decode_batch(
            [[*before, id] for id in range(size)], skip_special_tokens=True
        )
        self.texts: list[str] = [text[skip:] for text in texts]
        pieces = [tokenizer.backend.id_to_token(id) or "" for id in range(size)]
        pairs = list(zip(self.texts, pieces, strict=True))
        plain = {text for text, piece in pairs if not _ASCII_BYTE.fullmatch(piece)}
        written = []
        self.with_bracket: list[int] = []
        self.tree: dict[str, Any] = {}  # character -> tree; "" -> ids of the texts that end here
        for id, (text, piece) in enumerate(pairs):
            # Bytes beside a broken character may be read as broken too, so a character that has a
            # token of its own is not written as a byte inside a tag.
            if not text or (_ASCII_BYTE.fullmatch(piece) and text in plain):
                continue
            written.append(id)
            if "<" in text:
                self.with_bracket.append(id)
            node = self.tree
            for char in text:
                node = node.setdefault(char, {})
            node.setdefault("", []).append(id)
        self.written = torch.zeros(size, dtype=torch.bool)  # tokens that write something
        self.written[written] = True


_TEXTS: WeakKeyDictionary[Tokenizer, TokenTexts] = WeakKeyDictionary()


def token_texts(tokenizer: Tokenizer) -> TokenTexts:
    """`TokenTexts` of a tokenizer, made once: about a second for 150,000 tokens."""
    if tokenizer not in _TEXTS:
        _TEXTS[tokenizer] = TokenTexts(tokenizer)
    return _TEXTS[tokenizer]


class PointsConstraint:
    """For ``SamplingParams.constraint``: answers whose tags are well-formed."""

    def __init__(
        self, tokenizer: Tokenizer, num_images: int | None = 1, *, video: bool = False
    ) -> None:
        """
        Args:
            num_images: images in the prompt; None = any number.
            video: the prompt has a video: the keys are times.
        """
        self.grammar = PointsGrammar(num_images, video=video)
        self._texts = token_texts(tokenizer)
        self._cache: dict[State, Tensor | None] = {}

    def start(self) -> PointsState:
        """The beginning of an answer."""
        return PointsState(self)

    def text(self, id: int) -> str:
        """What a token writes; nothing for special tokens and ids behind the last one."""
        return self._texts.texts[id] if id < len(self._texts.texts) else ""

    def allowed(self, state: State) -> Tensor | None:
        """(tokens,) bool: which tokens may come; None = any."""
        found: Tensor | bool | None = self._cache.get(state, False)
        if isinstance(found, bool):  # not there; another thread may empty the cache at any time
            if len(self._cache) >= _CACHED_STATES:
                self._cache.clear()
            free = state.phase in ("out", "label")
            found = self._but_wrong(state) if free else self._right(state)
            self._cache[state] = found
        if found is None or found.dtype == torch.bool:
            return found
        return torch.zeros_like(self._texts.written).index_fill_(0, found, True)

    def _right(self, state: State) -> Tensor:
        """Ids of the tokens that continue a tag: few."""
        ids: list[int] = []
        stack = [(self._texts.tree, state)]
        while stack:
            node, here = stack.pop()
            for char, child in node.items():
                if not char:
                    ids += child
                elif (following := self.grammar.step(here, char)) is not None:
                    stack.append((child, following))
        return torch.tensor(sorted(ids), dtype=torch.long)

    def _but_wrong(self, state: State) -> Tensor | None:
        """Where text is free: all tokens but a few. Special ones only outside of tags."""
        texts = self._texts
        suspects = set(texts.with_bracket)
        # A tag may be completed by a token without <: follow what was begun, as long as it goes on.
        stack = [(texts.tree, state)] if state.part else []
        while stack:
            node, here = stack.pop()
            for char, child in node.items():
                if not char:
                    suspects.update(child)
                    continue
                following = self.grammar.step(here, char)
                if following is None:
                    suspects.update(_ends(child))
                elif following != State(state.phase, "", state.tag):
                    stack.append((child, following))
        wrong = [id for id in suspects if self.grammar.run(state, texts.texts[id]) is None]
        if state.phase == "out":
            if not wrong:
                return None
            mask = torch.ones_like(texts.written)
        else:
            mask = texts.written.clone()
        mask[torch.tensor(wrong, dtype=torch.long)] = False
        return mask


def _ends(tree: dict[str, Any]) -> list[int]:
    """Ids of all texts in a tree."""
    ids: list[int] = []
    stack = [tree]
    while stack:
        for char, child in stack.pop().items():
            if char:
                stack.append(child)
            else:
                ids += child
    return ids


class PointsState:
    """Where one answer stands."""

    def __init__(self, constraint: PointsConstraint) -> None:
        self.state = State()
        self._constraint = constraint

    def allowed(self) -> Tensor | None:
        """(tokens,) bool on the CPU: which tokens may come next; None = any."""
        return self._constraint.allowed(self.state)

    def advance(self, id: int) -> None:
        """Take the next id. Raises: ValueError if it does not continue the tag."""
        text = self._constraint.text(id)
        following = self._constraint.grammar.run(self.state, text)
        if following is None or (not text and self.state.phase != "out"):
            raise ValueError(
                f"token {id} ({text!r}) cannot come here, inside of a {self.state.tag or 'points'} "
                f"tag: choose among the allowed tokens only"
            )
        self.state = following


class PointsProposer:
    """A `DraftProposer`: ids and separators of lists of points before they come.

    Made in microseconds: only the tokens of the answer are read, not the whole vocabulary.
    """

    def __init__(
        self, tokenizer: Tokenizer, num_images: int | None = 1, *, video: bool = False
    ) -> None:
        """See `PointsConstraint`."""
        self._tokenizer = tokenizer
        self._grammar = PointsGrammar(num_images, video=video)
        self._before, self._skip = _before(tokenizer)
        self._state = State()
        # Where a digit comes in one token with the space before it, that space can not be drafted.
        self._space_alone = len(tokenizer.encode_text(" 4")) > 1

    def extend(self, ids: Iterable[int]) -> None:
        """Take the next ids of the answer; a tag that is not well-formed is passed over."""
        for id in ids:
            text = self._tokenizer.decode([*self._before, id])[self._skip :]
            self._state = self._grammar.run(self._state, text) or State()

    def propose(self, width: int) -> list[int]:
        """Up to ``width`` ids that the grammar expects."""
        text = self._grammar.likely(self._state)
        if not self._space_alone:
            text = text.rstrip(" ")
        return list(self._tokenizer.encode_text(text)[:width]) if text else []
