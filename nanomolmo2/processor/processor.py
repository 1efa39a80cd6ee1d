"""Processor: messages and pictures -> ids, labels and pixels; ids -> text.

Ids and labels are built from the same segments (`chat.py`), so the loss mask cannot drift from the
prompt. P below is the length of the prefix: what all branches of a message tree share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nanomolmo2.batch import IGNORED_LABEL, PREFIX_SUBSEGMENT
from nanomolmo2.config import Config
from nanomolmo2.processor.chat import (
    ChatFormat,
    Message,
    Segment,
    Turn,
    read_messages,
    render,
    render_prefix,
    render_turns,
    show_pictures,
    show_video,
)
from nanomolmo2.processor.crops import MultiCrop, pool_windows, shift_windows
from nanomolmo2.processor.image import Resample, load_image, preprocess
from nanomolmo2.processor.tokenizer import MOLMO2_TOKENS, Tokenizer, molmo2_tokenizer
from nanomolmo2.processor.video import Video, load_video

CONFIG_FILE = "processor_config.json"
TOKENIZER_FILE = "tokenizer.json"

# Beside the tokens that `ProcessorConfig` names: what else stands around crops and frames.
DETAILS_START, ROW_END = "<im_start>", "<im_col>"
FRAME_MARKS = ("<frame_start>", "<frame_end>")
# A video is text between frames, and a picture's tokens see each other: these are the latter.
_NOT_TYPED = ("<|image|>", "<|video|>")

LossWeighting = Literal["token", "sqrt", "molmo2"]


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


@dataclass(frozen=True)
class ProcessorConfig(Config):
    """How pictures and messages become numbers; saved beside the weights.

    The defaults are the base design: one `<|image_pad|>` a picture in Qwen3's chat format, which
    the model expands to its visual tokens. `ProcessorConfig.molmo2()` has Molmo2's.

    Attributes:
        chat_format: ``qwen3`` or ``molmo2``, see `chat.py`.
        image_size: side of the square a picture is resized to, pixels.
        resample: ``bicubic`` (SigLIP's processor) or ``bilinear``; both with antialias.
        image_mean, image_std: of red, green and blue, after the values were scaled.
        rescale_factor: 0..255 times this is 0..1.
        image_tokens: image tokens written for a picture; None writes one, which the model expands.
        multicrop: cut pictures into crops; image_size, resample, image_mean and image_std are then
            its own, and image tokens are written as it says. None: one view of a picture.
        video: take videos too, each frame as one crop of ``multicrop``, or, without crops, as a
            picture of ``image_tokens``; None: pictures only.
        image_token, image_start_token, image_end_token: special tokens of a picture; with crops
            the start token is the overview's.
        pad_token: special token that fills up rows.
        stop_tokens: special tokens that end an answer.
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
    image_token: str = "<|image_pad|>"
    image_start_token: str = "<|vision_start|>"
    image_end_token: str = "<|vision_end|>"
    pad_token: str = "<|endoftext|>"
    stop_tokens: tuple[str, ...] = ("<|im_end|>", "<|endoftext|>")

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
        if not all(std > 0 for std in self.image_std) or not self.rescale_factor > 0:
            raise ValueError(
                f"image_std {self.image_std} and rescale_factor {self.rescale_factor} must be "
                f"greater than 0: pixels are multiplied by the one and divided by the other"
            )
        if self.multicrop is not None:
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
        if not self.stop_tokens:
            raise ValueError("stop_tokens is empty, so no answer would end: name at least one")

    @classmethod
    def molmo2(cls, **fields: Any) -> Self:
        """Molmo2's chat format and picture tokens; ``fields`` set or replace other fields."""
        molmo2: dict[str, Any] = {
            "chat_format": "molmo2",
            "image_token": "<im_patch>",
            "image_start_token": "<low_res_im_start>",
            "image_end_token": "<im_end>",
        }
        if fields.get("multicrop") is not None:
            molmo2 |= _one_view(fields["multicrop"])
        return cls(**{**molmo2, **fields})


def _one_view(crops: MultiCrop) -> dict[str, Any]:
    """What a config says about pictures that `crops` says too."""
    return {
        "image_size": crops.image_size,
        "resample": "bilinear",
        "image_mean": crops.image_mean,
        "image_std": crops.image_std,
        "rescale_factor": 1 / 255,
        "image_tokens": None,
    }


@dataclass
class Encoded:
    """One example of T tokens and m pictures or a video; `collate` pads several to a Batch.

    ``labels`` are not shifted: the label at t is the token at t, -100 where nothing is learned.
    With crops, M crops (or frames) of N patches stand behind n image tokens of K patches each.
    """

    input_ids: NDArray[np.int64]  # (T,)
    position_ids: NDArray[np.int64]  # (T,)
    labels: NDArray[np.int64] | None = None  # (T,); None if no assistant has spoken
    loss_weights: NDArray[np.float32] | None = None  # (T,); None: 1 for every label
    subsegment_ids: NDArray[np.int64] | None = None  # (T,); only message trees have them
    pixel_values: NDArray[np.float32] | None = None  # (m, 3, S, S); with crops (M, N, 3*P*P)
    image_sizes: tuple[tuple[int, int], ...] = ()  # (width, height) of the originals, pixels
    image_token_pooling: NDArray[np.int64] | None = None  # (n, K), crop * N + patch; -1 empty
    image_grids: NDArray[np.int64] | None = None  # (m, 4) image tokens: overview, then details
    image_num_crops: NDArray[np.int64] | None = None  # (m,) adding up to M
    video_grids: NDArray[np.int64] | None = None  # (1, 3) frames, rows and columns of each
    frame_times: tuple[float, ...] = ()  # seconds
    video_size: tuple[int, int] | None = None  # (width, height) of every frame, pixels


class Processor:
    """Between people and the model: chat, pictures and tokenizer behind one object."""

    def __init__(self, config: ProcessorConfig, tokenizer: Tokenizer) -> None:
        """Raises: ValueError if the tokenizer lacks a special token that the config names."""
        self.config = config
        self.tokenizer = tokenizer
        self.image_token_id = tokenizer.special_id(config.image_token)
        self.pad_token_id = tokenizer.special_id(config.pad_token)
        self.stop_token_ids = tuple(tokenizer.special_id(name) for name in config.stop_tokens)
        names = [config.image_start_token, config.image_end_token, "<|im_start|>", "<|im_end|>"]
        if config.multicrop is not None:
            names += [DETAILS_START, ROW_END]
        if config.video is not None and config.video.use_frame_special_tokens:
            names += FRAME_MARKS
        for name in names:
            tokenizer.special_id(name)
        typed = {config.image_token, config.image_start_token, config.image_end_token}
        typed |= {*MOLMO2_TOKENS} & {*tokenizer.special_ids} - {*_NOT_TYPED}
        self._typed_ids = sorted(tokenizer.special_ids[name] for name in typed)
        self._picture = (
            config.image_start_token
            + config.image_token * (config.image_tokens or 1)
            + config.image_end_token
        )
        self._prefix = lru_cache(maxsize=64)(self._encode_prefix)

    # ---- messages and pictures -> numbers ----

    def encode(
        self,
        messages: Sequence[Message],
        images: Sequence[Any] | None = None,
        *,
        video: Any = None,
        add_generation_prompt: bool = True,
    ) -> Encoded:
        """One conversation; its assistant turns are labelled.

        Pictures stand in the messages, or beside them in ``images``, or as items
        ``{"type": "image"}`` in the messages that take the next of ``images``. A conversation may
        show a video instead, likewise in the messages or beside them.

        With crops (the Molmo2 design) the prompt is as the released template renders it; see
        `chat.py`.

        Args:
            messages: see `chat.read_messages`.
            images: anything `load_image` takes; without crops also arrays (S, S, 3) of uint8, and
                float arrays and tensors (3, S, S) that are already normalised.
            video: anything `video.load_video` takes.
            add_generation_prompt: let the prompt end where the answer begins, if the user spoke
                last.
        Raises: ValueError for messages out of order, pictures that do not add up or open, and
            pictures beside a video.
        """
        has_crops = self.config.multicrop is not None
        turns = read_messages(messages, styled=has_crops)
        visual = self._load_visual(_gather_pictures(turns, images), _gather_video(turns, video))
        segments = render(
            self.config.chat_format,
            turns,
            visual.segments,
            add_generation_prompt,
            released=has_crops,
        )
        ids, labels = self._encode_segments(segments)
        return Encoded(
            input_ids=np.array(ids, dtype=np.int64),
            position_ids=np.arange(len(ids)),
            labels=(
                np.array(labels, dtype=np.int64)
                if any(turn.role == "assistant" for turn in turns)
                else None
            ),
            **visual.fields,
        )

    def apply(
        self,
        messages: Sequence[Message],
        images: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        *,
        video: Any = None,
    ) -> dict[str, NDArray[Any]]:
        """`encode` as a mapping of arrays by the names that transformers' processor uses.

        Returns: ``input_ids``, ``token_type_ids`` (1 = belongs to a picture: image tokens and the
            start, row and end tokens around them, not times and numbers) and ``labels`` (-100
            outside of answers), each (T,) int64; with pictures ``pixel_values``,
            ``image_token_pooling``, ``image_grids``, ``image_num_crops``, with a video
            ``video_grids`` instead of the last two; all as in `Encoded`, without a batch dimension.
        """
        encoded = self.encode(
            messages, images, video=video, add_generation_prompt=add_generation_prompt
        )
        ids = encoded.input_ids
        arrays = {
            "input_ids": ids,
            "token_type_ids": np.isin(ids, self._typed_ids).astype(np.int64),
            "labels": (
                encoded.labels if encoded.labels is not None else np.full_like(ids, IGNORED_LABEL)
            ),
            "pixel_values": encoded.pixel_values,
            "image_token_pooling": encoded.image_token_pooling,
            "image_grids": encoded.image_grids,
            "image_num_crops": encoded.image_num_crops,
            "video_grids": encoded.video_grids,
        }
        return {name: array for name, array in arrays.items() if array is not None}

    def encode_tree(
        self,
        images: Sequence[Any] | None,
        branches: Sequence[Sequence[Message]],
        *,
        video: Any = None,
        loss_weighting: LossWeighting = "token",
        branch_weights: Sequence[float] | None = None,
    ) -> Encoded:
        """Several conversations about the same pictures in one sequence.

        The prefix (beginning and pictures) has subsegment 10000 and positions 0 .. P-1; branch k
        has subsegment k and positions from P, and ends with its ``<|im_end|>``. Turns are laid out
        as in Molmo2's training, without the space that the released template has before answers.

        Args:
            images: as for `encode`; may be empty or None.
            branches: conversations without pictures and system messages; each ends with an answer.
            video: as for `encode`.
            loss_weighting: what a label of a branch with n labels weighs: 1 (``token``), 1/sqrt(n)
                (``sqrt``), or Molmo2's 2/sqrt(n) over the square root of the number of branches
                (``molmo2``; the last end of a branch is not counted in n if there are several).
            branch_weights: one more factor for each branch.
        Raises: ValueError naming the branch.
        Source: Molmo2, olmo/preprocessing/text_preprocessor.py, README "Message Trees".
        """
        if loss_weighting not in get_args(LossWeighting):
            raise ValueError(
                f"loss_weighting is {loss_weighting!r}, expected 'token' (every label weighs 1), "
                f"'sqrt' (1/sqrt(n) in a branch of n labels) or 'molmo2' (2/sqrt(n)/sqrt(branches))"
            )
        if not branches:
            raise ValueError("a message tree needs at least one branch")
        if branch_weights is not None and len(branch_weights) != len(branches):
            raise ValueError(
                f"found {len(branch_weights)} branch_weights for {len(branches)} branches: give "
                f"one each"
            )
        visual = self._load_visual(_several(images), video)
        prefix = self._prefix(visual.segments)
        num_prefix = len(prefix)

        ids, labels, weights = list(prefix), [IGNORED_LABEL] * num_prefix, [0.0] * num_prefix
        lengths = []
        for number, messages in enumerate(branches):
            segments = self._render_branch(messages, number)
            branch_ids, branch_labels = self._encode_segments(segments)
            num_labels = len(branch_labels) - branch_labels.count(IGNORED_LABEL)
            weight = _label_weight(loss_weighting, num_labels, len(branches))
            if branch_weights is not None:
                weight *= branch_weights[number]
            ids += branch_ids
            labels += branch_labels
            weights += [0.0 if label == IGNORED_LABEL else weight for label in branch_labels]
            lengths.append(len(branch_ids))

        # Position within the branch = index - start of the branch + P; the prefix starts at -P + P.
        starts = np.cumsum([0, *lengths[:-1]])
        positions = np.arange(len(ids))
        positions[num_prefix:] -= np.repeat(starts, lengths)
        return Encoded(
            input_ids=np.array(ids, dtype=np.int64),
            position_ids=positions,
            labels=np.array(labels, dtype=np.int64),
            loss_weights=np.array(weights, dtype=np.float32),
            subsegment_ids=np.repeat(
                [PREFIX_SUBSEGMENT, *range(len(lengths))], [num_prefix, *lengths]
            ),
            **visual.fields,
        )

    def load_images(
        self, images: Sequence[Any] | None
    ) -> tuple[NDArray[np.float32] | None, tuple[tuple[int, int], ...]]:
        """Pictures -> (``pixel_values`` or None without pictures, their original sizes).

        ``pixel_values`` is (m, 3, S, S) float32, with crops (M, N, 3*P*P).
        """
        fields = self._load_visual(_several(images)).fields
        return fields.get("pixel_values"), fields.get("image_sizes", ())

    def _load_visual(self, images: Sequence[Any], video: Any = None) -> _Visual:
        """What a conversation shows: as it stands in the prompt, and as fields of `Encoded`."""
        if video is not None:
            if len(images):
                raise ValueError(
                    f"found {len(images)} pictures beside a video: a conversation shows pictures "
                    f"or one video, so leave one of them out"
                )
            return self._load_video(video)
        if not len(images):
            return _Visual((), {})
        if self.config.multicrop is not None:
            return self._load_crops(images, self.config.multicrop)
        loaded = [self._load_image(image) for image in images]
        fields = {
            "pixel_values": np.stack([picture.pixels for picture in loaded]),
            "image_sizes": tuple(picture.size for picture in loaded),
        }
        pictures = [self._picture] * len(loaded)
        return _Visual(show_pictures(self.config.chat_format, pictures), fields)

    def _load_crops(self, images: Sequence[Any], multicrop: MultiCrop) -> _Visual:
        loaded = [load_image(image) for image in images]
        crops = [multicrop(image) for image in loaded]
        num_crops = [len(picture["pixel_values"]) for picture in crops]
        firsts = np.cumsum([0, *num_crops[:-1]])
        pooling = [
            shift_windows(picture["image_token_pooling"], first * multicrop.num_patches)
            for picture, first in zip(crops, firsts, strict=True)
        ]
        grids = np.stack([picture["image_grid"] for picture in crops])
        pictures = [self._picture_of_crops(*grid) for grid in grids.tolist()]
        fields = {
            "pixel_values": np.concatenate([picture["pixel_values"] for picture in crops]),
            "image_sizes": tuple(image.size for image in loaded),
            "image_token_pooling": np.concatenate(pooling),
            "image_grids": grids,
            "image_num_crops": np.array(num_crops, dtype=np.int64),
        }
        return _Visual(show_pictures(self.config.chat_format, pictures), fields)

    def _picture_of_crops(self, low_rows: int, low_cols: int, rows: int, cols: int) -> str:
        """The overview, then the detailed view, where every row ends with a token of its own."""
        config = self.config
        overview = config.image_token * (low_rows * low_cols)
        details = (config.image_token * cols + ROW_END) * rows
        return (
            f"{config.image_start_token}{overview}{config.image_end_token}"
            f"{DETAILS_START}{details}{config.image_end_token}"
        )

    def _load_video(self, source: Any) -> _Visual:
        settings, multicrop = self.config.video, self.config.multicrop
        if settings is None:
            raise ValueError(
                "found a video, but this processor takes pictures only: use one whose config has "
                "`video`, such as molmo2_processor(...)"
            )
        video = load_video(source, max_frames=settings.max_frames, max_fps=settings.max_fps)
        if multicrop is None:
            return self._load_frames(video)
        side, num_frames = multicrop.patches_per_side, len(video.frames)
        patches = np.empty(
            (num_frames, multicrop.num_patches, 3 * multicrop.patch_size**2), dtype=np.float32
        )
        for number, frame in enumerate(video.frames):
            repeated = number > 0 and frame is video.frames[number - 1]
            patches[number] = patches[number - 1] if repeated else multicrop.frame(frame)
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
        return _Visual(show_video(video.times, frame_text), fields)

    def _load_frames(self, video: Video) -> _Visual:
        """Frames as the pictures that a processor without crops makes."""
        fields = {
            "pixel_values": np.stack([self._load_image(frame).pixels for frame in video.frames]),
            "frame_times": tuple(video.times),
            "video_size": video.size,
        }
        return _Visual(show_video(video.times, self._picture), fields)

    def _load_image(self, image: Any) -> _Picture:
        config = self.config
        side = config.image_size
        if hasattr(image, "detach"):  # a torch tensor, without importing torch for it
            image = image.detach().cpu().float().numpy()
            if image.shape != (3, side, side):
                raise ValueError(
                    f"found a tensor of shape {image.shape}, expected a normalised picture (3, "
                    f"{side}, {side}): give a PIL image or a numpy array to have it resized"
                )
        is_array = isinstance(image, np.ndarray)
        if is_array and image.shape == (3, side, side) and image.dtype.kind == "f":
            return _Picture(image.astype(np.float32, copy=False), (side, side))
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
        return _Picture(pixels, size)

    def _encode_prefix(self, visual: tuple[Segment, ...]) -> tuple[int, ...]:
        segments = render_prefix(self.config.chat_format, visual)
        return tuple(self._encode_segments(segments)[0])

    def _render_branch(self, messages: Sequence[Message], number: int) -> list[Segment]:
        try:
            turns = read_messages(messages, styled=self.config.multicrop is not None)
        except ValueError as error:
            raise ValueError(f"branch {number}: {error}") from None
        if turns[0].role != "user" or any(turn.images or turn.videos for turn in turns):
            raise ValueError(
                f"branch {number} holds a picture, a video, a system message or a subtitle: "
                f"branches share what is given for the tree and have no more"
            )
        if turns[-1].role != "assistant":
            raise ValueError(
                f"branch {number} ends with a question: every branch of a message tree is learned, "
                f"so give its answer"
            )
        return render_turns(self.config.chat_format, turns)

    def _encode_segments(self, segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
        """(ids, labels) of segments; the only place where a label is made."""
        ids: list[int] = []
        labels: list[int] = []
        rest = ""  # plain end of a control string, to be encoded in one piece with the text after
        for number, (text, is_control, is_answer) in enumerate(segments):
            if is_control:
                following = segments[number + 1] if number + 1 < len(segments) else None
                if following is not None and not following.is_control and not following.is_answer:
                    # "user\n" + "\nhello": Qwen has one token for two newlines, and so a prompt
                    # encoded as a whole would have it.
                    text, rest = self.tokenizer.split_control(text)
                new = self.tokenizer.encode_control(text)
            else:
                new = self.tokenizer.encode_text(rest + text)
                rest = ""
            ids += new
            labels += new if is_answer else [IGNORED_LABEL] * len(new)
        return ids, labels

    # ---- numbers -> text ----

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of generated ids (a list, array or tensor of one dimension)."""
        return self.tokenizer.decode(ids, skip_special_tokens)

    # ---- files ----

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.config, self.tokenizer)  # for worker processes: without the caches

    def save(self, directory: str | Path) -> None:
        """Write processor_config.json and tokenizer.json; each is complete or not there."""
        directory = Path(directory)
        self.tokenizer.save(directory / TOKENIZER_FILE)
        self.config.save(directory / CONFIG_FILE)

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read what `save` wrote.

        Raises: FileNotFoundError; ValueError naming the file that is not as expected.
        """
        directory = Path(directory)
        path = directory / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no {path}: expected a folder that Processor.save or "
                f"NanoMolmo2.save_pretrained wrote"
            )
        return cls(ProcessorConfig.load(path), Tokenizer.from_file(directory / TOKENIZER_FILE))


def molmo2_processor(
    tokenizer_json_path: str | Path, max_crops: int = 8, *, vocab_size: int | None = None
) -> Processor:
    """The processor of Molmo2 4B and 8B: crops, videos, and prompts as their release has them.

    Args:
        tokenizer_json_path: Qwen3's ``tokenizer.json`` or its folder, or one that already has
            Molmo2's tokens; see `tokenizer.molmo2_tokenizer`, also for ``vocab_size``.
        max_crops: most tiles of a picture, see `MultiCrop`.
    Raises: FileNotFoundError, ValueError for a tokenizer that is not as expected.
    """
    config = ProcessorConfig.molmo2(multicrop=MultiCrop(max_crops), video=VideoConfig())
    return Processor(config, molmo2_tokenizer(tokenizer_json_path, vocab_size=vocab_size))


class _Visual(NamedTuple):
    segments: tuple[Segment, ...]  # between the beginning of the prompt and the first user
    fields: dict[str, Any]  # of `Encoded`


class _Picture(NamedTuple):
    pixels: NDArray[np.float32]  # (3, S, S)
    size: tuple[int, int]  # (width, height) of the original


def _label_weight(weighting: LossWeighting, num_labels: int, num_branches: int) -> float:
    """Source of ``molmo2``: olmo/preprocessing/text_preprocessor.py (the report has 4/sqrt(n))."""
    if weighting == "token":
        return 1.0
    if weighting == "sqrt":
        return float(num_labels**-0.5)
    counted = num_labels if num_branches == 1 else max(1, num_labels - 1)
    return float(2 * (counted * num_branches) ** -0.5)


def _several(images: Sequence[Any] | None) -> Sequence[Any]:
    """Refuse one picture where a list is meant; the rows of an array would pass for pictures."""
    if images is None:
        return ()
    if isinstance(images, (str, bytes, Path, Image.Image)) or getattr(images, "ndim", 4) != 4:
        raise ValueError(
            f"images must be a list, found one {type(images).__name__}: put a single picture into "
            f"a list"
        )
    return images


def _gather_pictures(turns: Sequence[Turn], images: Sequence[Any] | None) -> list[Any]:
    """All pictures of a conversation in order, from the messages and from beside them."""
    in_messages = [image for turn in turns for image in turn.images]
    beside = list(_several(images))
    if not in_messages:
        return beside
    num_open = sum(image is None for image in in_messages)
    if num_open != len(beside):
        raise ValueError(
            f"the messages have {num_open} image items without a picture, but {len(beside)} "
            f"pictures were given beside them: give one for each, or put the pictures into the "
            f"messages"
        )
    remaining = iter(beside)
    return [next(remaining) if image is None else image for image in in_messages]


def _gather_video(turns: Sequence[Turn], video: Any) -> Any:
    """The video of a conversation, from the messages or from beside them; None without one."""
    in_messages = [found for turn in turns for found in turn.videos]
    if not in_messages:
        return video
    if len(in_messages) > 1:
        raise ValueError(
            f"the messages hold {len(in_messages)} videos: a conversation shows one at most"
        )
    if (in_messages[0] is None) == (video is None):
        raise ValueError(
            "the messages have a video item without a video, and none was given beside them: put "
            "it into the item, or give video=..."
            if video is None
            else "found a video in the messages and one beside them: give it once"
        )
    return video if in_messages[0] is None else in_messages[0]
