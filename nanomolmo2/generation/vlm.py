"""VLM: images or a video and a question in, an answer with its points out.

    vlm = VLM("tiny")
    answer = vlm.ask("scene.png", "Point to the snail.")
    print(answer.text, answer.points)

The command line, the server and its page ask through this object too. Calls may come from any
thread: they share one engine, which continues their answers together.
"""

from __future__ import annotations

import asyncio
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack

import torch

from nanomolmo2.accelerate.device import Device, choose_device, usual_dtype
from nanomolmo2.accelerate.quantization import Modes
from nanomolmo2.batch import NO_MORE_POINTS
from nanomolmo2.generation.answer import Answer as Answer
from nanomolmo2.generation.answer import Shown
from nanomolmo2.generation.chat import Chat
from nanomolmo2.generation.constraint import PointsConstraint, PointsProposer
from nanomolmo2.generation.engine import Engine, Request
from nanomolmo2.generation.options import GenerateKeywords, GenerateOptions
from nanomolmo2.generation.prefix_cache import DEFAULT_BYTES, PrefixCache
from nanomolmo2.generation.prompt import request_of
from nanomolmo2.generation.question import (
    Conversation,
    Images,
    Question,
    as_question,
    read_question,
)
from nanomolmo2.generation.scheduler import Scheduler, Way
from nanomolmo2.generation.stream import Asked, Item, Stream, begun
from nanomolmo2.generation.text_stream import TextStream
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.processor import Encoded, Message, Processor, load_image
from nanomolmo2.processor.config import VideoConfig
from nanomolmo2.processor.video import VideoSource, load_video

if TYPE_CHECKING:
    from nanomolmo2.generation.looked import Looked

# Wordings that `tiny` was taught and Molmo2's own people use.
POINT, COUNT, CAPTION = (
    "Point to the {}.",
    "How many {} are there?",
    "Describe this picture.",
)


class LoadKeywords(TypedDict, total=False):
    """How a model is loaded, see :func:`nanomolmo2.convert.pretrained.load`.

    ``dtype`` of the weights: by default float32 on the CPU, where 16-bit arithmetic is slow,
    bfloat16 on CUDA, and as stored elsewhere. ``device``: ``cpu``, ``cuda``, ``cuda:1``, ``mps``;
    by default the best there is: CUDA, then MPS, then the CPU. ``quantize``: a mode of
    :func:`nanomolmo2.accelerate.quantize`, or one for each part; None = as stored. ``adapter`` and
    ``adapter_weights``: what runs with LoRA learned, merged into the model.
    """

    cache_dir: str | Path | None
    dtype: torch.dtype | str | None
    device: Device
    revision: str | None
    quantize: Modes
    adapter: str | Path | Sequence[str | Path] | None
    adapter_weights: Sequence[float] | None


