"""A contact sheet: many pictures, small, on one, each with a line of text."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw

from nanomolmo2.processor.draw import drawing_font, writable

LARGEST, SMALLEST = 240, 32  # pixels of a side of a picture
MOST_PIXELS = 40_000_000  # of all of them
_GAP = 8
_INK, _PAPER, _LACKING = "#202020", "white", "#d9d9d9"


class ContactSheet:
    """Pictures are put one after the other, line by line.

    Attributes:
        image: the sheet so far, RGB.
    """

    def __init__(self, number: int) -> None:
        """Args: number: of the pictures to come, at least 1."""
        side = math.sqrt(MOST_PIXELS / number)
        self._side = int(min(LARGEST, max(SMALLEST, side)))
        self._text = max(10, self._side // 14)  # height of the letters
        self._columns = math.ceil(math.sqrt(number))
        self._font = drawing_font(self._text)
        rows = math.ceil(number / self._columns)
        width = self._columns * (self._side + _GAP) + _GAP
        height = rows * self._line + _GAP
        self.image = Image.new("RGB", (width, height), _PAPER)
        self._draw = ImageDraw.Draw(self.image)
        self._number = 0

    @property
    def _line(self) -> int:
        return self._side + 2 * self._text + _GAP

    def add(self, picture: Image.Image | None, name: str, said: str) -> None:
        """Put the next picture.

        Args:
            picture: None: a gray square, of one that is not there.
            name: shortened in its middle where it is too long.
            said: behind the name, always whole.
        """
        row, column = divmod(self._number, self._columns)
        self._number += 1
        x, y = _GAP + column * (self._side + _GAP), _GAP + row * self._line
        if picture is None:
            self._draw.rectangle((x, y, x + self._side - 1, y + self._side - 1), fill=_LACKING)
        else:
            small = picture.copy()
            small.thumbnail((self._side, self._side))
            place = x + (self._side - small.width) // 2, y + (self._side - small.height) // 2
            self.image.paste(small, place)
        text = self._fitting(writable(name), writable(said))
        self._draw.text((x, y + self._side + self._text // 2), text, fill=_INK, font=self._font)

    def _fitting(self, name: str, said: str) -> str:
        """``name: said``, with as much of the name as there is room for."""
        for length in range(len(name), 0, -1):
            head, tail = (length + 1) // 2, length // 2
            short = name if length == len(name) else f"{name[:head]}…{name[len(name) - tail :]}"
            text = f"{short}: {said}"
            if self._draw.textlength(text, font=self._font) <= self._side:
                return text
        return said
