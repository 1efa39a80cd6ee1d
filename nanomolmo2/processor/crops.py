"""Crops: one image -> an overview and overlapping details, cut into patches, as Molmo2 sees it.

A square of 378 pixels shows little of a page of text. So an image is sent as one overview,
squashed to the crop size, and as a grid of tiles cut from a larger copy (the canvas), whose size is
chosen so that the image has to shrink as little as `max_crops` tiles allow:

    canvas   one crop, and one window further for every more tile: rows x window + margins
    window   crop without its margins, 27 - 4 - 4 = 19 patches: neighbours overlap by the margins
    index    each tile gives up its margin where it touches another; what is left is one seamless
             grid, pooled in windows of 2 x 2 patches

A side no longer than the margins together (112 pixels) has no or a negative length without them.
The tiling is then what the Hugging Face processors make of it (800 x 50 pixels: one tile); Molmo2's
training code counted such a side as one pixel (three tiles).

The resize is ``F.interpolate`` of one channel at a time: with three channels its result depends on
the number of threads (the last bit of a float, and so now and then a rounded half).

Letters: P side of a patch, N patches a crop, M crops, K patches a pooling window, n image tokens.
Source: Molmo2, olmo/preprocessing/multicrop_preprocessor.py; transformers 5.23, models/molmo2.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from nanomolmo2.config import Config
from nanomolmo2.processor.image import ImageSource, load_image

_BAND = 1 << 22  # pixels of a large image that are copied at once


@dataclass(frozen=True)
class MultiCrop(Config):
    """How an image becomes crops, and which patches each image token pools.

    Attributes:
        max_crops: most tiles, the overview not counted; 8 as shipped, 24 in published results.
        image_size: side of a crop, pixels.
        patch_size: side of a patch, pixels.
        overlap_margins: patches at the left and top, right and bottom of a crop that may be its
            neighbour's too.
        pooling_size: side of a pooling window, patches.
        image_mean, image_std: of red, green and blue, after the values were scaled to 0..1.
    """

    max_crops: int = 8
    image_size: int = 378
    patch_size: int = 14
    overlap_margins: tuple[int, int] = (4, 4)
    pooling_size: int = 2
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        self.check_positive()
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size ({self.image_size}) must be a multiple of patch_size "
                f"({self.patch_size}): crops are cut into whole patches"
            )
        if min(self.overlap_margins) < 0 or sum(self.overlap_margins) >= self.patches_per_side:
            raise ValueError(
                f"overlap_margins {self.overlap_margins} must not be negative and must leave at "
                f"least one of the {self.patches_per_side} patches a side of a crop: make them "
                f"smaller"
            )
        if not all(std > 0 for std in self.image_std):
            raise ValueError(f"image_std {self.image_std} must be greater than 0")

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """N, patches of a crop."""
        return self.patches_per_side**2

    @property
    def window_size(self) -> int:
        """What a further tile adds to the canvas, pixels."""
        return (self.patches_per_side - sum(self.overlap_margins)) * self.patch_size

    @property
    def margin_size(self) -> int:
        """What a canvas has beside its windows, pixels."""
        return sum(self.overlap_margins) * self.patch_size

    def __call__(self, picture: ImageSource) -> dict[str, NDArray[Any]]:
        """Cut an image into crops: the overview, then the tiles row by row.

        Args:
            picture: anything `load_image` takes; EXIF rotation is applied, transparency put on
                white.
        Returns:
            pixel_values: (M, N, 3*P*P) float32, normalised; a patch runs row, column, channel.
            image_token_pooling: (n, K) int64, patches of each image token (crop * N + patch), -1
                where a window reaches over the border; overview first, both row by row.
            image_grid: (4,) int64, rows and columns of image tokens in the overview, then in the
                detailed view; n = their products' sum.
        Raises: ValueError as `load_image`.
        """
        image = load_image(picture)
        rows, cols = self.tiling(*image.size)
        canvas_size = tuple(n * self.window_size + self.margin_size for n in (rows, cols))
        overview, canvas = resize(image, (self.image_size, self.image_size), canvas_size)
        patches = np.concatenate([self._cut(overview, 1, 1), self._cut(canvas, rows, cols)])
        index, grid = _pooling_index(
            rows, cols, self.patches_per_side, self.overlap_margins, self.pooling_size
        )
        return {
            "pixel_values": self._normalise(patches),
            "image_token_pooling": index.copy(),  # the cached one stays as it is
            "image_grid": np.array(grid, dtype=np.int64),
        }

    def tiles(
        self, image: Image.Image | NDArray[np.uint8]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], tuple[int, int]]:
        """What `__call__` makes of an RGB image, or array (H, W, 3), without the overview.

        Returns: pixel_values of the tiles; (n, K) their patches of each image token (tile * N +
            patch); rows and columns of image tokens.
        """
        size = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
        rows, cols = self.tiling(*size)
        (canvas,) = resize(
            image, tuple(n * self.window_size + self.margin_size for n in (rows, cols))
        )
        index, (low_rows, low_cols, high_rows, high_cols) = _pooling_index(
            rows, cols, self.patches_per_side, self.overlap_margins, self.pooling_size
        )
        windows = shift_windows(index[low_rows * low_cols :], -self.num_patches)
        return self._normalise(self._cut(canvas, rows, cols)), windows, (high_rows, high_cols)

    def tiling(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of tiles for an image of this size in pixels.

        The tiling that enlarges least; where every one shrinks, the one that shrinks least. Sizes
        are compared without the margins and in float32, as the references do.
        """
        tilings, windows = _tilings(self.max_crops)
        side = np.array([height - self.margin_size, width - self.margin_size], dtype=np.float32)
        with np.errstate(divide="ignore"):  # a side as short as the margins: no limit, infinite
            scales = (windows * np.float32(self.window_size) / side).min(axis=1)
        if (scales < 1).all():
            return tilings[int(scales.argmax())]
        return tilings[int(np.where(scales < 1, np.float32(10e9), scales).argmin())]

    def patch_grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of patches in the detailed view of an image of this size."""
        rows, cols = self.tiling(width, height)
        margins = sum(self.overlap_margins)
        window = self.patches_per_side - margins
        return rows * window + margins, cols * window + margins

    def image_grid(self, width: int, height: int) -> tuple[int, int, int, int]:
        """``image_grid`` of an image of this size without cutting it."""
        return _pooling_index(
            *self.tiling(width, height),
            self.patches_per_side,
            self.overlap_margins,
            self.pooling_size,
        )[1]

    def frame(self, picture: ImageSource) -> NDArray[np.float32]:
        """One frame of a video, made as an overview is: (N, 3*P*P) float32."""
        return self.patches(self.overview(load_image(picture)))

    def overview(self, image: Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
        """An RGB image squashed to the size of a crop: (image_size, image_size, 3)."""
        (squashed,) = resize(image, (self.image_size, self.image_size))
        return squashed

    def patches(self, overview: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What `overview` gave, normalised and cut: (N, 3*P*P)."""
        return self._normalise(self._cut(overview, 1, 1))[0]

    def _cut(self, canvas: NDArray[np.uint8], rows: int, cols: int) -> NDArray[np.uint8]:
        """(H, W, 3) -> (rows * cols, N, 3*P*P), in one copy."""
        side, patch = self.patches_per_side, self.patch_size
        down, right, channel = canvas.strides
        tiles = np.lib.stride_tricks.as_strided(
            canvas,
            # Neighbouring pixels of a row lie together, so a row of a patch is one piece.
            shape=(rows, cols, side, side, patch, patch * 3),
            strides=(
                self.window_size * down,
                self.window_size * right,
                patch * down,
                patch * right,
                down,
                channel,
            ),
            writeable=False,
        )
        return tiles.reshape(rows * cols, side * side, patch * patch * 3)

    def _normalise(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(value - 255 mean) / (255 std), the references' order of operations."""
        pixels = torch.from_numpy(patches).float()
        times = self.patch_size**2  # the channels of every pixel of a patch
        mean = (torch.tensor(self.image_mean) * 255).repeat(times)
        std = (torch.tensor(self.image_std) * 255).repeat(times)
        return pixels.sub_(mean).div_(std).numpy()


def resize(image: Any, *sizes: tuple[int, ...]) -> list[NDArray[np.uint8]]:
    """Resize an RGB image to each (height, width); the aspect ratio is not kept.

    Bilinear between the four nearest pixels, without antialias, rounded half to even.

    Returns: arrays (height, width, 3).
    """
    width, height = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
    rows = _rows_between(height, [size[0] for size in sizes])
    pixels = _rows_of(image, rows)
    resized = [np.empty((*size, 3), dtype=np.uint8) for size in sizes]
    plane = _sparse_plane(height, width)
    for channel in range(3):  # one at a time: see the top of the file; it saves memory too
        plane[rows] = pixels[:, :, channel]
        tensor = torch.from_numpy(plane)[None, None]
        for size, out in zip(sizes, resized, strict=True):
            values = F.interpolate(tensor, size, mode="bilinear", align_corners=False)[0, 0]
            out[:, :, channel] = values.round_().clamp_(0, 255).to(torch.uint8).numpy()
    return resized


def _sparse_plane(height: int, width: int) -> NDArray[np.float32]:
    """(H, W) of which only some rows will be written and read: no memory stands behind others."""
    if height * width < _BAND or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.empty((height, width), dtype=np.float32)
    memory = mmap.mmap(-1, 4 * height * width, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page spans several rows
    return np.frombuffer(memory, dtype=np.float32).reshape(height, width)


def _rows_between(height: int, lengths: Sequence[int]) -> NDArray[np.int64]:
    """The rows of an image that the rows of its resized copies lie between.

    PyTorch counts in float32: where a place is nearly a whole row, both neighbours are taken.
    """
    near = []
    for length in lengths:
        places = (np.arange(length) + 0.5) * (height / length) - 0.5
        for place in (places - 0.1, places + 0.1):
            above = np.floor(place).astype(np.int64)
            near += [above, above + 1]
    return np.unique(np.clip(np.concatenate(near), 0, height - 1))


def _rows_of(image: Any, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """(rows, W, 3): some rows of an image, which as a whole is copied only if it is small."""
    if not isinstance(image, Image.Image):
        return np.asarray(image)[rows]
    if image.width * image.height <= _BAND:
        return np.asarray(image)[rows]
    pixels = np.empty((len(rows), image.width, 3), dtype=np.uint8)
    step = max(1, _BAND // image.width)
    for top in range(0, image.height, step):
        first, last = np.searchsorted(rows, (top, top + step))
        if first < last:
            bottom = min(image.height, top + step)
            band = np.asarray(image.crop((0, top, image.width, bottom)))
            pixels[first:last] = band[rows[first:last] - top]
    return pixels


def pool_windows(patches: NDArray[np.int64], size: int) -> tuple[NDArray[np.int64], int, int]:
    """Group a grid of patches into windows of size x size.

    Args:
        patches: (rows, cols) of indices; padded with -1 to whole windows, the odd one at the end.
    Returns: (windows, size * size), both row by row; rows and columns of windows.
    """
    padding = [(-length % size // 2, (-length % size + 1) // 2) for length in patches.shape]
    patches = np.pad(patches, padding, constant_values=-1)
    rows, cols = patches.shape[0] // size, patches.shape[1] // size
    windows = patches.reshape(rows, size, cols, size).swapaxes(1, 2)
    return windows.reshape(rows * cols, size * size), rows, cols


def shift_windows(index: NDArray[np.int64], patches: int) -> NDArray[np.int64]:
    """The same windows so many patches further on; empty slots stay -1."""
    return np.where(index < 0, index, index + patches)


@lru_cache(maxsize=32)
def _tilings(max_crops: int) -> tuple[list[tuple[int, int]], NDArray[np.float32]]:
    """All (rows, columns) of at most so many tiles, fewest first, then fewest rows."""
    tilings = [
        (rows, cols) for rows in range(1, max_crops + 1) for cols in range(1, max_crops // rows + 1)
    ]
    tilings.sort(key=lambda tiling: (tiling[0] * tiling[1], tiling[0]))
    return tilings, np.array(tilings, dtype=np.float32)


@lru_cache(maxsize=256)
def _pooling_index(
    rows: int, cols: int, side: int, margins: tuple[int, int], pooling_size: int
) -> tuple[NDArray[np.int64], tuple[int, int, int, int]]:
    """((n, K) index, grid) of an overview and rows x cols tiles of side x side patches each."""
    overview, *low = pool_windows(np.arange(side * side).reshape(side, side), pooling_size)
    tiles = np.arange(rows * cols * side * side).reshape(rows, cols, side, side) + side * side
    left, right = margins
    window = side - left - right

    def kept(tile: int, tiles: int) -> slice:
        """A tile's patches along one axis without those it leaves to its neighbours."""
        return slice(left if tile > 0 else 0, left + window if tile < tiles - 1 else side)

    seamless = np.block(
        [
            [tiles[row, col][kept(row, rows), kept(col, cols)] for col in range(cols)]
            for row in range(rows)
        ]
    )
    details, *high = pool_windows(seamless, pooling_size)
    index = np.concatenate([overview, details])
    index.flags.writeable = False
    return index, (low[0], low[1], high[0], high[1])
