"""Processor: messages and images -> ids, labels and pixels; ids -> text.

Ids and labels are built from the same segments (`chat.py`), so the loss mask cannot drift from the
prompt. P below is the length of the prefix: what all branches of a message tree share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nanomolmo2.batch import IGNORED_LABEL, PREFIX_SUBSEGMENT
from nanomolmo2.processor.chat import (
    Message,
    Segment,
    Turn,
    read_messages,
    render,
    render_prefix,
    render_turns,
)
from nanomolmo2.processor.config import PointTokens, ProcessorConfig, VideoConfig
from nanomolmo2.processor.crops import MultiCrop
from nanomolmo2.processor.grounding import Markers, ground, write_question
from nanomolmo2.processor.inputs import is_file
from nanomolmo2.processor.point import tags_of
from nanomolmo2.processor.point_space import PointSpace, decode_classes
from nanomolmo2.processor.tokenizer import (
    MOLMO2_TOKENS,
    Tokenizer,
    molmo2_tokenizer,
    molmo_point_tokenizer,
)
from nanomolmo2.processor.video import VideoSource
from nanomolmo2.processor.visual import DETAILS_START, FRAME_MARKS, ROW_END, VisualLoader

CONFIG_FILE = "processor_config.json"
TOKENIZER_FILE = "tokenizer.json"

# A video is text between frames, and an image's tokens see each other: these are the latter.
_NOT_TYPED = ("<|image|>", "<|video|>")

LossWeighting = Literal["token", "sqrt", "molmo2"]


@dataclass
class Encoded:
    """One example of T tokens and m images or a video; `collate` pads several to a Batch.

    ``labels`` are not shifted: the label at t is the token at t, -100 where nothing is learned.
    With crops, M crops (or frames) of N patches stand behind n image tokens of K patches each.
    Models that point by selecting have P row markers, and always ``image_token_pooling``.
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
    point_targets: NDArray[np.int64] | None = None  # (P, 3) row, slot, cell; -1 what is cut off
    point_lists: NDArray[np.int64] | None = None  # (P,) number of the list that each is part of
    point_space: PointSpace | None = None  # where points lie; None without anything shown


