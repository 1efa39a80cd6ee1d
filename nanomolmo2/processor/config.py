"""What a processor is told: how images, videos and messages become numbers.

Saved beside the weights. `ProcessorConfig()` is the base design's, `ProcessorConfig.molmo2()`
that of Molmo2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Self, get_args

from nanomolmo2.config import Config
from nanomolmo2.processor.chat import ChatFormat
from nanomolmo2.processor.crops import MultiCrop
from nanomolmo2.processor.image import Resample

# The most that a setting may ask for: a file of a few bytes is not to cost gigabytes. The released
# models have 378 pixels, 729 patches and 8 to 24 crops; images of 4,096 tokens fill a context.
_MOST_PIXELS = 2_048  # a side
_MOST_PATCHES = 256  # a side
_MOST_TOKENS = 65_536  # of an image
_MOST_CROPPED = 50_000_000  # pixels of all crops of an image
_MOST_FRAMES = 100_000

_SOURCE_NAME = (
    r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"  # of a built-in source of data: no path, no address
)


@dataclass(frozen=True)
class VideoConfig(Config):
    """Which frames of a video are taken and how they are written.

    Attributes:
        max_frames: most frames of a video.
        max_fps: most frames a second.
        pooling_size: side of a frame's pooling window, patches.
        use_frame_special_tokens: mark frames by ``<frame_start>``, ``<frame_end>``; the released
            models were made with ``<im_start>``, ``<im_end>``.
    """

    max_frames: int = 384
    max_fps: float = 2.0
    pooling_size: int = 3
    use_frame_special_tokens: bool = False

    def __post_init__(self) -> None:
        self.check_positive()
        if not self.max_fps > 0:
            raise ValueError(f"max_fps ({self.max_fps}) must be greater than 0")
        _check_most("max_frames", self.max_frames, _MOST_FRAMES)
        _check_most("pooling_size", self.pooling_size, _MOST_PATCHES)


@dataclass(frozen=True)
class PointTokens(Config):
    """How a model that points by selecting what it sees (MolmoPoint) writes its points.

    A point is three marker tokens: one that selects a row (a visual token), one a slot (a patch in
    the row's window), and one a cell of the patch's 3 x 3.

    Attributes:
        patch_token, subpatch_token, location_token: special tokens, the markers of row, slot, cell.
        overview_token: special token of the overview's visual tokens, which cannot be selected; of
            processors with crops. None: written like others.
        num_embeddings: V, ids that have an embedding, which is the id of the first class of a
            point. None: as many as the tokenizer has.
        points_in_prompt: a point in a question is written as three markers too; otherwise as text
            coordinates, which is what the released models learned.
        patch_size, pooling_size: sides of a patch, pixels, and of a pooling window, patches, where
            images are not cut into crops; with crops `MultiCrop` says both.
    """

    patch_token: str = "<|token_index|>"
    subpatch_token: str = "<|vit_index|>"
    location_token: str = "<|vit_loc|>"
    overview_token: str | None = "<im_low>"
    num_embeddings: int | None = None
    points_in_prompt: bool = False
    patch_size: int = 14
    pooling_size: int = 2

    def __post_init__(self) -> None:
        self.check_positive()
        if len({*self.markers}) < 3:
            raise ValueError(
                f"the markers of row, slot and cell are {', '.join(self.markers)}, expected three "
                f"different tokens"
            )

    @property
    def markers(self) -> tuple[str, str, str]:
        """The tokens of row, slot and cell."""
        return self.patch_token, self.subpatch_token, self.location_token


@dataclass(frozen=True)
class ProcessorConfig(Config):
    """How images and messages become numbers; saved beside the weights.

    The defaults are the base design: one `<|image_pad|>` an image in Qwen3's chat format, which
    the model expands to its visual tokens. `ProcessorConfig.molmo2()` has Molmo2's.

    Attributes:
        chat_format: ``qwen3`` or ``molmo2``, see `chat.py`.
        image_size: side of the square an image is resized to, pixels.
        resample: ``bicubic`` (SigLIP's processor) or ``bilinear``; both with antialias.
        image_mean, image_std: of red, green and blue, after the values were scaled.
        rescale_factor: 0..255 times this is 0..1.
        image_tokens: image tokens written for an image; None writes one, which the model expands.
        multicrop: cut images into crops; image_size, resample, image_mean and image_std are then
            its own, and image tokens are written as it says. None: one view of an image.
        video: take videos too, each frame as one crop of ``multicrop``, or, without crops, as a
            image of ``image_tokens``; None: images only.
        points: write points as selections of what is seen; None: as text coordinates.
        image_token, image_start_token, image_end_token: special tokens of an image; with crops
            the start token is the overview's.
        pad_token: special token that fills up rows.
        stop_tokens: special tokens that end an answer.
        trained_on: names of the built-in sources of data (`data/registry.py`) that the model has
            learned from, for its card and for `training/replay.py`. Other names do nothing.
    """

    chat_format: ChatFormat = "qwen3"
    image_size: int = 384
    resample: Resample = "bicubic"
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    image_tokens: int | None = None
    multicrop: MultiCrop | None = None
    video: VideoConfig | None = None
    points: PointTokens | None = None
    image_token: str = "<|image_pad|>"
    image_start_token: str = "<|vision_start|>"
    image_end_token: str = "<|vision_end|>"
    pad_token: str = "<|endoftext|>"
    stop_tokens: tuple[str, ...] = ("<|im_end|>", "<|endoftext|>")
    trained_on: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, kind in (("chat_format", ChatFormat), ("resample", Resample)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of "
                    f"{', '.join(get_args(kind))}"
                )
        if self.image_size < 1:
            raise ValueError(f"image_size ({self.image_size}) must be at least 1 pixel")
        if self.image_tokens is not None and self.image_tokens < 1:
            raise ValueError(
                f"image_tokens ({self.image_tokens}) must be at least 1, or None to let the model "
                f"expand one image token to its visual tokens"
            )
        _check_most("image_size", self.image_size, _MOST_PIXELS)
        _check_most("image_tokens", self.image_tokens or 1, _MOST_TOKENS)
        if not all(std > 0 for std in self.image_std) or not self.rescale_factor > 0:
            raise ValueError(
                f"image_std {self.image_std} and rescale_factor {self.rescale_factor} must be "
                f"greater than 0: pixels are multiplied by the one and divided by the other"
            )
        if self.multicrop is not None:
            _check_most("patches a side", self.multicrop.patches_per_side, _MOST_PATCHES)
            _check_most("pooling_size", self.multicrop.pooling_size, _MOST_PATCHES)
            pixels = self.multicrop.max_crops * self.image_size**2
            _check_most("max_crops times the pixels of a crop", pixels, _MOST_CROPPED)
            for name, expected in _one_view(self.multicrop).items():
                if getattr(self, name) != expected:
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r}, but multicrop says {expected!r}: give "
                        f"both the same, or use ProcessorConfig.molmo2(multicrop=...)"
                    )
        elif self.video is not None and self.image_tokens is None:
            raise ValueError(
                "video is set, and neither multicrop nor image_tokens is: say how many tokens a "
                "frame has"
            )
        if self.points is not None and self.multicrop is None:
            self._check_windows(self.points)
        for name in self.trained_on:
            if not re.fullmatch(_SOURCE_NAME, name):
                raise ValueError(
                    f"trained_on names {name!r:.60}, expected names of built-in sources of data, "
                    f"such as 'emoji', of letters, digits, '-' and '_'"
                )
        if not self.stop_tokens:
            raise ValueError("stop_tokens is empty, so no answer would end: name at least one")

    def _check_windows(self, points: PointTokens) -> None:
        """Without crops an image is one square of patches, pooled in square windows."""
        side, rest = divmod(self.image_size, points.patch_size)
        if rest:
            raise ValueError(
                f"image_size ({self.image_size}) must be a multiple of the patch_size of points "
                f"({points.patch_size}): a point selects a whole patch"
            )
        windows = (-(-side // points.pooling_size)) ** 2
        if self.image_tokens not in (None, windows):
            raise ValueError(
                f"image_tokens is {self.image_tokens}, but {side} x {side} patches in windows of "
                f"{points.pooling_size} x {points.pooling_size}, which points say, are {windows}: "
                f"give points the patch_size and pooling_size of the model"
            )

    @classmethod
    def molmo2(cls, **fields: Any) -> Self:
        """Molmo2's chat format and image tokens; ``fields`` set or replace other fields."""
        molmo2: dict[str, Any] = {
            "chat_format": "molmo2",
            "image_token": "<im_patch>",
            "image_start_token": "<low_res_im_start>",
            "image_end_token": "<im_end>",
        }
        if fields.get("multicrop") is not None:
            molmo2 |= _one_view(fields["multicrop"])
        return cls(**{**molmo2, **fields})


def _check_most(name: str, found: int, most: int) -> None:
    if found > most:
        raise ValueError(f"{name} ({found:,}) must be at most {most:,}")


def _one_view(crops: MultiCrop) -> dict[str, Any]:
    """What a config says about images that `crops` says too."""
    return {
        "image_size": crops.image_size,
        "resample": "bilinear",
        "image_mean": crops.image_mean,
        "image_std": crops.image_std,
        "rescale_factor": 1 / 255,
        "image_tokens": None,
    }
