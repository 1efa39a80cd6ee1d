"""Frames of a video to patches, for programs that take this step from the checkpoint (vLLM).

Written into exported folders by NanoMolmo2, which it does not need. A frame is one view without
tiles, pooled in larger windows than a picture.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import BatchFeature
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor

from .image_processing_molmo2 import (
    as_pixels,
    counted_on,
    cut,
    normalise,
    pool_windows,
    resize,
)


class Molmo2VideosKwargs(VideosKwargs, total=False):
    """What a program may set beside the file."""

    patch_size: int
    pooling_size: list[int]
    max_fps: float
    frame_sample_mode: str
    sampling_fps: int


class Molmo2VideoProcessor(BaseVideoProcessor):
    """Videos to patches and to the patches of each image token."""

    model_input_names = ["pixel_values_videos", "video_token_pooling", "video_grids"]
    valid_kwargs = Molmo2VideosKwargs
    return_metadata = True
    size = {"height": 378, "width": 378}
    patch_size = 14
    pooling_size = [3, 3]
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    num_frames = 384
    max_fps = 2.0
    sampling_fps = 2
    frame_sample_mode = "uniform_last_frame"
    do_sample_frames = True

    def sample_frames(
        self,
        metadata: Any,
        num_frames: int | None = None,
        max_fps: float | None = None,
        **_: Any,
    ) -> np.ndarray:
        """The frames that are looked at: first, last, and evenly between, ``max_fps`` at most."""
        total = metadata.total_num_frames
        most = num_frames or self.num_frames
        rate = max_fps or self.max_fps
        if total <= min(2, most):
            return np.arange(total)
        fps = metadata.fps or rate
        if total / fps > (most - 1) / rate:
            return np.linspace(0, total - 1, num=min(most, total)).astype(int)
        steps = np.round(np.arange(0.0, total - 1, fps / rate)).astype(int)
        return steps if steps[-1] == total - 1 else np.append(steps, total - 1)

    def _prepare_input_videos(self, videos: Sequence[Any], **_: Any) -> list[np.ndarray]:
        return [np.stack([as_pixels(frame) for frame in video]) for video in videos]

    def _preprocess(
        self, videos: Sequence[np.ndarray], return_tensors: Any = None, **_: Any
    ) -> BatchFeature:
        """Frames (T, H, W, 3) of each video to ``pixel_values_videos`` (frames, N, 3*P*P) float32,
        ``video_token_pooling`` (tokens, K) as of pictures, and ``video_grids`` (videos, 3):
        frames, rows and columns of tokens in each."""
        side, patch = self.size["height"], self.patch_size
        count = (side // patch) ** 2
        grid = np.arange(count).reshape(side // patch, -1)
        windows, rows, cols = pool_windows(grid, self.pooling_size[0])
        pixels, pooling, grids = [], [], []
        for video in videos:
            frames = np.stack([resize(frame, side, side) for frame in video])
            pixels.append(normalise(cut(frames, patch), patch, self.image_mean, self.image_std))
            frame_windows = [
                np.where(windows < 0, -1, windows + n * count) for n in range(len(video))
            ]
            pooling.append(np.concatenate(frame_windows))
            grids.append([len(video), rows, cols])
        data = {
            "pixel_values_videos": np.concatenate(pixels),
            "video_token_pooling": counted_on(pooling, [len(video) * count for video in videos]),
            "video_grids": np.array(grids, dtype=np.int64),
        }
        return BatchFeature(data=data, tensor_type=return_tensors)
