"""Stop texts in an answer that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Passes an answer on up to the first stop text, wherever its pieces were cut.

    The stop text that ends first counts; of several that end there, the longest. What may be the
    beginning of one is held back until it is known. Tokens that end an answer are not seen here:
    the engine knows them (``SamplingParams.stop_token_ids``).

        stop = StopText(["\\nUser:"])
        for piece in pieces:
            show(stop.put(piece))
            if stop.found is not None:
                break
        show(stop.end())

    Attributes:
        found: the stop text that ended the answer; None as long as none did.
    """

    def __init__(self, stop: str | Sequence[str]) -> None:
        """
        Args:
            stop: texts, none of them empty; no text: everything passes at once.
        Raises: ValueError for an empty text.
        """
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(self._stop):
            raise ValueError(
                "a stop text is empty, it would end every answer at once: leave it out"
            )
        self.found: str | None = None
        self._held = ""

    def put(self, piece: str) -> str:
        """Take the next piece. Returns: what is surely part of the answer, and new."""
        if self.found is not None:
            return ""
        text = self._held + piece
        places = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if places:
            _, at, self.found = min(places)
            self._held = ""
            return text[:at]
        sure = len(text) - self._beginning(text)
        self._held = text[sure:]
        return text[:sure]

    def end(self) -> str:
        """The answer is over. Returns: what was held back."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """Length of the longest end of the text that a stop text begins with."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
