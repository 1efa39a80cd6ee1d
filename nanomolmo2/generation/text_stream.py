"""Token ids -> text as it becomes sure, and the points in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from nanomolmo2.generation.answer import SELECTED, read_answer
from nanomolmo2.generation.stopping import StopText
from nanomolmo2.processor import Encoded, Point, Processor


class TextStream:
    """Token ids one by one -> pieces of text as soon as they are sure.

    A character may take several tokens; until it is whole, decoding gives U+FFFD, so a piece that
    ends with it is held back. Only the ids since the last piece are decoded, together with those of
    that piece: how a token reads can depend on the one before. What a point model selects,
    ``<POINT_k>``, is never cut, and stop texts are looked for between such.
    """

    def __init__(
        self,
        processor: Processor,
        on_text: Callable[[str], None] | None = None,
        stop: str | Sequence[str] = (),
    ) -> None:
        """
        Args:
            on_text: called with every piece.
            stop: texts that end the answer, no part of it.
        """
        self.ids: list[int] = []
        self._processor = processor
        self._on_text = on_text
        self._stop = StopText(stop)
        self._selects = processor.config.points is not None
        self._pieces: list[str] = []
        self._taken = 0  # pieces before this were taken by new_pieces
        self._context = 0  # ids from here on are decoded
        self._written = 0  # ids before this are in the pieces

    @property
    def stopped(self) -> bool:
        """Whether a stop text has ended the answer."""
        return self._stop.found is not None

    def put(self, id: int) -> bool:
        """Take the next id. Returns: ``stopped``."""
        self.ids.append(id)
        text = self._unwritten()
        if text and not text.endswith("\ufffd"):
            self._write(text)
        return self.stopped

    def end(self) -> str:
        """Write what was held back; return the whole text, which is the pieces in order."""
        if text := self._unwritten():
            self._write(text)
        self._show(self._stop.end())
        return "".join(self._pieces)

    def new_pieces(self) -> list[str]:
        """The pieces since the last call."""
        new = self._pieces[self._taken :]
        self._taken += len(new)  # more may have come: the ids come from another thread
        return new

    def _unwritten(self) -> str:
        before = self._processor.decode(self.ids[self._context : self._written])
        return self._processor.decode(self.ids[self._context :])[len(before) :]

    def _write(self, text: str) -> None:
        self._context, self._written = self._written, len(self.ids)
        if not self._selects:
            self._show(self._stop.put(text))
            return
        for number, part in enumerate(SELECTED.split(text)):
            if self.stopped:
                break
            # What was held back cannot go on behind a class, which every second part is.
            self._show(self._stop.end() + part if number % 2 else self._stop.put(part))

    def _show(self, piece: str) -> None:
        if not piece:
            return
        self._pieces.append(piece)
        if self._on_text is not None:
            self._on_text(piece)


class PointStream:
    """The points of an answer as they become sure, each once.

    Their labels stand behind them in most answers: here they are None where they are not written
    yet. The answer as a whole has them all.
    """

    def __init__(self, encoded: Encoded) -> None:
        self._encoded = encoded
        self._text = ""
        self._given = 0

    def put(self, piece: str) -> list[Point]:
        """Take the next piece of the text. Returns: the points that are new."""
        self._text += piece
        if not _MAY_END_POINT.search(piece) or not _MAY_HAVE_POINTS.search(self._text):
            return []
        return self._new(_UNSURE.sub("", self._text))

    def end(self) -> list[Point]:
        """Those that only the end of the text makes sure."""
        return self._new(self._text)

    def _new(self, text: str) -> list[Point]:
        points = read_answer(text, self._encoded).points[self._given :]
        self._given += len(points)
        return list(points)


_MAY_HAVE_POINTS = re.compile(r"<(?:point|track)", re.IGNORECASE)
_MAY_END_POINT = re.compile(r"[^\w.]")
# A selected place is followed by the number of its object, of which more digits may come.
_UNSURE = re.compile(r"<POINT_[0-9]{1,9}> ?[0-9]*\Z")