class VLM:
    """A vision-language model together with its processor.

    What an earlier question had computed for the beginning of a prompt is not computed again: the
    visual tokens, keys and values of an image, the turns of a conversation.

    Attributes:
        model, processor: the nets, and what makes their input.
        prefix_cache: what is kept for later questions.
        scheduler: continues the answers of all threads together.
        allow_remote: whether images and videos may be addresses of other computers.
    """

    def __init__(
        self,
        model: str | Path | NanoMolmo2 | None = "tiny",
        processor: Processor | None = None,
        *,
        reuse_bytes: int = DEFAULT_BYTES,
        max_rows: int = 8,
        allow_remote: bool = False,
        **loading: Unpack[LoadKeywords],
    ) -> None:
        """
        Args:
            model: a name such as ``tiny`` or ``allenai/Molmo2-4B``, the folder of a checkpoint, or
                a model that is loaded; then with its ``processor``.
            reuse_bytes: most memory to hold for later questions; 0 = computes everything anew.
            max_rows: most answers that are written together; others wait.
            allow_remote: let images and videos be ``http`` and ``https`` addresses, which are
                downloaded; never those of private networks.
            loading: of a name or folder, see `LoadKeywords`.
        Raises: ValueError for a processor that writes points in another way than the model, and as
            :func:`nanomolmo2.convert.pretrained.load`.
        """
        if not isinstance(model, torch.nn.Module):
            if processor is not None:
                raise ValueError(
                    "found a processor beside the name of a model, which has its own: pass the "
                    "loaded model, or leave the processor out"
                )
            model, processor = _load(model, loading)
        elif loading:
            raise ValueError(
                f"found {', '.join(loading)} beside a model that is loaded already: give the name "
                f"of a model, or leave them out"
            )
        if processor is None:
            raise ValueError("a model needs its processor: VLM(model, processor)")
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
        self.allow_remote = allow_remote
        self.prefix_cache = PrefixCache(reuse_bytes)
        self.scheduler = Scheduler(model.llm, self.prefix_cache, max_rows=max_rows)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path | None = "tiny",
        *,
        reuse_bytes: int = DEFAULT_BYTES,
        max_rows: int = 8,
        allow_remote: bool = False,
        **loading: Unpack[LoadKeywords],
    ) -> Self:
        """The same as ``VLM(name_or_path, ...)``."""
        return cls(
            name_or_path,
            reuse_bytes=reuse_bytes,
            max_rows=max_rows,
            allow_remote=allow_remote,
            **loading,
        )

    def close(self) -> None:
        """End what is being written; later questions are refused."""
        self.scheduler.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- one question ----

    def ask(
        self,
        images: Images,
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
            images: one image or several in order (path, bytes, open file, PIL image, array, tensor,
                with ``allow_remote`` also an address); None or empty where the messages hold them,
                or there is none.
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
        stream = self.stream(
            images,
            question,
            video=video,
            options=options,
            well_formed_points=well_formed_points,
            reuse=reuse,
            **keywords,
        )
        return stream.answer(on_text)

    def stream(
        self,
        images: Images,
        question: str | Sequence[Message],
        *,
        video: VideoSource | None = None,
        options: GenerateOptions | None = None,
        well_formed_points: bool = False,
        reuse: bool = True,
        cut_at_context: bool = False,
        **keywords: Unpack[GenerateKeywords],
    ) -> Stream:
        """An answer while it is written: its pieces, its points, last the `Answer`. See `ask`.

        What is wrong with the question is raised at once, before the first piece is asked for.

        Args:
            cut_at_context: let the answer end where the model's context does, in place of refusing
                a ``max_new_tokens`` that does not fit behind the prompt.
        """
        options = _checked(options or GenerateOptions()).updated(**keywords)
        question_ = Question(question, images, video)
        request, asked = self._prepare(question_, options, well_formed_points, reuse)
        if cut_at_context:
            request = self._cut(request)
        way = Way(options.batch_invariant, options.lookup, reuse and bool(self._cache))
        return Stream(self.scheduler.submit(request, way), asked)

    def point(self, images: Images, label: str, **keywords: Unpack[GenerateKeywords]) -> Answer:
        """Point to everything of a kind: ``vlm.point("table.jpg", "cups").points``."""
        return self.ask(images, about(POINT, label), **keywords)

    def count(self, images: Images, label: str, **keywords: Unpack[GenerateKeywords]) -> Answer:
        """Count the things of a kind: ``vlm.count("table.jpg", "cups").count``."""
        return self.ask(images, about(COUNT, label), **keywords)

    def caption(self, images: Images, **keywords: Unpack[GenerateKeywords]) -> Answer:
        """Say what is in an image."""
        return self.ask(images, CAPTION, **keywords)

    def chat(self, images: Images = None, *, video: VideoSource | None = None) -> Chat:
        """A conversation that remembers what was said and shown.

        Args:
            images, video: shown with the first question.
        """
        return Chat(self, images, video=video)

    def looked(
        self,
        images: Images,
        question: str | Sequence[Message],
        answer: str | Answer,
        token: int | str | tuple[int, int] | None = None,
        *,
        video: VideoSource | None = None,
    ) -> Looked:
        """Why there? Where the model looked in its images when it chose a token of its answer.

        The mean of the attention of all layers and heads, from a pass of its own: weak evidence.

        Args:
            images, question, video: what was asked, as in `ask`.
            answer: what was answered, or the text so far.
            token: number of the token from 0 (from the end: -1), or a part of the text, whose
                tokens' mean is taken: as it stands there first, or as its first character and the
                one behind its last. None = the last; one behind that is the token to come. The
                tokens of an `Answer` are its own, those of a text as the tokenizer makes them.
        Raises: ValueError as `ask`, without images, and for a token that the answer does not have.
        """
        from nanomolmo2.generation.looked import looked

        _, encoded = self._encode(Question(question, images, video))
        return looked(self.model, self.processor, encoded, answer, token, self._see)

    # ---- many questions ----

    def ask_batch(
        self,
        questions: Iterable[Question | Mapping[str, Any] | Sequence[Any]],
        *,
        batch_size: int = 16,
        options: GenerateOptions | None = None,
        **keywords: Unpack[GenerateKeywords],
    ) -> list[Answer]:
        """The answers to several questions, in their order; they are written together.

        Args:
            questions: each a `Question`, a pair (images, question) as `ask` takes them, or a
                mapping of `Question`'s fields, or ``image``, ``prompt`` and ``messages``.
            batch_size: questions that are answered together.
            options, keywords: as of `ask`.
        Raises: ValueError and FileNotFoundError that name a question that `ask` would refuse.
        """
        return self._batch(None, questions, batch_size=batch_size, options=options, **keywords)

    def _batch(
        self,
        left: threading.Event | None,
        questions: Iterable[Question | Mapping[str, Any] | Sequence[Any]],
        *,
        batch_size: int = 16,
        options: GenerateOptions | None = None,
        **keywords: Unpack[GenerateKeywords],
    ) -> list[Answer]:
        options = _checked(options or GenerateOptions(lookup=False)).updated(**keywords)
        if isinstance(questions, (str, Mapping, Question)):
            raise ValueError(
                f"expected a list of questions, found a single {type(questions).__name__}: put it "
                f"into a list"
            )
        read = [as_question(one, number) for number, one in enumerate(questions, start=1)]
        answers = []
        found = self._ask_many(read, batch_size, options, left)
        for number, answer in enumerate(found, start=1):
            if isinstance(answer, ValueError):
                raise ValueError(f"question {number} of {len(read)}: {answer}") from answer
            answers.append(answer)
        return answers

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
        ends. They have an engine of their own, in this thread, so that the same questions always
        meet the same others.

        Args:
            batch_size: questions that are answered together.
        Returns: for a question that :meth:`ask` would refuse, the error in place of the answer.
        """
        options = _checked(options or GenerateOptions(lookup=False))
        return self._ask_many(questions, batch_size, options)

    def _ask_many(
        self,
        questions: Iterable[Question],
        batch_size: int,
        options: GenerateOptions,
        left: threading.Event | None = None,
    ) -> Iterator[Answer | ValueError]:
        """`ask_many`, which ends with the step in which ``left`` is set."""
        engine = Engine(
            self.model.llm,
            max_rows=batch_size,
            batch_invariant=options.batch_invariant,
            prefix_cache=self._cache,
            lookup=options.lookup,
        )
        numbered = enumerate(questions)
        running: dict[int, tuple[int, Asked]] = {}
        done: dict[int, Answer | ValueError] = {}
        asked = given = 0
        more = True
        while (more or running or done) and not (left is not None and left.is_set()):
            # Answers wait for those in front of them, so questions wait for the slowest too.
            while more and len(running) < batch_size and asked - given < 4 * batch_size:
                number, question = next(numbered, (-1, Question("")))
                more = number >= 0
                if more:
                    asked += 1
                    try:
                        id, one = self._submit(engine, Question(*question), options)
                        running[id] = number, one
                    except ValueError as error:
                        done[number] = error
                    except FileNotFoundError as error:
                        raise FileNotFoundError(f"question {number + 1}: {error}") from error
            for event in engine.step() if engine.busy else ():
                if event.finished:
                    number, one = running.pop(event.request_id)
                    done[number] = _outcome(event.error, event.result, one)
            while given in done:
                yield done.pop(given)
                given += 1

    # ---- for event loops ----

    async def ask_async(self, *arguments: Any, **keywords: Any) -> Answer:
        """`ask` for an event loop, which goes on meanwhile; cancelling the task ends the answer."""
        return await (await begun(self.stream, *arguments, **keywords)).answer_async()

    async def stream_async(self, *arguments: Any, **keywords: Any) -> AsyncIterator[Item]:
        """`stream` for an event loop."""
        with await begun(self.stream, *arguments, **keywords) as stream:
            async for item in stream:
                yield item

    async def ask_batch_async(self, *arguments: Any, **keywords: Any) -> list[Answer]:
        """`ask_batch` for an event loop; cancelling the task ends all answers."""
        left = threading.Event()
        try:
            return await asyncio.to_thread(self._batch, left, *arguments, **keywords)
        finally:
            left.set()

    async def point_async(
        self, images: Images, label: str, **keywords: Unpack[GenerateKeywords]
    ) -> Answer:
        """`point` for an event loop."""
        return await self.ask_async(images, about(POINT, label), **keywords)

    async def count_async(
        self, images: Images, label: str, **keywords: Unpack[GenerateKeywords]
    ) -> Answer:
        """`count` for an event loop."""
        return await self.ask_async(images, about(COUNT, label), **keywords)

    async def caption_async(self, images: Images, **keywords: Unpack[GenerateKeywords]) -> Answer:
        """`caption` for an event loop."""
        return await self.ask_async(images, CAPTION, **keywords)

    # ---- from a question to the engine ----

    @property
    def _cache(self) -> PrefixCache | None:
        return self.prefix_cache if self.prefix_cache.max_bytes else None

    def _encode(self, question: Question) -> tuple[Conversation, Encoded]:
        context = self.model.config.llm_config.max_position_embeddings
        read = read_question(question, context, allow_remote=self.allow_remote)
        encoded = self.processor.encode(read.messages, read.images, video=read.video)
        if read.messages[-1]["role"] != "user":
            raise ValueError(
                "the conversation ends with an answer, expected a question: leave the last "
                "assistant message out"
            )
        return read, encoded

    def _see(self, encoded: Encoded, reuse: bool = True) -> Request:
        """A prompt for the engine, with its images as embeddings."""
        with self.scheduler.seeing:
            return request_of(self.model, encoded, self._cache if reuse else None)

    def _prepare(
        self, question: Question, options: GenerateOptions, well_formed_points: bool, reuse: bool
    ) -> tuple[Request, Asked]:
        start = time.perf_counter()
        processor = self.processor
        read, encoded = self._encode(question)
        if well_formed_points and processor.config.points is None:
            constraint = PointsConstraint(
                processor.tokenizer,
                len(encoded.image_sizes),
                video=encoded.video_size is not None,
            )
            options = options.updated(constraint=constraint)
        self._warn_of_earlier_points(encoded)
        prepared = time.perf_counter()
        text = TextStream(processor, stop=options.sampling.stop)
        request = self._request(encoded, options, reuse, text)
        return request, Asked(
            encoded, text, start, prepared, partial(_shown, read, processor.config.video)
        )

    def _submit(
        self, engine: Engine, question: Question, options: GenerateOptions
    ) -> tuple[int, Asked]:
        request, asked = self._prepare(question, options, False, True)
        if question.max_new_tokens is not None:
            request = replace(request, max_new_tokens=question.max_new_tokens)
        return engine.submit(self._cut(request)), asked

    def _cut(self, request: Request) -> Request:
        """A request whose answer ends where the context does.

        Raises: ValueError if there is no room for any.
        """
        assert request.inputs_embeds is not None
        context = self.model.config.llm_config.max_position_embeddings
        T = len(request.inputs_embeds)
        if context - T < 1:
            raise ValueError(
                f"its prompt has {T} positions, and the model's context holds {context}: there is "
                f"no room for an answer"
            )
        return replace(request, max_new_tokens=min(request.max_new_tokens, context - T))

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
                stacklevel=4,
            )

    def _request(
        self,
        encoded: Encoded,
        options: GenerateOptions,
        reuse: bool,
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
            self._see(encoded, reuse),
            max_new_tokens=options.max_new_tokens,
            sampling=options.sampling,
            eos_token_ids=options.end_ids(ends),
            stops=text.put,
            proposer=proposer,
        )


def _load(name: str | Path | None, loading: LoadKeywords) -> tuple[NanoMolmo2, Processor]:
    from nanomolmo2.convert.pretrained import load

    options: dict[str, Any] = {"cache_dir": "checkpoints", **loading}
    options["device"] = choose_device(options.get("device"))
    if options.get("dtype") is None:
        options["dtype"] = usual_dtype(options["device"])
    return load(name, **options)


def _checked(options: GenerateOptions) -> GenerateOptions:
    if not isinstance(options, GenerateOptions):
        raise ValueError(
            f"options must be GenerateOptions, found {type(options).__name__}: give a mapping's "
            f"fields by name, as in ask(image, question, **options)"
        )
    return options


def _shown(read: Conversation, settings: VideoConfig | None) -> Shown:
    """The images of a question, or the frames of its video that the model saw."""
    images, video = read.shown()
    if video is None:
        return Shown([load_image(image) for image in images])
    assert settings is not None
    loaded = load_video(video, max_frames=settings.max_frames, max_fps=settings.max_fps)
    return Shown(loaded.frames, loaded.times)


def about(wording: str, label: str) -> str:
    """A question about things of a kind, whose article is the question's."""
    words = label.strip().rstrip(".?!").split() if isinstance(label, str) else []
    if not words:
        raise ValueError(
            f"the name of the things is empty, found {label!r}: give a text such as 'cups'"
        )
    if len(words) > 1 and words[0].lower() in ("the", "a", "an"):
        words = words[1:]
    return wording.format(" ".join(words))


def _outcome(error: Exception | None, result: Any, asked: Asked) -> Answer | ValueError:
    if error is None:
        return asked.answer(result)
    return error if isinstance(error, ValueError) else ValueError(str(error))
