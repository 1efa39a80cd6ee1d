"""What commands write: places checked before the work, and bars while it goes on."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nanomolmo2.cli.options import UsageError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

OnProgress = Callable[[int, int], None]  # called with the numbers done and of all


def check_writable(path: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> None:
    """Find out before the work whether its result can be written.

    Raises: UsageError for another kind of file, a folder, or a place that cannot be written to.
    """
    if path.suffix.lower() not in suffixes:
        raise UsageError(
            f"{path} ends with {path.suffix or 'no suffix'}, expected one of {', '.join(suffixes)}"
        )
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file in it")
    try:
        # Asking for permission is not enough: folders of a read-only disk grant it too.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(f"nothing can be written to {path.parent}: {error.strerror}") from None


def check_folder(path: Path) -> None:
    """Raises: UsageError for a file where a folder is to be written."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file: name a folder to write")


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[str], OnProgress]]:
    """Bars on stderr, gone at the end; gives what adds a bar of some name."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:

        def add(name: str) -> OnProgress:
            bar = progress.add_task(name, total=None)
            return lambda done, total: progress.update(bar, completed=done, total=total)

        yield add
