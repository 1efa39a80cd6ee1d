"""From a question to the engine: what a VLM does before the first token of an answer."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from functools import partial

from nanomolmo2.batch import NO_MORE_POINTS
from nanomolmo2.generation.answer import Shown
from nanomolmo2.generation.constraint import PointsConstraint, PointsProposer
from nanomolmo2.generation.engine import Engine, Request
from nanomolmo2.generation.finding import finding_request
from nanomolmo2.generation.options import GenerateOptions
from nanomolmo2.generation.prefix_cache import PrefixCache
from nanomolmo2.generation.question import Conversation, Question, read_question
from nanomolmo2.generation.scheduler import Scheduler
from nanomolmo2.generation.stream import Asked
from nanomolmo2.generation.text_stream import TextStream
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.processor import Encoded, Processor, load_image
from nanomolmo2.processor.config import VideoConfig
from nanomolmo2.processor.video import load_video


class Asking:
    """A model and its processor, and how their questions become requests."""

    def __init__(
        self,
        model: NanoMolmo2,
        processor: Processor | None,
        reuse_bytes: int,
        max_rows: int,
        allow_remote: bool,
    ) -> None:
        """Raises: ValueError for a processor that writes points in another way than the model."""
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

    @property
    def cache(self) -> PrefixCache | None:
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
            return finding_request(self.model, encoded, self.cache if reuse else None)

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


def checked(options: GenerateOptions) -> GenerateOptions:
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