@dataclass
class _Tokens:
    """Segments as ids."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    targets: list[tuple[int, int, int]] = field(default_factory=list)  # of the row markers
    ends: list[bool] = field(default_factory=list)  # whether a list ends with each of them


class Processor:
    """Between people and the model: chat, images and tokenizer behind one object."""

    def __init__(self, config: ProcessorConfig, tokenizer: Tokenizer) -> None:
        """Raises: ValueError if the tokenizer lacks a special token that the config names."""
        self.config = config
        self.tokenizer = tokenizer
        self.image_token_id = tokenizer.special_id(config.image_token)
        self.image_token_ids: tuple[int, ...] = (self.image_token_id,)  # of the overview too
        self.pad_token_id = tokenizer.special_id(config.pad_token)
        self.stop_token_ids = tuple(tokenizer.special_id(name) for name in config.stop_tokens)
        names = [config.image_start_token, config.image_end_token, "<|im_start|>", "<|im_end|>"]
        if config.multicrop is not None:
            names += [DETAILS_START, ROW_END]
        if config.video is not None and config.video.use_frame_special_tokens:
            names += FRAME_MARKS
        for name in names:
            tokenizer.special_id(name)
        self._markers = None if config.points is None else Markers(*config.points.markers)
        self._blank = None if config.points is None else self._blank_space(config.points)
        typed = {config.image_token, config.image_start_token, config.image_end_token}
        typed |= {*MOLMO2_TOKENS} & {*tokenizer.special_ids} - {*_NOT_TYPED}
        self._typed_ids = sorted(tokenizer.special_ids[name] for name in typed)
        self._visual = VisualLoader(config)
        self._prefix = lru_cache(maxsize=64)(self._encode_prefix)

    def with_settings(self, **changes: Any) -> Processor:
        """A processor with other fields of `ProcessorConfig`, and the same tokenizer."""
        return type(self)(replace(self.config, **changes), self.tokenizer)

    # ---- messages and images -> numbers ----

    def encode(
        self,
        messages: Sequence[Message],
        images: Sequence[Any] | None = None,
        *,
        video: VideoSource | None = None,
        add_generation_prompt: bool = True,
    ) -> Encoded:
        """One conversation; its assistant turns are labelled.

        Images stand in the messages, or beside them in ``images``, or as items
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
        Raises: ValueError for messages out of order, images that do not add up or open, and
            images beside a video.
        """
        has_crops = self.config.multicrop is not None
        turns = read_messages(messages, styled=has_crops)
        visual = self._visual.load(gather_images(turns, images), gather_video(turns, video))
        space = self._space(visual.fields)
        segments = render(
            self.config.chat_format,
            self._write_questions(turns, visual.fields),
            visual.segments,
            add_generation_prompt,
            released=has_crops,
        )
        tokens = self._encode_segments(self._ground(segments, space))
        return Encoded(
            input_ids=np.array(tokens.ids, dtype=np.int64),
            position_ids=np.arange(len(tokens.ids)),
            labels=(
                np.array(tokens.labels, dtype=np.int64)
                if any(turn.role == "assistant" for turn in turns)
                else None
            ),
            **visual.fields,
            **_point_fields([tokens], space),
        )

    def apply(
        self,
        messages: Sequence[Message],
        images: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        *,
        video: VideoSource | None = None,
    ) -> dict[str, NDArray[Any]]:
        """`encode` as a mapping of arrays by the names that transformers' processor uses.

        Returns: ``input_ids``, ``token_type_ids`` (1 = belongs to an image: image tokens and the
            start, row and end tokens around them, not times and numbers) and ``labels`` (-100
            outside of answers), each (T,) int64; with images ``pixel_values``,
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
        video: VideoSource | None = None,
        loss_weighting: LossWeighting = "token",
        branch_weights: Sequence[float] | None = None,
    ) -> Encoded:
        """Several conversations about the same images in one sequence.

        The prefix (beginning and images) has subsegment 10000 and positions 0 .. P-1; branch k
        has subsegment k and positions from P, and ends with its ``<|im_end|>``. Turns are laid out
        as in Molmo2's training, without the space that the released template has before answers.

        Args:
            images: as for `encode`; may be empty or None.
            branches: conversations without images and system messages; each ends with an answer.
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
        visual = self._visual.load(_several(images), video)
        space = self._space(visual.fields)
        prefix = self._prefix(visual.segments)
        num_prefix = len(prefix)

        ids, labels, weights = list(prefix), [IGNORED_LABEL] * num_prefix, [0.0] * num_prefix
        read = []
        for number, messages in enumerate(branches):
            tokens = self._encode_branch(messages, number, visual.fields, space)
            num_labels = len(tokens.labels) - tokens.labels.count(IGNORED_LABEL)
            weight = _label_weight(loss_weighting, num_labels, len(branches))
            if branch_weights is not None:
                weight *= branch_weights[number]
            ids += tokens.ids
            labels += tokens.labels
            weights += [0.0 if label == IGNORED_LABEL else weight for label in tokens.labels]
            read.append(tokens)
        lengths = [len(tokens.ids) for tokens in read]

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
            **_point_fields(read, space),
        )

    def load_images(
        self, images: Sequence[Any] | None
    ) -> tuple[NDArray[np.float32] | None, tuple[tuple[int, int], ...]]:
        """Images -> (``pixel_values`` or None without images, their original sizes).

        ``pixel_values`` is (m, 3, S, S) float32, with crops (M, N, 3*P*P).
        """
        fields = self._visual.load(_several(images)).fields
        return fields.get("pixel_values"), fields.get("image_sizes", ())

    def _encode_prefix(self, visual: tuple[Segment, ...]) -> tuple[int, ...]:
        segments = render_prefix(self.config.chat_format, visual)
        return tuple(self._encode_segments(segments).ids)

    def _encode_branch(
        self,
        messages: Sequence[Message],
        number: int,
        fields: Mapping[str, Any],
        space: PointSpace | None,
    ) -> _Tokens:
        turns = self._read_branch(messages, number)
        try:
            turns = self._write_questions(turns, fields)
            segments = self._ground(render_turns(self.config.chat_format, turns), space)
        except ValueError as error:
            raise ValueError(f"branch {number}: {error}") from None
        return self._encode_segments(segments)

    def _read_branch(self, messages: Sequence[Message], number: int) -> list[Turn]:
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
        return turns

    def _encode_segments(self, segments: Sequence[Segment]) -> _Tokens:
        """Segments as tokens; the only place where a label is made."""
        tokens = _Tokens()
        rest = ""  # plain end of a control string, to be encoded in one piece with the text after
        for number, (text, is_control, is_answer, targets, ends_list) in enumerate(segments):
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
            tokens.ids += new
            tokens.labels += new if is_answer else [IGNORED_LABEL] * len(new)
            tokens.targets += targets
            tokens.ends += [ends_list] * len(targets)
        return tokens

    # ---- points ----

    def _blank_space(self, points: PointTokens) -> PointSpace:
        """What all prompts have in common, as far as points need it."""
        known = self.tokenizer.special_ids
        if missing := [name for name in points.markers if name not in known]:
            raise ValueError(
                f"the tokenizer has no special token {missing[0]!r}, one of the three markers that "
                f"points are written with: use the tokenizer.json that belongs to the model, or "
                f"add them (processor.tokenizer.molmo_point_tokenizer)"
            )
        if self.config.multicrop is not None and points.overview_token is not None:
            self.image_token_ids += (self.tokenizer.special_id(points.overview_token),)
        row, slot, cell = (known[name] for name in points.markers)
        first_class = points.num_embeddings or self.tokenizer.vocab_size
        if first_class < self.tokenizer.vocab_size:
            raise ValueError(
                f"num_embeddings of points is {first_class}, but the tokenizer has "
                f"{self.tokenizer.vocab_size} tokens: classes of points stand behind all of them"
            )
        digits = {}
        for text in (f"{before}{number}" for number in range(1000) for before in ("", " ")):
            ids = self.tokenizer.encode_text(text)
            if len(ids) == 1:
                digits[ids[0]] = text
        return PointSpace(
            first_class=first_class,
            markers=(row, slot, cell),
            token_pooling=np.zeros((0, points.pooling_size**2), dtype=np.int64),
            views=(),
            digits=digits,
            tokenizer=self.tokenizer,
        )

    def _space(self, fields: Mapping[str, Any]) -> PointSpace | None:
        """Where the points of a prompt lie; None without points, and where nothing is shown."""
        if self._blank is None or not fields:
            return None
        return replace(
            self._blank,
            token_pooling=fields["image_token_pooling"],
            views=self._visual.views(fields),
            image_sizes=fields.get("image_sizes", ()),
            video_size=fields.get("video_size"),
            frame_times=fields.get("frame_times", ()),
        )

    def _write_questions(self, turns: Sequence[Turn], fields: Mapping[str, Any]) -> list[Turn]:
        """The turns with the points of questions as text, where they are not to be selections."""
        if self.config.points is not None and self.config.points.points_in_prompt:
            return list(turns)
        sizes, video_size = fields.get("image_sizes", ()), fields.get("video_size")
        return [
            replace(turn, text=write_question(turn.text, sizes, video_size))
            if turn.role == "user" and tags_of(turn.text)
            else turn
            for turn in turns
        ]

    def _ground(self, segments: Sequence[Segment], space: PointSpace | None) -> Sequence[Segment]:
        return segments if self._markers is None else ground(segments, space, self._markers)

    # ---- numbers -> text ----

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of generated ids (a list, array or tensor of one dimension).

        With points, an id V + k is a class of a point and is written ``<POINT_k>``.
        """
        if self._blank is None:
            return self.tokenizer.decode(ids, skip_special_tokens)
        return decode_classes(
            ids,
            self._blank.first_class,
            lambda run: self.tokenizer.decode(run, skip_special_tokens),
        )

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
        if not path.exists():
            raise FileNotFoundError(
                f"there is no {path}: expected a folder that Processor.save or "
                f"NanoMolmo2.save_pretrained wrote"
            )
        config = ProcessorConfig.load(path)
        tokenizer = Tokenizer.from_file(directory / TOKENIZER_FILE)
        try:
            return cls(config, tokenizer)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def molmo2_processor(
    tokenizer_json_path: str | Path, max_crops: int = 8, *, vocab_size: int | None = None
) -> Processor:
    """The processor of Molmo2 4B and 8B: crops, videos, and prompts as their release has them.

    Args:
        tokenizer_json_path: Qwen3's ``tokenizer.json`` or its folder, or one that already has
            Molmo2's tokens; see `tokenizer.molmo2_tokenizer`, also for ``vocab_size``.
        max_crops: most tiles of an image, see `MultiCrop`.
    Raises: FileNotFoundError, ValueError for a tokenizer that is not as expected.
    """
    config = ProcessorConfig.molmo2(multicrop=MultiCrop(max_crops), video=VideoConfig())
    return Processor(config, molmo2_tokenizer(tokenizer_json_path, vocab_size=vocab_size))


