"""Pipeline: pictures or a video and a question in, an answer with its points out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from nanomolmo2.generation.constraint import PointsConstraint, PointsGuide
from nanomolmo2.generation.engine import Result
from nanomolmo2.generation.prefix_cache import DEFAULT_BYTES, PrefixCache
from nanomolmo2.generation.sampling import Sampled, SamplingParams
from nanomolmo2.generation.stopping import StopText
from nanomolmo2.models.nanomolmo2 import NanoMolmo2
from nanomolmo2.models.quantized import Modes
from nanomolmo2.processor import Message, Point, Processor, collate, parse_count, parse_points
from nanomolmo2.processor.image import ImageSource
from nanomolmo2.processor.video import VideoSource


@dataclass(frozen=True)
class Answer:
    """What the model wrote, and what it says.

    Attributes:
        text: the answer as written, points in the model's own format.
        points: points of the answer in pixels of the pictures, or of the video, they belong to.
        count: the number that the answer gives; None if it gives none.
        problems: what of the answer's points could not be read, one line each.
        image_sizes: (width, height) of the pictures, pixels.
        video_size: (width, height) of the video, pixels; None without one.
        frame_times: seconds of the frames that the model saw.
        input_tokens: length of the prompt; a picture that the model expands counts as one token.
        output_tokens: length of the answer with its end token, or the tokens of a stop text.
        timings: seconds: ``prepare`` (pictures and text to tensors), then ``first_token`` (to the
            first token of the answer) and ``generate`` (to the last).
        reused_tokens: positions of the prompt that were known from an earlier question; a picture
            that the model expands counts with all its visual tokens.
        finish_reason: ``stop`` (an end token or a stop text), ``length`` (cut off at
            max_new_tokens).
        logprobs: every one of the ``output_tokens`` with its log-probabilities, if they were asked
            for.
    """

    text: str
    points: tuple[Point, ...]
    count: int | None
    problems: tuple[str, ...]
    image_sizes: tuple[tuple[int, int], ...]
    video_size: tuple[int, int] | None
    frame_times: tuple[float, ...]
    input_tokens: int
    output_tokens: int
    timings: dict[str, float]
    reused_tokens: int = 0
    finish_reason: str = "stop"
    logprobs: tuple[Sampled, ...] = ()


class Pipeline:
    """A model together with its processor.

    What an earlier question had computed for the beginning of a prompt is not computed again: the
    visual tokens, keys and values of a picture, the turns of a conversation.
    """

    def __init__(
        self, model: NanoMolmo2, processor: Processor, *, reuse_bytes: int = DEFAULT_BYTES
    ) -> None:
        """
        Args:
            reuse_bytes: most memory to hold for later questions; 0 = computes everything anew.
        """
        self.model = model.eval()
        self.processor = processor
        self.prefix_cache = PrefixCache(reuse_bytes)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path | None = "tiny",
        *,
        cache_dir: str | Path | None = "checkpoints",
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        quantize: Modes = None,
    ) -> Self:
        """Load a model and its processor, see :func:`nanomolmo2.convert.pretrained.load`.

        Args:
            dtype: of the weights; by default float32 on the CPU, where 16-bit arithmetic is slow,
                and as stored elsewhere.
            quantize: a mode of :func:`nanomolmo2.models.quantized.quantize`, or one for each part;
                None = as stored.
        """
        from nanomolmo2.convert.pretrained import load

        if dtype is None and torch.device(device or "cpu").type == "cpu":
            dtype = torch.float32
        return cls(
            *load(
                name_or_path,
                cache_dir=cache_dir,
                dtype=dtype,
                device=device,
                revision=revision,
                quantize=quantize,
            )
        )

    def ask(
        self,
        images: ImageSource | Sequence[ImageSource] | None,
        question: str | Sequence[Message],
        *,
        video: VideoSource | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        well_formed_points: bool = False,
        on_text: Callable[[str], None] | None = None,
        reuse: bool = True,
        lookup: bool = True,
        batch_invariant: bool = False,
    ) -> Answer:
        """Answer a question about pictures or a video.

        Args:
            images: one picture or several in order (path, bytes, PIL image, array); None or empty
                where the messages hold the pictures, or there are none.
            question: a text, or a conversation that ends with the user's turn.
            video: anything `load_video` takes, in place of pictures; None where the messages hold
                it, or there is none.
            max_new_tokens: longest answer; it is cut off there.
            temperature: 0 = greedy.
            top_p, top_k, min_p, repetition_penalty, logit_bias: see
                :class:`nanomolmo2.generation.sampling.SamplingParams`; by default all off.
            seed: makes a drawn answer repeatable; None = another one each time.
            stop: texts that end the answer at once; they are neither shown nor part of it.
            logprobs: how many of the likeliest tokens come with their log-probabilities, for every
                token of the answer; 0 = only the chosen one's, None = nothing.
            well_formed_points: let the model write only points that can be read, of pictures that
                there are. The first such question takes about a second with a large vocabulary.
            on_text: called with each piece of the answer as it is written; the pieces together are
                ``Answer.text``.
            reuse: take what earlier questions computed, and keep this for later ones.
            lookup: guess tokens and check several in one step, where that is faster; the answer is
                the same.
            batch_invariant: the same bits with and without reuse and lookup; slower.
        Raises: ValueError for pictures and videos that do not open, a video where the model takes
            none, messages out of order, a prompt longer
            than the model's context, sampling values out of range.
        """
        start = time.perf_counter()
        sampling = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            logit_bias=logit_bias,
            seed=seed,
            stop=stop,
            logprobs=logprobs,
        )
        messages: Sequence[Message]
        messages = (
            [{"role": "user", "content": question}] if isinstance(question, str) else question
        )
        encoded = self.processor.encode(messages, _as_list(images), video=video)
        if messages[-1]["role"] != "user":
            raise ValueError(
                "the conversation ends with an answer, expected a question: leave the last "
                "assistant message out"
            )
        device = next(self.model.parameters()).device
        batch = collate([encoded], self.processor.pad_token_id).to(device)
        tokenizer, num_images = self.processor.tokenizer, len(encoded.image_sizes)
        has_video = encoded.video_size is not None
        if well_formed_points:
            constraint = PointsConstraint(tokenizer, num_images, video=has_video)
            sampling = replace(sampling, constraint=constraint)
        guide = partial(PointsGuide, tokenizer, num_images, video=has_video)
        prepared = time.perf_counter()

        # Pieces are shown between steps: what that takes is not the model's time.
        pieces: deque[str] = deque()
        stream = TextStream(self.processor, pieces.append, sampling.stop)
        first_token = 0.0
        results: list[Result] = []

        def on_token(new: Tensor) -> None:
            nonlocal first_token
            first_token = first_token or time.perf_counter()
            show()

        def show() -> None:
            while pieces:
                piece = pieces.popleft()
                if on_text is not None:
                    on_text(piece)

        cache = self.prefix_cache if reuse and self.prefix_cache.max_bytes else None
        stop_token_ids = {*self.processor.stop_token_ids, *self.model.config.eos_token_ids}
        self.model.generate(
            batch.input_ids,
            batch.pixel_values,
            image_token_pooling=batch.image_token_pooling,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_token_id=sorted(stop_token_ids),
            on_token=on_token,
            on_result=lambda row, result: results.append(result),
            stops=lambda row, id: stream.put(id),
            prefix_cache=cache,
            lookup=lookup,
            guide=guide if lookup else None,
            batch_invariant=batch_invariant,
        )
        (result,) = results
        text = stream.end()
        show()
        done = time.perf_counter()
        problems: list[str] = []
        points = parse_points(
            text, encoded.image_sizes, video_size=encoded.video_size, problems=problems
        )
        return Answer(
            text=text,
            points=tuple(points),
            count=parse_count(text),
            problems=tuple(problems),
            image_sizes=encoded.image_sizes,
            video_size=encoded.video_size,
            frame_times=tuple(encoded.frame_times),
            input_tokens=len(encoded.input_ids),
            output_tokens=len(stream.ids),
            timings={
                "prepare": prepared - start,
                "first_token": (first_token or done) - prepared,
                "generate": done - prepared,
            },
            reused_tokens=result.reused_tokens,
            finish_reason="stop" if stream.stopped else result.finish_reason,
            logprobs=result.sampled,
        )


class TextStream:
    """Token ids one by one -> pieces of text as soon as they are sure.

    A character may take several tokens; until it is whole, decoding gives U+FFFD, so a piece that
    ends with it is held back. Only the ids since the last piece are decoded, together with those of
    that piece: how a token reads can depend on the one before.
    """

    def __init__(
        self,
        processor: Processor,
        on_text: Callable[[str], None] | None = None,
        stop: str | Sequence[str] = (),
    ) -> None:
        """
        Args:
            on_text: called with every piece.
            stop: texts that end the answer, no part of it.
        """
        self.ids: list[int] = []
        self._processor = processor
        self._on_text = on_text
        self._stop = StopText(stop)
        self._pieces: list[str] = []
        self._context = 0  # ids from here on are decoded
        self._written = 0  # ids before this are in the pieces

    @property
    def stopped(self) -> bool:
        """Whether a stop text has ended the answer."""
        return self._stop.found is not None

    def put(self, id: int) -> bool:
        """Take the next id. Returns: ``stopped``."""
        self.ids.append(id)
        text = self._unwritten()
        if text and not text.endswith("\ufffd"):
            self._write(text)
        return self.stopped

    def end(self) -> str:
        """Write what was held back; return the whole text, which is the pieces in order."""
        if text := self._unwritten():
            self._write(text)
        self._show(self._stop.end())
        return "".join(self._pieces)

    def _unwritten(self) -> str:
        before = self._processor.decode(self.ids[self._context : self._written])
        return self._processor.decode(self.ids[self._context :])[len(before) :]

    def _write(self, text: str) -> None:
        self._context, self._written = self._written, len(self.ids)
        self._show(self._stop.put(text))

    def _show(self, piece: str) -> None:
        if not piece:
            return
        self._pieces.append(piece)
        if self._on_text is not None:
            self._on_text(piece)


def _as_list(images: ImageSource | Sequence[ImageSource] | None) -> list[ImageSource]:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]  # type: ignore[list-item]
