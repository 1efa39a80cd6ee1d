"""Images and videos -> pixels, and the tokens that stand for them in a prompt.

The base design writes the same tokens for every image; with crops (Molmo2) an image has as many as
its crops, and a video as many as its frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from nanomolmo2.processor.chat import Segment, show_images, show_video
from nanomolmo2.processor.config import ProcessorConfig
from nanomolmo2.processor.crops import MultiCrop, pool_windows, shift_windows
from nanomolmo2.processor.image import load_image, preprocess
from nanomolmo2.processor.point import Size
from nanomolmo2.processor.point_space import View
from nanomolmo2.processor.sampling import Frame, Sampled
from nanomolmo2.processor.video import VideoSource, sample_video

# Beside the tokens that `ProcessorConfig` names: what else stands around crops and frames.
DETAILS_START, ROW_END = "<im_start>", "<im_col>"
FRAME_MARKS = ("<frame_start>", "<frame_end>")


T = TypeVar("T")


class Visual(NamedTuple):
    """What a conversation shows."""

    segments: tuple[Segment, ...]  # between the beginning of the prompt and the first user
    fields: dict[str, Any]  # of `Encoded`


class _Loaded(NamedTuple):
    pixels: NDArray[np.float32]  # (3, S, S)
    size: tuple[int, int]  # (width, height) of the original


def _once(make: Callable[[Any], T], images: Sequence[Any]) -> list[T]:
    """What is made of each; of one object that comes several times, once."""
    images = list(images)  # an array makes new objects each time that one goes over it
    results = {key: make(image) for key, image in {id(i): i for i in images}.items()}
    return [results[id(image)] for image in images]


class VisualLoader:
    """Loads what a conversation shows, as a `ProcessorConfig` says."""

    def __init__(self, config: ProcessorConfig) -> None:
        self.config = config
        self._image_text = (
            config.image_start_token
            + config.image_token * (config.image_tokens or 1)
            + config.image_end_token
        )

    def load(self, images: Sequence[Any], video: VideoSource | None = None) -> Visual:
        """What a conversation shows: as it stands in the prompt, and as fields of `Encoded`.

        Raises: ValueError for images beside a video, and for what cannot be read.
        """
        if video is not None:
            if len(images):
                raise ValueError(
                    f"found {len(images)} pictures beside a video: a conversation shows pictures "
                    f"or one video, so leave one of them out"
                )
            return self._load_video(video)
        if not len(images):
            return Visual((), {})
        if self.config.multicrop is not None:
            return self._load_crops(images, self.config.multicrop)
        loaded = _once(self._load_image, images)
        fields = {
            "pixel_values": np.stack([image.pixels for image in loaded]),
            "image_sizes": tuple(image.size for image in loaded),
            **self._windows(len(loaded)),
        }
        texts = [self._image_text] * len(loaded)
        return Visual(show_images(self.config.chat_format, texts), fields)

    def _load_crops(self, images: Sequence[Any], multicrop: MultiCrop) -> Visual:
        def cut(source: Any) -> tuple[Size, dict[str, Any]]:
            image = load_image(source)  # one after the other: only the crops of each are kept
            return image.size, multicrop(image)

        made = _once(cut, images)
        sizes, crops = [size for size, _ in made], [crop for _, crop in made]
        num_crops = [len(image["pixel_values"]) for image in crops]
        firsts = np.cumsum([0, *num_crops[:-1]])
        pooling = [
            shift_windows(image["image_token_pooling"], first * multicrop.num_patches)
            for image, first in zip(crops, firsts, strict=True)
        ]
        grids = np.stack([image["image_grid"] for image in crops])
        texts = [self._text_of_crops(*grid) for grid in grids.tolist()]
        fields = {
            "pixel_values": np.concatenate([image["pixel_values"] for image in crops]),
            "image_sizes": tuple(sizes),
            "image_token_pooling": np.concatenate(pooling),
            "image_grids": grids,
            "image_num_crops": np.array(num_crops, dtype=np.int64),
        }
        return Visual(show_images(self.config.chat_format, texts), fields)

    def _text_of_crops(self, low_rows: int, low_cols: int, rows: int, cols: int) -> str:
        """The overview, then the detailed view, where every row ends with a token of its own."""
        config = self.config
        points = config.points
        low_token = points.overview_token if points is not None else None
        overview = (low_token or config.image_token) * (low_rows * low_cols)
        details = (config.image_token * cols + ROW_END) * rows
        return (
            f"{config.image_start_token}{overview}{config.image_end_token}"
            f"{DETAILS_START}{details}{config.image_end_token}"
        )

    def _load_video(self, source: VideoSource) -> Visual:
        settings, multicrop = self.config.video, self.config.multicrop
        if settings is None:
            raise ValueError(
                "found a video, but this processor takes pictures only: use one whose config has "
                "`video`, such as molmo2_processor(...)"
            )
        # Of a frame only what the model sees of it is kept, so a long video fits into memory.
        each = self._frame if multicrop is None else multicrop.overview
        video = sample_video(
            source, lambda *_: each, max_frames=settings.max_frames, max_fps=settings.max_fps
        )
        if multicrop is None:
            return self._load_frames(video)
        side, num_frames = multicrop.patches_per_side, len(video.frames)
        patches = np.empty(
            (num_frames, multicrop.num_patches, 3 * multicrop.patch_size**2), dtype=np.float32
        )
        for number, frame in enumerate(video.frames):
            repeated = number > 0 and frame is video.frames[number - 1]
            patches[number] = patches[number - 1] if repeated else multicrop.patches(frame)
        index, rows, cols = pool_windows(
            np.arange(side * side).reshape(side, side), settings.pooling_size
        )
        start, end = (
            FRAME_MARKS
            if settings.use_frame_special_tokens
            else (DETAILS_START, self.config.image_end_token)
        )
        fields = {
            "pixel_values": patches,
            "image_token_pooling": np.concatenate(
                [
                    shift_windows(index, number * multicrop.num_patches)
                    for number in range(num_frames)
                ]
            ),
            "video_grids": np.array([[num_frames, rows, cols]], dtype=np.int64),
            "frame_times": tuple(video.times),
            "video_size": video.size,
        }
        frame_text = f"{start}{self.config.image_token * (rows * cols)}{end}"
        return Visual(show_video(video.times, frame_text), fields)

    def _frame(self, frame: Frame) -> NDArray[np.float32]:
        return self._load_image(frame).pixels

    def _load_frames(self, video: Sampled) -> Visual:
        """Frames as the images that a processor without crops makes."""
        fields = {
            "pixel_values": np.stack(video.frames),
            "frame_times": tuple(video.times),
            "video_size": video.size,
            **self._windows(len(video.frames)),
        }
        return Visual(show_video(video.times, self._image_text), fields)

    def _windows(self, count: int) -> dict[str, Any]:
        """``image_token_pooling`` of uncropped images, which only points need."""
        points = self.config.points
        if points is None:
            return {}
        side = self.config.image_size // points.patch_size
        index = pool_windows(np.arange(side * side).reshape(side, side), points.pooling_size)[0]
        shifted = [shift_windows(index, number * side * side) for number in range(count)]
        return {"image_token_pooling": np.concatenate(shifted)}

    def views(self, fields: Mapping[str, Any]) -> tuple[View, ...]:
        """The grid of patches of each picture or frame that `load` gave the fields of."""
        config, multicrop = self.config, self.config.multicrop
        count = len(fields["frame_times"] if "frame_times" in fields else fields["image_sizes"])
        if multicrop is None:
            assert config.points is not None
            side, window = config.image_size // config.points.patch_size, config.points.pooling_size
        elif "frame_times" in fields:
            assert config.video is not None
            side, window = multicrop.patches_per_side, config.video.pooling_size
        else:
            return _details(multicrop, fields)
        each = (-(-side // window)) ** 2
        return tuple(View(number * each, side, side, window) for number in range(count))

    def _load_image(self, image: Any) -> _Loaded:
        config = self.config
        side = config.image_size
        # A torch tensor, without importing torch for it; open files have a `detach` too.
        if hasattr(image, "detach") and hasattr(image, "shape"):
            image = image.detach().cpu().float().numpy()
            if image.shape != (3, side, side):
                raise ValueError(
                    f"found a tensor of shape {image.shape}, expected a normalised picture (3, "
                    f"{side}, {side}): give a PIL image or a numpy array to have it resized"
                )
        is_array = isinstance(image, np.ndarray)
        if is_array and image.shape == (3, side, side) and image.dtype.kind == "f":
            return _Loaded(image.astype(np.float32, copy=False), (side, side))
        if is_array and image.shape == (side, side, 3) and image.dtype == np.uint8:
            size = (side, side)
        else:
            image = load_image(image)
            size = image.size
        pixels = preprocess(
            image,
            image_size=side,
            resample=config.resample,
            image_mean=config.image_mean,
            image_std=config.image_std,
            rescale_factor=config.rescale_factor,
        )
        return _Loaded(pixels, size)


def _details(multicrop: MultiCrop, fields: Mapping[str, Any]) -> tuple[View, ...]:
    """The detailed views of cropped images; before each come the rows of its overview."""
    views, first = [], 0
    grids = fields["image_grids"].tolist()
    for (low_rows, low_cols, rows, cols), size in zip(grids, fields["image_sizes"], strict=True):
        first += low_rows * low_cols
        views.append(View(first, *multicrop.patch_grid(*size), multicrop.pooling_size))
        first += rows * cols
    return tuple(views)
