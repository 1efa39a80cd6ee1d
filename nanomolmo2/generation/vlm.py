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
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack

import torch

from nanomolmo2.accelerate.device import Device, choose_device, usual_dtype
from nanomolmo2.accelerate.quantization import Modes
from nanomolmo2.generation.answer import Answer as Answer
from nanomolmo2.generation.asking import Asking, checked
from nanomolmo2.generation.chat import Chat
from nanomolmo2.generation.engine import Engine
from nanomolmo2.generation.find import Place, find, read_examples
from nanomolmo2.generation.options import GenerateKeywords, GenerateOptions
from nanomolmo2.generation.prefix_cache import DEFAULT_BYTES
from nanomolmo2.generation.question import (
    Images,
    Question,
    as_question,
)
from nanomolmo2.generation.scheduler import Way
from nanomolmo2.generation.shown import answer_about_shown
from nanomolmo2.generation.stream import Asked, Item, Said, Stream, begun
from nanomolmo2.generation.taught import answer_about_words
from nanomolmo2.generation.words import words_of
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.processor import Message, Processor
from nanomolmo2.processor.video import VideoSource

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


class VLM(Asking):
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
        taught = words_of(model)
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
        super().__init__(model, processor, reuse_bytes, max_rows, allow_remote)
        self.words = taught

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
        options = checked(options or GenerateOptions()).updated(**keywords)
        question_ = Question(question, images, video)
        if (known := self._known(question_)) is not None:
            return Said(known)
        request, asked = self._prepare(question_, options, well_formed_points, reuse)
        if cut_at_context:
            request = self._cut(request)
        way = Way(options.batch_invariant, options.lookup, reuse and bool(self.cache))
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

    def find(
        self,
        image: Images,
        like: Sequence[Place],
        unlike: Sequence[Place] = (),
        reference: Images = None,
        max_crops: int | None = None,
        min_confidence: float = 0.5,
    ) -> Answer:
        """Show one, it finds the rest: ``vlm.find("pills.jpg", like=[(120, 80)]).count``.

        Needs no name of the things, and a model that has learned to find by example. What counts
        as like, and when not to trust it, is told in docs/find.md.

        Args:
            image: the picture that is asked about.
            like: places on things that are meant, (x, y) in pixels of the reference, or of the
                image where there is none; (x, y, 2) is a place in the image beside a reference.
                Up to 3 were learned; more may be given.
            unlike: places on things that are not meant, likewise; up to 2 were learned. What lies
                under one is never listed.
            reference: another picture, in which the examples lie.
            max_crops: None: three looks, at the picture about as large as it is, smaller and
                larger, and a second search that knows what the first was sure of. Else one look
                with so many detail crops at most: more finds smaller things, and takes longer.
            min_confidence: what is less likely meant is left out, 0 to 1.
        Returns: its ``points`` are things with their ``confidence`` and ``size``, in the order in
            which the model lists them, the examples among them; ``count`` is their number, and
            ``problems`` say what may be wrong.
        Raises: ValueError for a model that has not learned it, places outside of their picture,
            and what `ask` refuses.
        """
        return find(
            self.model,
            self.processor,
            image,
            read_examples(like, unlike),
            reference=reference,
            max_crops=max_crops,
            min_confidence=min_confidence,
            allow_remote=self.allow_remote,
            cache=self.cache,
            seeing=self.scheduler.seeing,
        )

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
        options = checked(options or GenerateOptions(lookup=False)).updated(**keywords)
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
        options = checked(options or GenerateOptions(lookup=False))
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
            prefix_cache=self.cache,
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
                        if (known := self._known(Question(*question))) is not None:
                            done[number] = known
                            continue
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

    def _known(self, question: Question) -> Answer | None:
        """The answer to a question about words that were taught, and where the language model
        cannot read points in a question, to one with points; None for others."""
        config, known = self.model.config, None
        if config.finder_dim is not None and config.point_config is None:
            known = answer_about_shown(self, question)
        if known is None and self.words is not None:
            known = answer_about_words(self, self.words, question)
        return known

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

    async def find_async(self, *arguments: Any, **keywords: Any) -> Answer:
        """`find` for an event loop, which goes on meanwhile."""
        return await asyncio.to_thread(self.find, *arguments, **keywords)

    async def caption_async(self, images: Images, **keywords: Unpack[GenerateKeywords]) -> Answer:
        """`caption` for an event loop."""
        return await self.ask_async(images, CAPTION, **keywords)


def _load(name: str | Path | None, loading: LoadKeywords) -> tuple[NanoMolmo2, Processor]:
    from nanomolmo2.convert.pretrained import load

    options: dict[str, Any] = {"cache_dir": "checkpoints", **loading}
    options["device"] = choose_device(options.get("device"))
    if options.get("dtype") is None:
        options["dtype"] = usual_dtype(options["device"])
    return load(name, **options)


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
