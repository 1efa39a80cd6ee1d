"""The terminal of `nanomolmo2 chat`: lines that can be edited and completed, pictures among them.

Needs the extra ``chat``: prompt_toolkit, and for pictures textual-image.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nanomolmo2.cli.answering import VIDEO_SUFFIXES
from nanomolmo2.cli.conversation import COMMANDS, Conversation
from nanomolmo2.cli.output import IMAGE_SUFFIXES, note
from nanomolmo2.terminal import visible

if TYPE_CHECKING:
    from PIL.Image import Image

MODELS = ("tiny", "base")
_PICTURES = re.compile(
    "kitty|ghostty|wezterm|iterm|foot|mlterm|contour|rio|mintty|vscode|sixel|vt340", re.IGNORECASE
)
MOST_ROWS = 24  # of the terminal, for a picture


def require_console() -> None:
    """Raises: ImportError that names the extra."""
    from nanomolmo2.data.records import optional_module

    optional_module("prompt_toolkit", "chat", "to chat in a terminal")


# ---- pictures ----


def picture_shower() -> Callable[[Image], bool]:
    """What shows a picture in this terminal; it returns whether it could.

    The terminal is asked for it here, so call this while nobody types.
    """
    kind = _renderable()

    def show(image: Image) -> bool:
        if kind is None:
            return False
        from rich.console import Console

        sys.stdout.flush()
        columns, rows = shutil.get_terminal_size()
        height = max(4, min(MOST_ROWS, rows - 4))
        console = Console(file=sys.__stdout__, width=columns)
        try:
            console.print(kind(image, width="auto", height="auto"), height=height)
        except Exception as error:  # of the library: the picture can go into a file
            note(f"note: the terminal did not take the picture ({error})")
            return False
        return True

    return show


def _renderable() -> Callable[..., Any] | None:
    """textual-image's class for this terminal; None where it shows no pictures.

    The library asks the terminal and takes what it reads next for the answer, so it is let to only
    where that may be yes, and where nobody has typed ahead.
    """
    if not may_show_pictures(os.environ) or _typed_ahead():
        return None
    logging.getLogger("textual_image").setLevel(logging.ERROR)
    try:
        found = import_module("textual_image.renderable")
    except Exception:  # not installed, or a terminal that answers what nobody foresaw
        return None
    kind: Callable[..., Any] = found.Image
    return kind if kind in (found.SixelImage, found.TGPImage) else None


def _typed_ahead() -> bool:
    try:
        return bool(select.select([sys.stdin], [], [], 0)[0])
    except (OSError, ValueError):  # Windows asks sockets only
        return False


def may_show_pictures(environment: Mapping[str, str]) -> bool:
    """Whether a terminal is of a kind of which some show pictures, by what it says of itself."""
    named = [environment.get(name, "") for name in ("TERM", "TERM_PROGRAM", "LC_TERMINAL")]
    marks = "KITTY_WINDOW_ID", "KONSOLE_VERSION", "XTERM_VERSION", "WT_SESSION"
    return bool(_PICTURES.search(" ".join(named))) or any(map(environment.get, marks))


# ---- lines ----


def edited_lines(conversation: Conversation, *, keep_history: bool = True) -> Iterator[str]:
    """The lines that a person types, until Ctrl-D. Ctrl-C empties a line that is being typed."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    class Commands(Completer):
        def get_completions(self, document: Document, _: CompleteEvent) -> Iterable[Completion]:
            for one in completions(document.text_before_cursor):
                shown = visible(one.shown or one.text)
                yield Completion(one.text, -one.replaces, shown, display_meta=one.about)

    file = _history_file() if keep_history else None
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        "> ",
        history=InMemoryHistory() if file is None else FileHistory(str(file)),
        completer=Commands(),
        complete_while_typing=True,
        key_bindings=keys,
        bottom_toolbar=lambda: visible(status(conversation)),
    )
    with _without_echo():
        while True:
            try:
                yield session.prompt()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return


@contextlib.contextmanager
def _without_echo() -> Iterator[None]:
    """What is typed during an answer shows at the next prompt, not within the answer."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    changed = termios.tcgetattr(number)
    changed[3] &= ~termios.ECHO
    termios.tcsetattr(number, termios.TCSANOW, changed)
    try:
        yield
    finally:
        termios.tcsetattr(number, termios.TCSANOW, before)


def status(conversation: Conversation) -> str:
    """One line below the prompt: who answers, and about what."""
    names = [os.path.basename(one.path) for one in conversation.shown]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    about = f"{', '.join(names[:3])}{more}" if names else "no picture: /image FILE"
    return f"{conversation.model} | {about} | /help"


def _history_file() -> Path | None:
    """Where lines are kept from one chat to the next, for this person alone; None where they
    cannot be.
    """
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        path = Path(state) / "nanomolmo2" / "chat-history"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except (OSError, RuntimeError) as error:
        note(f"warning: lines are not kept for later chats: {error}")
        return None
    return path


# ---- completion ----

_WORD = re.compile(r"(?:[^\s\\]|\\.)*\Z")  # the last one, its spaces escaped


class Completed(NamedTuple):
    """What may stand in place of the last ``replaces`` characters.

    ``shown``: in the list of what there is; "" = the text.
    """

    text: str
    replaces: int
    about: str = ""
    shown: str = ""


def completions(text: str) -> Iterator[Completed]:
    """Commands, and what stands behind them by what each takes; nothing for a question."""
    from prompt_toolkit.completion import CompleteEvent, PathCompleter
    from prompt_toolkit.document import Document

    name, space, _ = text.partition(" ")
    if not text.startswith("/"):
        return
    if not space:
        for command, about in COMMANDS.items():
            if command.startswith(name):
                yield Completed(command, len(name), about.help)
        return
    found = _WORD.search(text)
    takes = COMMANDS[name].takes if name in COMMANDS else ""
    if found is None or not takes:
        return
    word = re.sub(r"\\(.)", r"\1", found[0])
    if takes == "model":
        for model in MODELS:
            if model.startswith(word):
                yield Completed(model, len(found[0]))
    paths = PathCompleter(expanduser=True, file_filter=lambda path: _fits(path, takes))
    for one in paths.get_completions(Document(word), CompleteEvent()):
        yield Completed(re.sub(r"([\s\\'\"])", r"\\\1", one.text), 0, "", one.display_text)


def _fits(path: str, takes: str) -> bool:
    """Whether a path may be meant by a command that takes a picture, a video, a file or a model."""
    if os.path.isdir(path):
        return True
    suffix = os.path.splitext(path)[1].lower()
    kinds = {"picture": (*IMAGE_SUFFIXES, ".gif", ".bmp", ".tif", ".tiff"), "model": ()}
    kinds["video"] = (*VIDEO_SUFFIXES, ".gif")
    return takes not in kinds or suffix in kinds[takes]
