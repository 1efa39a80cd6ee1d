"""Pipeline: images or a video and a question in, an answer with its points out."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self, Unpack

import torch

from nanomolmo2.accelerate.device import Device, choose_device, usual_dtype
from nanomolmo2.accelerate.quantization import Modes
from nanomolmo2.batch import NO_MORE_POINTS
from nanomolmo2.generation.answer import SELECTED, read_answer
from nanomolmo2.generation.answer import Answer as Answer
from nanomolmo2.generation.constraint import PointsConstraint, PointsProposer
from nanomolmo2.generation.engine import Engine, Event, Request, Result
from nanomolmo2.generation.options import GenerateKeywords, GenerateOptions
from nanomolmo2.generation.prefix_cache import DEFAULT_BYTES, PrefixCache
from nanomolmo2.generation.prompt import request_of
from nanomolmo2.generation.stopping import StopText
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.processor import Encoded, Message, Processor
from nanomolmo2.processor.image import ImageSource
from nanomolmo2.processor.video import VideoSource


class Question(NamedTuple):
    """What `Pipeline.ask_many` takes: see `Pipeline.ask`.

    ``max_new_tokens``: where the answer to this one is cut off; None = as the options say.
    """

    question: str | Sequence[Message]
    images: ImageSource | Sequence[ImageSource] | None = None
    video: VideoSource | None = None
    max_new_tokens: int | None = None


class Pipeline:
    """A model together with its processor.

    What an earlier question had computed for the beginning of a prompt is not computed again: the
    visual tokens, keys and values of an image, the turns of a conversation.
    """

    def __init__(
        self, model: NanoMolmo2, processor: Processor, *, reuse_bytes: int = DEFAULT_BYTES
    ) -> None:
        """
        Args:
            reuse_bytes: most memory to hold for later questions; 0 = computes everything anew.
        Raises: ValueError for a processor that writes points in another way than the model.
        """
        ways = "coordinates as text", "selections of what is seen"
        ours, found = (
            ways[x is not None] for x in (model.config.point_config, processor.config.points)
        )
        if ours != found:
            raise ValueError(
                f"the processor does not belong to the model: it writes points as {found}, the "
                f"model as {ours}; use the processor that was saved with the weights"
            )
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
        device: Device = None,
        revision: str | None = None,
        quantize: Modes = None,
        adapter: str | Path | Sequence[str | Path] | None = None,
        adapter_weights: Sequence[float] | None = None,
    ) -> Self:
        """Load a model and its processor, see :func:`nanomolmo2.convert.pretrained.load`.

        Args:
            dtype: of the weights; by default float32 on the CPU, where 16-bit arithmetic is slow,
                bfloat16 on CUDA, and as stored elsewhere.
            device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; by default the best there is: CUDA, then
                MPS, then the CPU.
            quantize: a mode of :func:`nanomolmo2.accelerate.quantize`, or one for each part;
                None = as stored.
            adapter, adapter_weights: what runs with LoRA learned, merged into the model.
        """
        from nanomolmo2.convert.pretrained import load

        device = choose_device(device)
        if dtype is None:
            dtype = usual_dtype(device)
        return cls(
            *load(
                name_or_path,
                cache_dir=cache_dir,
                dtype=dtype,
                device=device,
                revision=revision,
                quantize=quantize,
                adapter=adapter,
                adapter_weights=adapter_weights,
            )
        )

    def ask(
        self,
        images: ImageSource | Sequence[ImageSource] | None,
        question: str | Sequence[Message],
        *,
        video: VideoSource | None = None,
        options: GenerateOptions | None = None,
        well_formed_points: bool = False,
        reuse: bool = True,
        on_text: Callable[[str], None] | None = None,
        **keywords: Unpack[GenerateKeywords],
    ) -> Answer:
        """Answer a question about images or a video.

        Args:
            images: one image or several in order (path, bytes, PIL image, array); None or empty
                where the messages hold the images, or there are none.
            question: a text, or a conversation that ends with the user's turn.
            video: anything `load_video` takes, in place of images; None where the messages hold
                it, or there is none.
            options: how to answer; by default greedy, at most 256 tokens.
            well_formed_points: let the model write only points that can be read, of images that
                there are. The first such question takes about a second with a large vocabulary.
                Point models never write others.
            reuse: take what earlier questions computed, and keep this for later ones.
            on_text: called with each piece of the answer as it is written; the pieces together are
                ``Answer.text``.
            keywords: fields of `GenerateOptions` and of its ``sampling`` by name, in place of those
                of ``options``: ``max_new_tokens=64, temperature=0.5, stop=["."], seed=1``.
        Raises: ValueError for images and videos that do not open, a video where the model takes
            none, messages out of order, an empty question, a prompt longer than the model's
            context, sampling values out of range.
        """
        pieces = self.stream(
            images,
            question,
            video=video,
            options=options,
            well_formed_points=well_formed_points,
            reuse=reuse,
            **keywords,
        )
        for piece in pieces:
            if isinstance(piece, Answer):
                return piece
            if on_text is not None:
                on_text(piece)
        raise AssertionError("a stream ends with its answer")

    def stream(
        self,
        images: ImageSource | Sequence[ImageSource] | None,
        question: str | Sequence[Message],
        *,
        video: VideoSource | None = None,
        options: GenerateOptions | None = None,
        well_formed_points: bool = False,
        reuse: bool = True,
        **keywords: Unpack[GenerateKeywords],
    ) -> Iterator[str | Answer]:
        """The pieces of an answer as they are written, and last the `Answer`. See :meth:`ask`.

        What is wrong with the question is raised at once, before the first piece is asked for.
        """
        start = time.perf_counter()
        options = (options or GenerateOptions()).updated(**keywords)
        messages: Sequence[Message]
        messages = (
            [{"role": "user", "content": question}] if isinstance(question, str) else question
        )
        _check_texts(messages, self.model.config.llm_config.max_position_embeddings)
        encoded = self.processor.encode(messages, _as_list(images), video=video)
        if messages[-1]["role"] != "user":
            raise ValueError(
                "the conversation ends with an answer, expected a question: leave the last "
                "assistant message out"
            )
        if well_formed_points and self.processor.config.points is None:
            constraint = PointsConstraint(
                self.processor.tokenizer,
                len(encoded.image_sizes),
                video=encoded.video_size is not None,
            )
            options = options.updated(constraint=constraint)
        self._warn_of_earlier_points(encoded)
        prepared = time.perf_counter()
        cache = self.prefix_cache if reuse and self.prefix_cache.max_bytes else None
        text = TextStream(self.processor, stop=options.sampling.stop)
        engine = Engine(
            self.model.llm,
            batch_invariant=options.batch_invariant,
            prefix_cache=cache,
            lookup=options.lookup,
        )
        events = engine.stream([self._request(encoded, options, cache, text)])
        return self._pieces(events, text, encoded, start, prepared)

    def ask_many(
        self,
        questions: Iterable[Question],
        *,
        batch_size: int = 16,
        options: GenerateOptions | None = None,
    ) -> Iterator[Answer | ValueError]:
        """The answers to many questions, in their order; several are answered together.

        A question starts as soon as another has ended, so questions are read as they are needed.
        Answers are those of :meth:`ask`, within rounding; one is cut off where the model's context
        ends.

        Args:
            batch_size: questions that are answered together.
        Returns: for a question that :meth:`ask` would refuse, the error in place of the answer.
        """
        options = options or GenerateOptions(lookup=False)
        cache = self.prefix_cache if self.prefix_cache.max_bytes else None
        engine = Engine(
            self.model.llm,
            max_rows=batch_size,
            batch_invariant=options.batch_invariant,
            prefix_cache=cache,
            lookup=options.lookup,
        )
        numbered = enumerate(questions)
        running: dict[int, tuple[int, TextStream, Encoded, float]] = {}
        done: dict[int, Answer | ValueError] = {}
        asked = given = 0
        more = True
        while more or running or done:
            # Answers wait for those in front of them, so questions wait for the slowest too.
            while more and len(running) < batch_size and asked - given < 4 * batch_size:
                number, question = next(numbered, (-1, Question("")))
                more = number >= 0
                if more:
                    asked += 1
                    try:
                        asked_for = Question(*question)  # a plain tuple is one too
                        self._submit(engine, number, asked_for, options, cache, running)
                    except ValueError as error:
                        done[number] = error
            for event in engine.step() if engine.busy else ():
                if event.result is not None:
                    number, text, encoded, start = running.pop(event.request_id)
                    done[number] = _answer(text, encoded, event.result, start, start)
            while given in done:
                yield done.pop(given)
                given += 1

    def _submit(
        self,
        engine: Engine,
        number: int,
        question: Question,
        options: GenerateOptions,
        cache: PrefixCache | None,
        running: dict[int, tuple[int, TextStream, Encoded, float]],
    ) -> None:
        start = time.perf_counter()
        given, context = question.question, self.model.config.llm_config.max_position_embeddings
        messages: Sequence[Message]
        messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
        _check_texts(messages, context)
        encoded = self.processor.encode(messages, _as_list(question.images), video=question.video)
        self._warn_of_earlier_points(encoded)
        text = TextStream(self.processor, stop=options.sampling.stop)
        request = self._request(encoded, options, cache, text)
        length = request.max_new_tokens
        if question.max_new_tokens is not None:
            length = question.max_new_tokens
        assert request.inputs_embeds is not None
        room = context - len(request.inputs_embeds)
        if room < 1:
            raise ValueError(
                f"its prompt has {context - room} positions, and the model's context holds "
                f"{context}: there is no room for an answer"
            )
        id = engine.submit(replace(request, max_new_tokens=min(length, room)))
        running[id] = (number, text, encoded, start)

    def _warn_of_earlier_points(self, encoded: Encoded) -> None:
        """Say it where a conversation has its points already, and can get no more."""
        rule, targets = self.model.config.point_config, encoded.point_targets
        if rule is None or rule.several_lists or targets is None:
            return
        if (targets[:, 0] == NO_MORE_POINTS).any():
            warnings.warn(
                "an earlier answer of this conversation has points, and this model points once a "
                "conversation, as its original code: the answer will have none; ask in a new "
                "conversation, or leave the earlier points out",
                stacklevel=3,
            )

    def _request(
        self,
        encoded: Encoded,
        options: GenerateOptions,
        cache: PrefixCache | None,
        text: TextStream,
    ) -> Request:
        processor = self.processor
        ends = sorted({*processor.stop_token_ids, *self.model.config.eos_token_ids})
        proposer = None
        if options.lookup and processor.config.points is None:
            proposer = PointsProposer(
                processor.tokenizer,
                len(encoded.image_sizes),
                video=encoded.video_size is not None,
            )
        return replace(
            request_of(self.model, encoded, cache),
            max_new_tokens=options.max_new_tokens,
            sampling=options.sampling,
            eos_token_ids=options.end_ids(ends),
            stops=text.put,
            proposer=proposer,
        )

    def _pieces(
        self,
        events: Iterator[Event],
        text: TextStream,
        encoded: Encoded,
        start: float,
        prepared: float,
    ) -> Iterator[str | Answer]:
        # Pieces are shown between steps: what that takes is not the model's time.
        first_token = 0.0
        result: Result | None = None
        for event in events:
            if event.token is not None:
                first_token = first_token or time.perf_counter()
            result = event.result
            yield from text.new_pieces()
        assert result is not None
        answer = _answer(text, encoded, result, start, prepared, first_token)
        yield from text.new_pieces()
        yield answer


def _answer(
    text: TextStream,
    encoded: Encoded,
    result: Result,
    start: float,
    prepared: float,
    first_token: float = 0.0,
) -> Answer:
    """What was written until now, as a whole."""
    whole = text.end()
    done = time.perf_counter()
    read = read_answer(whole, encoded, result.confidences)
    return Answer(
        text=whole,
        points=read.points,
        count=read.count,
        problems=read.problems,
        image_sizes=encoded.image_sizes,
        video_size=encoded.video_size,
        frame_times=tuple(encoded.frame_times),
        input_tokens=len(encoded.input_ids),
        output_tokens=len(text.ids),
        timings={
            "prepare": prepared - start,
            "first_token": (first_token or done) - prepared,
            "generate": done - prepared,
        },
        reused_tokens=result.reused_tokens,
        finish_reason="stop" if text.stopped else result.finish_reason,
        logprobs=result.sampled,
        coordinates=read.coordinates,
        confidences=read.confidences,
    )


class TextStream:
    """Token ids one by one -> pieces of text as soon as they are sure.

    A character may take several tokens; until it is whole, decoding gives U+FFFD, so a piece that
    ends with it is held back. Only the ids since the last piece are decoded, together with those of
    that piece: how a token reads can depend on the one before. What a point model selects,
    ``<POINT_k>``, is never cut, and stop texts are looked for between such.
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
        self._selects = processor.config.points is not None
        self._pieces: list[str] = []
        self._taken = 0  # pieces before this were taken by new_pieces
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

    def new_pieces(self) -> list[str]:
        """The pieces since the last call."""
        new = self._pieces[self._taken :]
        self._taken = len(self._pieces)
        return new

    def _unwritten(self) -> str:
        before = self._processor.decode(self.ids[self._context : self._written])
        return self._processor.decode(self.ids[self._context :])[len(before) :]

    def _write(self, text: str) -> None:
        self._context, self._written = self._written, len(self.ids)
        if not self._selects:
            self._show(self._stop.put(text))
            return
        for number, part in enumerate(SELECTED.split(text)):
            if self.stopped:
                break
            # What was held back cannot go on behind a class, which every second part is.
            self._show(self._stop.end() + part if number % 2 else self._stop.put(part))

    def _show(self, piece: str) -> None:
        if not piece:
            return
        self._pieces.append(piece)
        if self._on_text is not None:
            self._on_text(piece)


# A token stands for about four characters; long ones, such as runs of spaces, for a few dozen.
_CHARACTERS_PER_TOKEN = 32


def _check_texts(messages: Sequence[Message], context: int) -> None:
    """Look at what is cheap before the texts are encoded, which takes minutes for a book.

    Raises: ValueError for a question of nothing but spaces, and texts that cannot fit.
    """
    given: Any = messages  # what is wrong with its form is said where messages are read
    length, last = 0, []
    for message in given if isinstance(given, Sequence) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = content if isinstance(content, (list, tuple)) else [content]
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
        last = [text for text in texts if isinstance(text, str)]
        length += sum(map(len, last))
    if last and not any(c.isprintable() and not c.isspace() for text in last for c in text):
        raise ValueError("the question is empty: expected a text")
    if length > _CHARACTERS_PER_TOKEN * context:
        raise ValueError(
            f"the question has {length:,} characters with what was said before, which the "
            f"model's context of {context:,} tokens cannot hold: shorten it"
        )


def _as_list(images: ImageSource | Sequence[ImageSource] | None) -> list[ImageSource]:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]  # type: ignore[list-item]
