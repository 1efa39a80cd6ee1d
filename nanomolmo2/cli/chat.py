"""``nanomolmo2 chat``: questions about pictures, one after the other."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from nanomolmo2.cli.answering import set_max_crops, set_max_frames
from nanomolmo2.cli.conversation import Conversation
from nanomolmo2.cli.loading import load_pipeline, precision
from nanomolmo2.cli.options import (
    AdapterFolders,
    AtLeast,
    CacheDir,
    Debug,
    DeviceName,
    DType,
    GenerationOptions,
    Precision,
)
from nanomolmo2.cli.output import STDOUT, describe, note
from nanomolmo2.terminal import visible

if TYPE_CHECKING:
    from nanomolmo2.generation.vlm import VLM


@dataclass(frozen=True, kw_only=True)
class Chat(GenerationOptions):
    """Talk with a model about pictures, or about a video.

    A line is a question, or a command such as /image FILE, /draw or /save; /help lists them. An
    answer is printed as it is written; Ctrl-C stops it, Ctrl-D ends the chat. Where standard input
    is no terminal, its lines are taken without a prompt, and only answers are printed.
    """

    images: Annotated[
        Positional[tuple[str, ...]],
        arg(
            metavar="[IMAGE...]",
            help="pictures to begin with, or one video; /image and /video show others later",
        ),
    ] = ()
    max_crops: Annotated[
        int | None,
        arg(
            metavar="N",
            help="most detail crops a picture, for models that read crops; none = as the model "
            "was saved",
        ),
        AtLeast(1),
    ] = None
    max_frames: Annotated[
        int | None,
        arg(
            metavar="N",
            help="most frames that are looked at in a video; none = as the model was saved",
        ),
        AtLeast(1),
    ] = None
    no_history: Annotated[
        bool,
        arg(help="neither read nor keep the lines that the arrow keys bring back"),
    ] = False
    device: DeviceName = None
    dtype: DType = None
    quantize: Precision = None
    adapter: AdapterFolders = ()
    cache_dir: CacheDir = Path("checkpoints")
    debug: Debug = False

    def run(self) -> None:
        generation = self.generation()
        lines, show = plain_lines(), None
        is_terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
        if is_terminal:
            from nanomolmo2.cli.console import picture_shower, require_console

            require_console()
            show = picture_shower()
        conversation = Conversation(self._load, self.model, generation, show)
        conversation.start(self.images)
        if is_terminal:
            from nanomolmo2.cli.console import edited_lines

            note("a question, or /help; Ctrl-D ends the chat")
            lines = edited_lines(conversation, keep_history=not self.no_history)
        try:
            number, failed = self._talk(conversation, lines, is_terminal)
        finally:
            conversation.close()
        if failed and not is_terminal:
            raise ValueError(f"{failed} of {number} lines failed")

    def _load(self, name: str) -> VLM:
        # What was learned beside one model belongs to it alone.
        adapter = self.adapter if name == self.model else ()
        options = precision(self.dtype, self.quantize, self.device, adapter)
        vlm = load_pipeline(name, self.cache_dir, **options)
        if self.max_crops is not None:
            set_max_crops(vlm, self.max_crops, name)
        if self.max_frames is not None:
            set_max_frames(vlm, self.max_frames, name)
        return vlm

    def _talk(
        self, conversation: Conversation, lines: Iterator[str], is_terminal: bool
    ) -> tuple[int, int]:
        """Handle lines. Returns: how many there were, and how many of them could not be."""
        number = failed = 0
        for line in lines:
            number += 1
            try:
                if not conversation.handle(line):
                    break
            except KeyboardInterrupt:  # while a picture is opened or a model is loaded
                note("\nstopped")
            except Exception as error:
                if isinstance(error, OSError) and error.filename == STDOUT:
                    raise
                failed += 1
                if self.debug:
                    print(visible(traceback.format_exc()), end="", file=sys.stderr)
                note(f"{'' if is_terminal else f'line {number}: '}{describe(error)}")
        return number, failed


def plain_lines() -> Iterator[str]:
    """Lines of standard input, to its end."""
    if sys.stdin is None:
        return
    if sys.stdin.isatty():  # and standard output goes elsewhere
        note("a line is a question, or /help; Ctrl-D ends the chat")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="backslashreplace")
    yield from iter(sys.stdin.readline, "")
