"""Prompts, pictures and videos to inputs, for programs that take this from the checkpoint (vLLM).

Written into exported folders by NanoMolmo2, which it does not need. transformers 5.23 and newer
have a class of their own and take this one only with ``trust_remote_code=True``.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin

from .image_processing_molmo2 import Molmo2ImageProcessor
from .video_processing_molmo2 import Molmo2VideoProcessor

IMAGE, VIDEO = "<|image|>", "<|video|>"
PATCH, COLUMN = "<im_patch>", "<im_col>"
START, LOW_START, END = "<im_start>", "<low_res_im_start>", "<im_end>"
FRAME_START, FRAME_END = "<frame_start>", "<frame_end>"
# They see each other in both directions.
TYPED = (PATCH, COLUMN, START, LOW_START, END, FRAME_START, FRAME_END, "<im_low>")

_TEXT_OPTIONS = (
    *("padding", "padding_side", "pad_to_multiple_of", "truncation", "max_length"),
    "return_attention_mask",
)
_IMAGE_OPTIONS = ("max_crops",)
_VIDEO_OPTIONS = ("video_metadata", "do_sample_frames", "num_frames", "max_fps")


class Molmo2Processor(ProcessorMixin):
    """Puts the tokens of pictures and frames into a prompt, and their patches beside it."""

    def __init__(
        self,
        image_processor: Any = None,
        video_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_use_col_tokens: bool = True,
        use_single_crop_col_tokens: bool = False,
        use_single_crop_start_token: bool = True,
        video_use_col_tokens: bool = False,
        use_frame_special_tokens: bool = False,
        **_: Any,
    ) -> None:
        super().__init__(image_processor, video_processor, tokenizer, chat_template=chat_template)
        self.image_use_col_tokens = image_use_col_tokens
        self.use_single_crop_col_tokens = use_single_crop_col_tokens
        self.use_single_crop_start_token = use_single_crop_start_token
        self.video_use_col_tokens = video_use_col_tokens
        self.use_frame_special_tokens = use_frame_special_tokens
        self.image_token, self.video_token = IMAGE, VIDEO
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        self.video_token_id = tokenizer.convert_tokens_to_ids(VIDEO)
        self._typed_ids = tokenizer.convert_tokens_to_ids(list(TYPED))

    @classmethod
    def _get_arguments_from_pretrained(
        cls, path: Any, processor_dict: Any = None, **kwargs: Any
    ) -> list[Any]:
        """The three parts, by the classes of this folder: transformers' way to the one for videos
        asks for torchvision, which none of them needs."""
        classes = (Molmo2ImageProcessor, Molmo2VideoProcessor, AutoTokenizer)
        return [part.from_pretrained(path, **kwargs) for part in classes]

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        """As this folder says; transformers' own classes can not be named without torchvision."""
        return type(argument)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        for name in ("image_token_id", "video_token_id", "_typed_ids"):
            values.pop(name, None)
        return values

    @property
    def model_input_names(self) -> list[str]:
        return [
            *(*self.tokenizer.model_input_names, "mm_token_type_ids"),
            *self.image_processor.model_input_names,
            *self.video_processor.model_input_names,
        ]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prompts with ``<|image|>`` and ``<|video|>`` to ids and pixels.

        A prompt that does not begin with the begin token gets it; see the image and the video
        processor for the rest. ``mm_token_type_ids`` is 1 for what belongs to a picture or a frame.
        """
        options = dict(kwargs)
        for group in ("common_kwargs", "text_kwargs", "images_kwargs", "videos_kwargs"):
            options |= options.pop(group, None) or {}
        return_tensors = options.pop("return_tensors", None)
        shown, data = [], {}
        if images is not None and _any(images):
            given = {name: options[name] for name in _IMAGE_OPTIONS if name in options}
            data |= self.image_processor(images, **given)
            shown = [self.image_text(*grid) for grid in data["image_grids"].tolist()]
        spoken = []
        if videos is not None and _any(videos):
            given = {name: options[name] for name in _VIDEO_OPTIONS if name in options}
            found = dict(self.video_processor(videos, return_metadata=True, **given))
            about = found.pop("video_metadata")
            data |= found
            spoken = [
                self.video_text(grid, self._times(grid[0], metadata))
                for grid, metadata in zip(found["video_grids"].tolist(), about, strict=True)
            ]
        if text is not None:
            prompts = [text] if isinstance(text, str) else list(text)
            given = {name: options[name] for name in _TEXT_OPTIONS if name in options}
            data = {**self._encode(_filled(prompts, shown, spoken), given), **data}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _encode(self, prompts: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
        bos = self.tokenizer.bos_token or self.tokenizer.eos_token
        begun = [prompt if prompt.startswith(bos) else bos + prompt for prompt in prompts]
        encoded = dict(self.tokenizer(begun, add_special_tokens=False, **options))
        encoded["mm_token_type_ids"] = [
            np.isin(row, self._typed_ids).astype(np.int64).tolist() for row in encoded["input_ids"]
        ]
        return encoded

    def _times(self, frames: int, metadata: Any) -> list[float]:
        """Seconds of the frames, from their numbers in the video."""
        numbers = metadata.frames_indices
        fps = metadata.fps or self.video_processor.max_fps
        return [number / fps for number in (range(frames) if numbers is None else numbers)]

    def image_text(self, low_rows: int, low_cols: int, rows: int, cols: int) -> str:
        """The tokens of one picture: the overview, then the tiles with a column token a row."""
        low = self.use_single_crop_col_tokens
        low_row = PATCH * low_cols + COLUMN * int(self.image_use_col_tokens if low is None else low)
        row = PATCH * cols + COLUMN * int(self.image_use_col_tokens)
        start = LOW_START if self.use_single_crop_start_token else START
        return f"{start}{low_row * low_rows}{END}{START}{row * rows}{END}"

    def video_text(self, grid: Sequence[int], times: Sequence[float]) -> str:
        """The tokens of one video: every frame behind its second."""
        start, end = (FRAME_START, FRAME_END) if self.use_frame_special_tokens else (START, END)
        frame = (PATCH * grid[2] + COLUMN * int(self.video_use_col_tokens)) * grid[1]
        return " ".join(f"{time:.1f} {start}{frame}{end}" for time in times)


def _filled(prompts: Sequence[str], shown: Sequence[str], spoken: Sequence[str]) -> list[str]:
    """Prompts with the tokens of pictures and videos, in order, in place of what stands for them.

    Raises: ValueError for more or fewer places than there are pictures or videos.
    """
    for token, given in ((IMAGE, shown), (VIDEO, spoken)):
        places = sum(prompt.count(token) for prompt in prompts)
        if places != len(given):
            raise ValueError(
                f"the prompts have {places} {token}, but {len(given)} were given with them: write "
                f"one for each"
            )
    pictures, videos = iter(shown), iter(spoken)
    return ["".join(_pieces(prompt, pictures, videos)) for prompt in prompts]


def _pieces(prompt: str, pictures: Iterator[str], videos: Iterator[str]) -> Iterator[str]:
    for number, part in enumerate(prompt.split(IMAGE)):
        if number:
            yield next(pictures)
        for count, text in enumerate(part.split(VIDEO)):
            if count:
                yield next(videos)
            yield text


def _any(items: Any) -> bool:
    return not isinstance(items, (list, tuple)) or any(_any(item) for item in items)
