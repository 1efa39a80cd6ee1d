"""What commands print and write: places checked before the work, and bars while it goes on.

Names, answers and notes come from others: they are printed by `say`, `note` and `print_json`, which
let no code of theirs reach the terminal.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nanomolmo2.checks import refuse_overwriting
from nanomolmo2.cli.options import UsageError
from nanomolmo2.terminal import visible

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

OnProgress = Callable[[int, int], None]  # called with the numbers done and of all


# ---- streams ----


STDOUT = "standard output"


class CheckedOutput:
    """Standard output, whose errors name it like that of a file."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._held: list[str] = []
        self._said: set[str] = set()
        self.broken = False  # whoever read it is gone

    def hold(self, line: str) -> None:
        """Keep a line for stderr until something is printed; of what is refused it is not said."""
        if line not in self._said:  # a command may load two models
            self._said.add(line)
            self._held.append(line)

    def release(self) -> None:
        """Say what was kept."""
        held, self._held = self._held, []
        for line in held:
            note(line)

    def write(self, text: str) -> int:
        self.release()
        with self._named():
            return int(self._stream.write(text))

    def flush(self) -> None:
        with self._named():
            self._stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.broken = isinstance(error, BrokenPipeError)
            error.filename = STDOUT
            raise


def open_streams() -> None:
    """Make the standard streams take any text.

    What their encoding lacks is escaped. A closed one would give its number to the next file that
    is opened, and all that is printed would land in that file.

    Raises: UsageError if standard output is closed.
    """
    streams = sys.stdin, sys.stdout, sys.stderr
    if None in streams:
        while (number := os.open(os.devnull, os.O_RDWR)) < len(streams):
            pass
        os.close(number)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        raise UsageError("standard output is closed: send it to a file, or to /dev/null")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def silence_stdout() -> None:
    """Let what could not be printed go nowhere: Python would complain once more at its exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str) -> None:
    """Print text, which may have several lines."""
    print(visible(text))


def note(text: str) -> None:
    """Print one line on stderr."""
    with contextlib.suppress(OSError):  # there is nobody left to tell
        print(visible(text).replace("\n", "\\n"), file=sys.stderr)


def announce(text: str) -> None:
    """One line on stderr, before what a command prints or measures; none where it is refused."""
    if isinstance(sys.stdout, CheckedOutput):
        sys.stdout.hold(text)
    else:  # a command as an object, outside of the command line
        note(text)


def print_json(value: object) -> None:
    """Print a value as one line of JSON in ASCII, which every console shows."""
    print(json.dumps(value))


@contextlib.contextmanager
def noted_warnings() -> Iterator[None]:
    """Warnings as one line each, in place of Python's line of source."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        note(f"warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def describe(error: Exception) -> str:
    """One line about an error."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename:
        name = error.filename
        return f"{name if isinstance(name, (str, int)) else os.fsdecode(name)}: {error.strerror}"
    if isinstance(error, (ValueError, OSError)) and text:
        return text
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not loaded for help
        return (
            f"the memory of the device is not enough: choose fewer rows or shorter ones, --dtype "
            f"bfloat16, or --device cpu ({text})"
        )
    if isinstance(error, ImportError) and "pip install" in text:  # the extra is named
        return text
    return f"{type(error).__name__}: {text} (unexpected; --debug shows where)"


# ---- places ----


def check_writable(
    path: Path,
    suffixes: Sequence[str] = IMAGE_SUFFIXES,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> None:
    """Find out before the work whether its result can be written.

    Args:
        inputs: what is read; none of it may be replaced, whatever the names.
    Raises: UsageError for another kind of file, a folder, an input, or a place that cannot be
        written to.
    """
    if path.suffix.lower() not in suffixes:
        raise UsageError(
            f"{path} ends with {path.suffix or 'no suffix'}, expected one of {', '.join(suffixes)}"
        )
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file in it")
    _refuse(path, inputs)
    try:
        # Asking for permission is not enough: folders of a read-only disk grant it too.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(f"nothing can be written to {path.parent}: {error.strerror}") from None


def check_model_folder(path: Path, inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Find out before the work whether a model can be written into a folder.

    Raises: UsageError for a file, a folder that holds anything but a model, and one that is read.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file: name a folder to write")
    _refuse(path, inputs)
    if path.is_dir() and not (path / "config.json").exists() and any(path.iterdir()):
        raise UsageError(f"{path} is not empty and holds no model: name a new or empty folder")


def _refuse(path: Path, inputs: Iterable[str | os.PathLike[str]]) -> None:
    try:
        refuse_overwriting(path, inputs)
    except ValueError as error:
        raise UsageError(str(error)) from None


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[str], OnProgress]]:
    """Bars on stderr, gone at the end; gives what adds a bar of some name."""
    from rich.console import Console
    from rich.progress import Progress

    if isinstance(sys.stdout, CheckedOutput):
        sys.stdout.release()
    console = Console(stderr=True)
    # Where nobody looks it would leave an empty line.
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:

        def add(name: str) -> OnProgress:
            bar = progress.add_task(name, total=None)
            return lambda done, total: progress.update(bar, completed=done, total=total)

        yield add
