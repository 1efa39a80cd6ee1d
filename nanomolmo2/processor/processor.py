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
)
from nanomolmo2.processor.image import Resample, load_image, preprocess
from nanomolmo2.processor.tokenizer import Tokenizer

CONFIG_FILE = "processor_config.json"
TOKENIZER_FILE = "tokenizer.json"

IGNORED_LABEL = -100
PREFIX_SUBSEGMENT = 10000  # larger than any branch: branches see it, it sees no branch

LossWeighting = Literal["token", "sqrt"]


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
        image_token, image_start_token, image_end_token: special tokens of a picture.
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
        if not self.stop_tokens:
            raise ValueError("stop_tokens is empty, so no answer would end: name at least one")

    @classmethod
    def molmo2(cls, **fields: Any) -> Self:
        """Molmo2's chat format and picture tokens; ``fields`` set or replace other fields."""
        molmo2 = {
            "chat_format": "molmo2",
            "image_token": "<im_patch>",
            "image_start_token": "<low_res_im_start>",
            "image_end_token": "<im_end>",
        }
        return cls(**{**molmo2, **fields})


@dataclass
class Encoded:
    """One example of T tokens and m pictures; `collate` pads several to a Batch.

    ``labels`` are not shifted: the label at t is the token at t, -100 where nothing is learned.
    """

    input_ids: NDArray[np.int64]  # (T,)
    position_ids: NDArray[np.int64]  # (T,)
    labels: NDArray[np.int64] | None = None  # (T,); None if no assistant has spoken
    loss_weights: NDArray[np.float32] | None = None  # (T,); None: 1 for every label
    subsegment_ids: NDArray[np.int64] | None = None  # (T,); only message trees have them
    pixel_values: NDArray[np.float32] | None = None  # (m, 3, S, S)
    image_sizes: tuple[tuple[int, int], ...] = ()  # (width, height) of the originals, pixels


class Processor:
    """Between people and the model: chat, pictures and tokenizer behind one object."""

    def __init__(self, config: ProcessorConfig, tokenizer: Tokenizer) -> None:
        """Raises: ValueError if the tokenizer lacks a special token that the config names."""
        self.config = config
        self.tokenizer = tokenizer
        self.image_token_id = tokenizer.special_id(config.image_token)
        self.pad_token_id = tokenizer.special_id(config.pad_token)
        self.stop_token_ids = tuple(tokenizer.special_id(name) for name in config.stop_tokens)
        self._picture = (
            config.image_start_token
            + config.image_token * (config.image_tokens or 1)
            + config.image_end_token
        )
        for name in (config.image_start_token, config.image_end_token):
            tokenizer.special_id(name)
        for name in ("<|im_start|>", "<|im_end|>"):
            tokenizer.special_id(name)
        self._prefix = lru_cache(maxsize=64)(self._encode_prefix)

    # ---- messages and pictures -> numbers ----

    def encode(
        self,
        messages: Sequence[Message],
        images: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> Encoded:
        """One conversation; its assistant turns are labelled.

        Pictures stand in the messages, or beside them in ``images``, or as items
        ``{"type": "image"}`` in the messages that take the next of ``images``.

        Args:
            messages: see `chat.read_messages`.
            images: anything `load_image` takes, arrays (S, S, 3) of uint8, or float arrays and
                tensors (3, S, S) that are already normalised.
            add_generation_prompt: let the prompt end where the answer begins, if the user spoke
                last.
        Raises: ValueError for messages out of order or pictures that do not add up or open.
        """
        turns = read_messages(messages)
        pictures = _gather_pictures(turns, images)
        segments = render(
            self.config.chat_format, turns, self._picture, len(pictures), add_generation_prompt
        )
        ids, labels = self._encode_segments(segments)
        pixel_values, image_sizes = self.load_images(pictures)
        return Encoded(
            input_ids=np.array(ids, dtype=np.int64),
            position_ids=np.arange(len(ids)),
            labels=(
                np.array(labels, dtype=np.int64)
                if any(turn.role == "assistant" for turn in turns)
                else None
            ),
            pixel_values=pixel_values,
            image_sizes=image_sizes,
        )

    def encode_tree(
        self,
        images: Sequence[Any] | None,
        branches: Sequence[Sequence[Message]],
        *,
        loss_weighting: LossWeighting = "token",
        branch_weights: Sequence[float] | None = None,
    ) -> Encoded:
        """Several conversations about the same pictures in one sequence.

        The prefix (beginning and pictures) has subsegment 10000 and positions 0 .. P-1; branch k
        has subsegment k and positions from P, and ends with its ``<|im_end|>``.

        Args:
            images: as for `encode`; may be empty or None.
            branches: conversations without pictures and system messages; each ends with an answer.
            loss_weighting: a branch with n labels weighs 1 (``token``) or 1/sqrt(n) (``sqrt``) a
                label. Molmo2's own rule is 2/sqrt(n) over the square root of the branches.
            branch_weights: one more factor for each branch.
        Raises: ValueError naming the branch.
        Source: Molmo2, olmo/preprocessing/text_preprocessor.py, README "Message Trees".
        """
        if loss_weighting not in get_args(LossWeighting):
            raise ValueError(
                f"loss_weighting is {loss_weighting!r}, expected 'token' (every label weighs 1) or "
                f"'sqrt' (1/sqrt(n) in a branch of n labels)"
            )
        if not branches:
            raise ValueError("a message tree needs at least one branch")
        if branch_weights is not None and len(branch_weights) != len(branches):
            raise ValueError(
                f"found {len(branch_weights)} branch_weights for {len(branches)} branches: give "
                f"one each"
            )
        pixel_values, image_sizes = self.load_images(images)
        prefix = self._prefix(len(image_sizes))
        num_prefix = len(prefix)

        ids, labels, weights = list(prefix), [IGNORED_LABEL] * num_prefix, [0.0] * num_prefix
        lengths = []
        for number, messages in enumerate(branches):
            segments = self._render_branch(messages, number)
            branch_ids, branch_labels = self._encode_segments(segments)
            num_labels = len(branch_labels) - branch_labels.count(IGNORED_LABEL)
            weight = 1.0 if loss_weighting == "token" else num_labels**-0.5
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
            pixel_values=pixel_values,
            image_sizes=image_sizes,
        )

    def load_images(
        self, images: Sequence[Any] | None
    ) -> tuple[NDArray[np.float32] | None, tuple[tuple[int, int], ...]]:
        """Pictures -> ((m, 3, S, S) float32 or None without pictures, their original sizes)."""
        loaded = [self._load_image(image) for image in _several(images)]
        if not loaded:
            return None, ()
        return np.stack([picture.pixels for picture in loaded]), tuple(p.size for p in loaded)

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

    def _encode_prefix(self, num_pictures: int) -> tuple[int, ...]:
        segments = render_prefix(self.config.chat_format, self._picture, num_pictures)
        return tuple(self._encode_segments(segments)[0])

    def _render_branch(self, messages: Sequence[Message], number: int) -> list[Segment]:
        try:
            turns = read_messages(messages)
        except ValueError as error:
            raise ValueError(f"branch {number}: {error}") from None
        if turns[0].role == "system" or any(turn.images for turn in turns):
            raise ValueError(
                f"branch {number} holds a picture or a system message: branches share the pictures "
                f"given for the tree and have no more"
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


class _Picture(NamedTuple):
    pixels: NDArray[np.float32]  # (3, S, S)
    size: tuple[int, int]  # (width, height) of the original


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
