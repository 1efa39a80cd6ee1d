"""Pixels <-> (row, slot, cell): where the points of MolmoPoint lie in a prompt's pictures.

A point is selected in three steps. A *row* is a visual token, counted over the whole prompt; its
window holds *slots*, the patches of a square of 2 x 2 or 3 x 3; a patch has 3 x 3 *cells*, numbered
column by column. Each picture or frame is one `View`, a grid of patches that is pooled in square
windows, so both directions are arithmetic:

    patch (r, c) of a grid, padded to whole windows of s x s
    row   first row of the view + (r // s) * windows a line + c // s
    slot  (r % s) * s + c % s
    cell  3 * column third + row third

Overviews of crops have rows too, and no view: they cannot be pointed at. Ids behind the vocabulary
number the classes of one prompt: V + row, V + N for *no more points*, then the slots, then cells.

Source: MolmoPoint, olmo/models/molmo_point and its Hugging Face code (`get_patch_coordinates`,
`extract_image_points`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanomolmo2.batch import NO_MORE_POINTS
from nanomolmo2.processor.point import Point, Size

END_OF_LIST = (NO_MORE_POINTS, -1, -1)  # the target that ends a list of points
CELLS_PER_SIDE = 3
NUM_CELLS = CELLS_PER_SIDE**2
# As the released code has it, and not 1/3: centres lie at 0.165, 0.495 and 0.825 of a patch.
CELL_STEP = 0.33

CLASS_NAME = r"<POINT_([0-9]{1,9})>"  # as a class is written in text, a pattern

Target = tuple[int, int, int]  # row, slot, cell


class View(NamedTuple):
    """One picture or frame as a grid of patches."""

    first_row: int
    rows: int  # of patches
    cols: int
    window: int  # side of a pooling window, patches

    @property
    def windows(self) -> tuple[int, int]:
        """Rows and columns of windows."""
        return -(-self.rows // self.window), -(-self.cols // self.window)

    def row_and_slot(self, r: Any, c: Any) -> tuple[Any, Any]:
        """Where the patch (or arrays of patches) at row r and column c of the grid is."""
        s, (lines, across) = self.window, self.windows
        # The odd patch of the padding is at the end, as in `crops.pool_windows`.
        r = r + (lines * s - self.rows) // 2
        c = c + (across * s - self.cols) // 2
        return self.first_row + (r // s) * across + c // s, (r % s) * s + c % s

    def target(self, x: float, y: float, size: Size) -> Target:
        """The row, slot and cell of a place in a picture of this size, pixels."""
        c, across = _split(self.cols * (x / size[0]), self.cols)
        r, down = _split(self.rows * (y / size[1]), self.rows)
        row, slot = self.row_and_slot(r, c)
        return row, slot, CELLS_PER_SIDE * across + down

    def patch(self, row: int, slot: int) -> tuple[int, int] | None:
        """(row, column) of the grid; None for an empty slot."""
        s, (lines, across) = self.window, self.windows
        line, place = divmod(row - self.first_row, across)
        r = line * s + slot // s - (lines * s - self.rows) // 2
        c = place * s + slot % s - (across * s - self.cols) // 2
        return (r, c) if 0 <= r < self.rows and 0 <= c < self.cols else None


@dataclass(frozen=True, eq=False)
class PointSpace:
    """What a prompt shows, as far as points need it; comes with `Encoded`.

    N rows (overviews counted), S slots in each.

    Attributes:
        first_class: V, the id of the first class: row 0.
        markers: ids of the tokens that mark row, slot and cell.
        token_pooling: (N, S) int64, the patches of each row, -1 for an empty slot. Patches count on
            over the pictures (absolute), so it is `Encoded.image_token_pooling` itself.
        views: the grid of each picture, or of each frame.
        image_sizes: (width, height) of each picture, pixels; empty for a video.
        video_size: (width, height) of the frames; None for pictures.
        frame_times: seconds of each frame.
        digits: ids that write digits, and which: all that `points_from_ids` needs of a tokenizer.
        tokenizer: what decodes labels too. Worker processes do not get it.
    """

    first_class: int
    markers: tuple[int, int, int]
    token_pooling: NDArray[np.int64]
    views: tuple[View, ...]
    image_sizes: tuple[Size, ...] = ()
    video_size: Size | None = None
    frame_times: tuple[float, ...] = ()
    digits: dict[int, str] | None = None
    tokenizer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "tokenizer": None}
        state.pop("_first_rows", None)
        return state

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.token_pooling)

    @property
    def num_slots(self) -> int:
        """S."""
        return int(self.token_pooling.shape[1])

    @property
    def num_classes(self) -> int:
        """Rows, no more points, slots, cells."""
        return self.num_rows + 1 + self.num_slots + NUM_CELLS

    @property
    def subpatch_mapping(self) -> list[NDArray[np.int64]]:
        """(rows, columns) of patch numbers, of each picture or frame, as in the released code."""
        grids = []
        for view in self.views:
            r, c = np.indices((view.rows, view.cols))
            grids.append(self.token_pooling[view.row_and_slot(r, c)])
        return grids

    # ---- pixels -> target ----

    def target(self, point: Point) -> Target:
        """The row, slot and cell of a point in pixels.

        Of a video the frame nearest to the point's time is taken, the first of two.

        Raises: ValueError for a point outside of its picture, or in one that is not shown.
        """
        number = self._view_of(point)
        width, height = self._size(number)
        if not (0 <= point.x <= width and 0 <= point.y <= height):  # false for NaN too
            what = "the video" if self.video_size else f"picture {point.image}"
            raise ValueError(
                f"the point ({point.x}, {point.y}) lies outside of {what}, which is {width} x "
                f"{height} pixels: give pixels of the original, from its top-left corner"
            )
        return self.views[number].target(point.x, point.y, (width, height))

    def order(self, points: Iterable[Point]) -> list[tuple[Target, Point]]:
        """The points of one list with their targets, sorted by (row, slot, cell).

        Raises: as `target`.
        """
        return sorted(((self.target(point), point) for point in points), key=lambda pair: pair[0])

    def _view_of(self, point: Point) -> int:
        if self.video_size is not None:
            if point.time is None or not math.isfinite(point.time):
                raise ValueError(
                    f"the point ({point.x}, {point.y}) has the time {point.time}, but the prompt "
                    f"shows a video: give the seconds of a frame"
                )
            distances = [abs(time - point.time) for time in self.frame_times]
            return distances.index(min(distances))
        if point.time is not None:
            raise ValueError(
                f"a point names the time {point.time} s, but the prompt shows no video: give the "
                f"number of its picture"
            )
        if not 1 <= point.image <= len(self.views):
            raise ValueError(
                f"a point names picture {point.image}, but the prompt shows {len(self.views)}: "
                f"pictures count from 1 in prompt order"
            )
        return point.image - 1

    def _size(self, view: int) -> Size:
        return self.video_size or self.image_sizes[view]

    # ---- target -> pixels ----

    def point(
        self, target: Sequence[int], id: int | None = None, label: str | None = None
    ) -> Point | None:
        """The centre of a cell, in pixels; None where nothing can be pointed at.

        That is a row of an overview, an empty slot, and what is no row of this prompt.
        """
        row, slot, cell = (int(value) for value in target)
        number = self._view_at(row)
        if number is None or not (0 <= slot < self.num_slots and 0 <= cell < NUM_CELLS):
            return None
        view, (width, height) = self.views[number], self._size(number)
        patch = view.patch(row, slot) if slot < view.window**2 else None
        if patch is None:
            return None
        r, c = patch
        across, down = divmod(cell, CELLS_PER_SIDE)
        x = (c + (across + 0.5) * CELL_STEP) / view.cols * width
        y = (r + (down + 0.5) * CELL_STEP) / view.rows * height
        if self.video_size is not None:
            return Point(x, y, 1, id, label, self.frame_times[number])
        return Point(x, y, number + 1, id, label)

    @cached_property
    def _first_rows(self) -> NDArray[np.int64]:
        return np.array([view.first_row for view in self.views], dtype=np.int64)

    def _view_at(self, row: int) -> int | None:
        """The picture or frame that a row lies in; None for overviews."""
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        if number < 0:
            return None
        lines, across = self.views[number].windows
        return number if row < self.views[number].first_row + lines * across else None

    def is_selectable(self, row: int) -> bool:
        """Whether a row is part of a picture, and not of an overview."""
        return self._view_at(row) is not None

    # ---- classes ----

    def classes(self, target: Sequence[int]) -> tuple[int, ...]:
        """Numbers of the classes (ids without V) of a target; what it lacks (-1) is left out."""
        row, slot, cell = (int(value) for value in target)
        if row == NO_MORE_POINTS:
            return (self.num_rows,)
        found = [row]
        if slot >= 0:
            found.append(self.num_rows + 1 + slot)
        if slot >= 0 and cell >= 0:
            found.append(self.num_rows + 1 + self.num_slots + cell)
        return tuple(found)

    def text_of(self, ids: Iterable[int]) -> str:
        """Ids as text, those of classes as ``<POINT_k>``.

        Without a tokenizer, in a worker process, of other ids only digits are read.
        """
        return decode_classes(ids, self.first_class, self._decode)

    def _decode(self, ids: list[int]) -> str:
        if self.tokenizer is not None:
            return str(self.tokenizer.decode(ids, skip_special_tokens=False))
        digits = self.digits or {}
        return "".join(digits.get(id, "\ufffd") for id in ids)


def decode_classes(ids: Iterable[int], first_class: int, decode: Any) -> str:
    """Text of ids in which every id >= ``first_class`` is ``<POINT_k>``, k counted from there."""
    parts: list[str] = []
    run: list[int] = []
    for id in ids:
        id = int(id)
        if id < first_class:
            run.append(id)
            continue
        if run:
            parts.append(decode(run))
            run = []
        parts.append(f"<POINT_{id - first_class}>")
    return "".join([*parts, decode(run)]) if run else "".join(parts)


def _split(place: float, patches: int) -> tuple[int, int]:
    """(patch, cell) along one axis of a place in patches from the start; the last holds the end."""
    patch = min(math.floor(place), patches - 1)
    return patch, min(math.floor(CELLS_PER_SIDE * (place - patch)), CELLS_PER_SIDE - 1)