def molmo_point_processor(
    tokenizer_json_path: str | Path, max_crops: int = 24, *, vocab_size: int | None = None
) -> Processor:
    """The processor of MolmoPoint 8B, GUI-8B and Vid-4B: as `molmo2_processor`, and with points.

    The overview's tokens are ``<im_low>``, frames stand between ``<frame_start>`` and
    ``<frame_end>``, and points of answers are selections; those of questions are text coordinates,
    as these models learned them.

    Args:
        tokenizer_json_path: Qwen3's or Molmo2's ``tokenizer.json`` or its folder, or one that
            already has MolmoPoint's tokens; see `tokenizer.molmo_point_tokenizer`.
        max_crops: most tiles of an image, see `MultiCrop`; 24 as the 8B was released.
    Raises: FileNotFoundError, ValueError for a tokenizer that is not as expected.
    """
    config = ProcessorConfig.molmo2(
        multicrop=MultiCrop(max_crops),
        video=VideoConfig(use_frame_special_tokens=True),
        points=PointTokens(),
    )
    return Processor(config, molmo_point_tokenizer(tokenizer_json_path, vocab_size=vocab_size))


def _point_fields(parts: Sequence[_Tokens], space: PointSpace | None) -> dict[str, Any]:
    """What `Encoded` says about the points of parts that stand one after the other."""
    targets = [target for part in parts for target in part.targets]
    if not targets:
        return {"point_space": space}
    ends = [end for part in parts for end in part.ends]
    return {
        "point_targets": np.array(targets, dtype=np.int64),
        "point_lists": np.cumsum([0, *ends[:-1]]),
        "point_space": space,
    }


def _label_weight(weighting: LossWeighting, num_labels: int, num_branches: int) -> float:
    """Source of ``molmo2``: olmo/preprocessing/text_preprocessor.py (the report has 4/sqrt(n))."""
    if weighting == "token":
        return 1.0
    if weighting == "sqrt":
        return float(num_labels**-0.5)
    counted = num_labels if num_branches == 1 else max(1, num_labels - 1)
    return float(2 * (counted * num_branches) ** -0.5)


def _several(images: Sequence[Any] | None) -> Sequence[Any]:
    """Refuse one image where a list is meant; the rows of an array would pass for images."""
    if images is None:
        return ()
    is_one = isinstance(images, (str, bytes, bytearray, memoryview, Path, Image.Image))
    if is_one or is_file(images) or getattr(images, "ndim", 4) != 4:
        raise ValueError(
            f"images must be a list, found one {type(images).__name__}: put a single picture into "
            f"a list"
        )
    return images


def gather_images(turns: Sequence[Turn], images: Sequence[Any] | None) -> list[Any]:
    """All images of a conversation in order, from the messages and from beside them."""
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


def gather_video(turns: Sequence[Turn], video: VideoSource | None) -> VideoSource | None:
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
