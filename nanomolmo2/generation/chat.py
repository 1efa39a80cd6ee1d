"""Chat: a conversation that remembers what was said and shown."""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

from nanomolmo2.generation.answer import Answer
from nanomolmo2.generation.options import GenerateKeywords
from nanomolmo2.generation.question import Images, read_parts
from nanomolmo2.generation.stream import Item, Stream, begun
from nanomolmo2.processor import Message
from nanomolmo2.processor.video import VideoSource

if TYPE_CHECKING:
    from nanomolmo2.generation.vlm import VLM


class Chat:
    """Turns with one model; keys and values of earlier turns are not computed again.

    A turn counts once its answer is there: one that was refused or left early is as if it had not
    been asked. A conversation is for one thread at a time; several of a model may go on together.

    Attributes:
        messages: what was said, as `VLM.ask` takes it, images included.
        answers: of the turns, in order.
    """

    def __init__(
        self, vlm: VLM, images: Images = None, *, video: VideoSource | None = None
    ) -> None:
        """
        Args:
            images, video: shown with the first question.
        """
        self.vlm = vlm
        self.messages: list[Message] = []
        self.answers: list[Answer] = []
        self._next: list[Any] = self._parts(images, video)
        self._running: weakref.ref[Stream] | None = None

    def show(self, images: Images = None, *, video: VideoSource | None = None) -> None:
        """Show something with the next question."""
        self._next += self._parts(images, video)

    def ask(
        self,
        question: str,
        images: Images = None,
        *,
        video: VideoSource | None = None,
        **keywords: Unpack[GenerateKeywords],
    ) -> Answer:
        """The next turn. See `VLM.ask`."""
        return self.stream(question, images, video=video, **keywords).answer()

    def stream(
        self,
        question: str,
        images: Images = None,
        *,
        video: VideoSource | None = None,
        **keywords: Unpack[GenerateKeywords],
    ) -> Stream:
        """The next turn while it is written; one that is still being written ends. See
        `VLM.stream`."""
        shown = [*self._next, *self._parts(images, video)]
        content: Any = [*shown, {"type": "text", "text": question}] if shown else question
        messages: list[Message] = [*self.messages, {"role": "user", "content": content}]
        stream = self.vlm.stream(None, messages, **keywords)
        if before := self._running and self._running():
            before.close()
        stream.then = partial(self._said, messages)
        self._running = weakref.ref(stream)
        return stream

    async def ask_async(self, *arguments: Any, **keywords: Any) -> Answer:
        """`ask` for an event loop, which goes on meanwhile; cancelling the task ends the answer."""
        return await (await begun(self.stream, *arguments, **keywords)).answer_async()

    async def stream_async(self, *arguments: Any, **keywords: Any) -> AsyncIterator[Item]:
        """`stream` for an event loop."""
        with await begun(self.stream, *arguments, **keywords) as stream:
            async for item in stream:
                yield item

    def undo(self) -> bool:
        """Take the last turn back, with what was shown in it. Returns: whether there was one.

        What was computed for it stays known: the same turn again costs little.
        """
        if not self.answers:
            return False
        self.answers.pop()
        del self.messages[-2:]
        return True

    def reset(self) -> None:
        """Begin anew: nothing was said or shown, also what a turn shows that is being written."""
        if running := self._running and self._running():
            running.close()
        self.messages.clear()
        self.answers.clear()
        self._next.clear()

    def _parts(self, images: Images, video: VideoSource | None) -> list[Any]:
        return read_parts(images, video, allow_remote=self.vlm.allow_remote)

    def _said(self, messages: list[Message], answer: Answer) -> None:
        # What a point model selected has other names once the conversation shows more.
        self.messages = [*messages, {"role": "assistant", "content": answer.coordinates}]
        self.answers.append(answer)
        self._next.clear()
