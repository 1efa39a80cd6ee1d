"""An example as training sees it: its images or video, and the tree of conversations about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nanomolmo2.processor.chat import Message
from nanomolmo2.processor.processor import Encoded, LossWeighting, Processor
from nanomolmo2.processor.video import VideoSource


class Conversation(Protocol):
    """One branch of a tree."""

    @property
    def messages(self) -> Sequence[Message]:
        """Turns of user and assistant, without the images; the last is an answer."""


class Tree(Protocol):
    """Images (anything that the processor reads) or a video, and conversations about them."""

    @property
    def images(self) -> Sequence[Any]: ...

    @property
    def video(self) -> VideoSource | None: ...

    @property
    def branches(self) -> Sequence[Conversation]: ...


@dataclass(frozen=True)
class EncodeTree:
    """Encodes examples for training; can be sent to worker processes."""

    processor: Processor
    loss_weighting: LossWeighting = "token"

    def __call__(self, example: Tree) -> Encoded:
        """Raises: as `Processor.encode_tree`."""
        return self.processor.encode_tree(
            example.images,
            [branch.messages for branch in example.branches],
            video=example.video,
            loss_weighting=self.loss_weighting,
        )
