"""Pictures to crops, for programs that take this step from the checkpoint (vLLM).

Written into exported folders by NanoMolmo2, which it does not need; its pixels are NanoMolmo2's,
bit for bit. A picture is one overview and a grid of tiles, which overlap by the margins; each is
cut into patches, and of every token it is said which patches it pools.

Letters: P side of a patch, N patches of a crop, M crops, K patches of a pooling window.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs


class Molmo2ImagesKwargs(ImagesKwargs, total=False):
    """What a program may set beside the file: ``--mm-processor-kwargs '{"max_crops": 24}'``."""

    max_crops: int
    overlap_margins: list[int]
    patch_size: int
    pooling_size: list[int]


class Molmo2ImageProcessor(BaseImageProcessor):
    """Pictures to patches and to the patches of each image token."""

    model_input_names = ["pixel_values", "image_token_pooling", "image_grids", "image_num_crops"]
    valid_kwargs = Molmo2ImagesKwargs

    def __init__(
        self,
        size: dict[str, int] | None = None,
        max_crops: int = 8,
        overlap_margins: Sequence[int] = (4, 4),
        patch_size: int = 14,
        pooling_size: Sequence[int] = (2, 2),
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size = size or {"height": 378, "width": 378}
        self.max_crops = max_crops
        self.overlap_margins = list(overlap_margins)
        self.patch_size = patch_size
        self.pooling_size = list(pooling_size)
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def preprocess(
        self, images: Any, return_tensors: Any = None, max_crops: int | None = None, **_: Any
    ) -> BatchFeature:
        """Cut pictures into crops.

        Args:
            images: PIL pictures or arrays (H, W, 3) of uint8, one or a list of them.
            max_crops: most tiles of a picture, the overview not counted; None: as in the file.
        Returns: ``pixel_values`` (M, N, 3*P*P) float32, ``image_token_pooling`` (tokens, K), the
            patches of each token (crop * N + patch, -1 is empty; see `counted_on`),
            ``image_grids`` (pictures, 4), rows and columns of tokens in the overview and in the
            tiles, ``image_num_crops`` (pictures,).
        """
        found = [
            self._crops(as_pixels(image), max_crops or self.max_crops) for image in _flat(images)
        ]
        pixels, pooling, grids = zip(*found, strict=True)
        patches = [crops.shape[0] * crops.shape[1] for crops in pixels]
        data = {
            "pixel_values": np.concatenate(pixels),
            "image_token_pooling": counted_on(pooling, patches),
            "image_grids": np.array(grids, dtype=np.int64),
            "image_num_crops": np.array([len(crops) for crops in pixels], dtype=np.int64),
        }
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _crops(
        self, pixels: np.ndarray, max_crops: int
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """(M, N, 3*P*P) patches, (tokens, K) pooling index, grid of one picture (H, W, 3)."""
        side, patch, pool = self.size["height"], self.patch_size, self.pooling_size[0]
        left, right = self.overlap_margins
        per_side = side // patch
        window, margin = (per_side - left - right) * patch, (left + right) * patch
        rows, cols = tiling(*pixels.shape[:2], window, margin, max_crops)
        canvas = resize(pixels, rows * window + margin, cols * window + margin)
        tiles = [
            canvas[row * window : row * window + side, col * window : col * window + side]
            for row in range(rows)
            for col in range(cols)
        ]
        crops = np.stack([resize(pixels, side, side), *tiles])
        index = np.arange(rows * cols * per_side**2).reshape(rows, cols, per_side, per_side)
        kept = [
            np.concatenate(
                [
                    index[row, col][
                        kept_of(row, rows, left, right), kept_of(col, cols, left, right)
                    ]
                    for col in range(cols)
                ],
                axis=1,
            )
            for row in range(rows)
        ]
        overview, *low = pool_windows(np.arange(per_side**2).reshape(per_side, per_side), pool)
        details, *high = pool_windows(np.concatenate(kept) + per_side**2, pool)
        patches = normalise(cut(crops, patch), patch, self.image_mean, self.image_std)
        return patches, np.concatenate([overview, details]), [*low, *high]


def as_pixels(image: Any) -> np.ndarray:
    """(H, W, 3) of uint8: upright, on white."""
    if isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            grey = (np.asarray(image).astype(np.uint32) + 128) // 257
            image = Image.fromarray(grey.astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return np.asarray(image.convert("RGB"))
    pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[2] not in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
        raise ValueError(f"found an array of shape {pixels.shape}, expected (height, width, 3)")
    if pixels.dtype != np.uint8:
        if not np.issubdtype(pixels.dtype, np.floating) or pixels.min() < 0 or pixels.max() > 1:
            raise ValueError(f"found values of {pixels.dtype}, expected uint8 or floats of 0 to 1")
        pixels = np.rint(pixels.astype(np.float64) * 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def tiling(height: int, width: int, window: int, margin: int, max_crops: int) -> tuple[int, int]:
    """Rows and columns of tiles: those that enlarge least, else those that shrink least."""
    choices = sorted(
        ((r, c) for r in range(1, max_crops + 1) for c in range(1, max_crops // r + 1)),
        key=lambda choice: (choice[0] * choice[1], choice[0]),
    )
    inner = np.array([height - margin, width - margin], dtype=np.float32)
    with np.errstate(divide="ignore"):
        scales = (np.array(choices, dtype=np.float32) * np.float32(window) / inner).min(axis=1)
    if (scales < 1).all():
        return choices[int(scales.argmax())]
    return choices[int(np.where(scales < 1, np.float32(10e9), scales).argmin())]


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear between the four nearest pixels, rounded half to even, a channel at a time."""
    out = np.empty((height, width, 3), dtype=np.uint8)
    for channel in range(3):
        plane = torch.from_numpy(pixels[:, :, channel].astype(np.float32))[None, None]
        values = F.interpolate(plane, (height, width), mode="bilinear", align_corners=False)
        out[:, :, channel] = values[0, 0].round_().clamp_(0, 255).to(torch.uint8).numpy()
    return out


def cut(crops: np.ndarray, patch: int) -> np.ndarray:
    """(M, S, S, 3) -> (M, N, 3*P*P): patches row by row, in each row, column, channel."""
    count, side = len(crops), crops.shape[1] // patch
    pieces = crops.reshape(count, side, patch, side, patch, 3).swapaxes(2, 3)
    return pieces.reshape(count, side * side, patch * patch * 3)


def normalise(
    patches: np.ndarray, patch: int, mean: Sequence[float], std: Sequence[float]
) -> np.ndarray:
    """(value - 255 mean) / (255 std) in float32."""
    means = (torch.tensor(list(mean)) * 255).repeat(patch**2)
    stds = (torch.tensor(list(std)) * 255).repeat(patch**2)
    return torch.from_numpy(patches).float().sub_(means).div_(stds).numpy()


def pool_windows(index: np.ndarray, pool: int) -> tuple[np.ndarray, int, int]:
    """A grid of patches in windows of pool x pool, -1 where they reach over it; rows, columns."""
    missing = [-length % pool for length in index.shape]
    index = np.pad(index, [(m // 2, (m + 1) // 2) for m in missing], constant_values=-1)
    rows, cols = index.shape[0] // pool, index.shape[1] // pool
    windows = index.reshape(rows, pool, cols, pool).swapaxes(1, 2)
    return windows.reshape(rows * cols, pool * pool), rows, cols


def counted_on(index: Sequence[np.ndarray], patches: Sequence[int]) -> np.ndarray:
    """The pooling indices of several pictures, each counting its own patches from 0, in one.

    The patches of the pictures before are added, which is what transformers' network reads. vLLM
    adds them itself, where it puts its batch together, so in a process of vLLM they are left out.
    """
    if "vllm" in sys.modules:
        return np.concatenate(index)
    firsts = np.cumsum([0, *patches[:-1]])
    return np.concatenate(
        [np.where(rows < 0, rows, rows + first) for rows, first in zip(index, firsts, strict=True)]
    )


def kept_of(tile: int, tiles: int, left: int, right: int) -> slice:
    """A tile's patches along one axis without those that are its neighbours' too."""
    return slice(left if tile > 0 else 0, -right if right and tile < tiles - 1 else None)


def _flat(images: Any) -> list[Any]:
    """One picture, a list, or a list of lists for each prompt."""
    if not isinstance(images, (list, tuple)):
        return [images]
    return [image for item in images for image in _flat(item)]
