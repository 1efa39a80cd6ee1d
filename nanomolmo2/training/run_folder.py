"""The folder of a run: it holds nothing else, it can be written, and one process trains in it."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, TypeAlias

from nanomolmo2.checks import FULL_DISK, refuse_overwriting
from nanomolmo2.files import open_regular
from nanomolmo2.training import metrics
from nanomolmo2.training.checkpoint import FOLDER as CHECKPOINTS
from nanomolmo2.training.distributed import World, gather_objects

RECIPE_FILE, MODEL_FOLDER, LOCK_FILE = "recipe.json", "model", "run.lock"
BEST_FILE = "best.json"  # which step the model is of, and all that was measured
ADAPTER_FOLDER = "adapter"
# Where any of these is, the folder is that of a run.
MARKS = (CHECKPOINTS, metrics.FILE, RECIPE_FILE)

# False: a new run. True: go on behind the newest checkpoint, from the beginning where there is
# none, and say so. "required": there must be one.
Resume: TypeAlias = bool | Literal["required"]
Info: TypeAlias = Callable[[str], None]

_held: dict[Path, tuple[int, int | None]] = {}  # folder -> thread, descriptor of the lock


@contextlib.contextmanager
def claimed(
    folder: Path,
    resume: Resume = False,
    *,
    world: World | None = None,
    inputs: Iterable[str | Path] = (),
    shared: bool = False,
    info: Info = lambda text: None,
) -> Iterator[None]:
    """Have a folder for the run of this process, made where it is missing. Every rank calls it.

    Inside of another claim of the same folder by the same thread it takes nothing more.

    Args:
        resume: as in `loop.run`.
        inputs: folders and files that the run reads.
        shared: other things may lie there, which the caller knows.
        info: told that there is nothing to resume, and that the disk knows no locks.
    Raises: ValueError if the folder holds other things, another process trains in it, or a
        checkpoint is required and not there; OSError if it cannot be written. Nothing was written
        then.
    """
    key, world, thread = folder.resolve(), world or World(), threading.get_ident()
    if _held.get(key, (None,))[0] == thread:
        _check_new(folder, resume)
        yield
        return
    made: list[Path] = []
    lock: int | None = None
    problem: OSError | ValueError | None = None
    try:
        if world.is_main:  # the other ranks share it
            try:
                check_contents(folder, inputs, shared)
                _check_new(folder, resume)
                _check_resume(folder, resume, info)
                made = _make(folder)
                lock = _lock(folder, info)
                _try_writing(folder)
            except (OSError, ValueError) as error:
                problem = error
        if world.size > 1:
            found = gather_objects(None if problem is None else str(problem))[0]
            problem = problem if found is None or problem else ValueError(found)
        if problem is not None:
            raise problem
        _held[key] = thread, lock
        try:
            yield
        finally:
            _held.pop(key, None)
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):  # while it is held, so that nobody's is removed
                (folder / LOCK_FILE).unlink()
            os.close(lock)
        for path in made:  # of a run that ended before it wrote anything
            with contextlib.suppress(OSError):
                path.rmdir()


def check_contents(folder: Path, inputs: Iterable[str | Path] = (), shared: bool = False) -> None:
    """Raises: ValueError if a run there would write among, or over, what is no part of it."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder for the run (--out)")
    for given in map(Path, inputs):
        if given.is_dir():
            refuse_overwriting(folder / MODEL_FOLDER, [given])
    if shared or is_run(folder) or not folder.exists():
        return
    others = sorted(n for n in os.listdir(folder) if not n.startswith(".") and n != LOCK_FILE)
    if others:
        what = "a model" if "config.json" in others else "other things"
        listed = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise ValueError(
            f"{folder} holds {what} ({listed}) and no training run: name a new folder (--out)"
        )


def check_outside(folder: Path, data: Iterable[str | Path]) -> None:
    """Raises: ValueError if a run there would be read as data, which a folder's files are."""
    for given in map(Path, data):
        path = given.expanduser()
        if path.is_dir() and folder.resolve().is_relative_to(path.resolve()):
            raise ValueError(
                f"{folder} lies in {given}, whose files are the data: the run's own files would "
                f"be read as records; name a folder elsewhere (--out)"
            )


def is_run(folder: Path) -> bool:
    """Whether a run has begun there."""
    return any((folder / name).exists() for name in MARKS)


def check_space(folder: Path, num_bytes: int) -> None:
    """Raises: OSError if the disk has no room for a checkpoint of that size."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            f"the disk of {folder} has {free / 1e6:,.0f} MB left, and a checkpoint of this run "
            f"takes {num_bytes / 1e6:,.0f} MB: free some space, or choose a folder on another disk"
        )


def _check_new(folder: Path, resume: Resume) -> None:
    log = folder / metrics.FILE
    begun = log.exists() and log.stat().st_size > 0
    if not resume and (begun or _has_checkpoint(folder)):
        raise ValueError(
            f"{folder} already holds a run: resume it (--resume), or choose another folder"
        )


def _has_checkpoint(folder: Path) -> bool:
    return any((folder / CHECKPOINTS).glob("[0-9]*"))


def _check_resume(folder: Path, resume: Resume, info: Info) -> None:
    """Say, or raise, that there is nothing to go on with."""
    if not resume or _has_checkpoint(folder):
        return
    if not folder.exists():
        why = "there is no such folder"
    else:
        why = "it holds no checkpoint" if os.listdir(folder) else "it is empty"
    if resume == "required":
        raise ValueError(
            f"there is nothing to resume in {folder} ({why}): name the folder of a run, or start "
            f"a new one without --require-checkpoint"
        )
    info(
        f"nothing to resume in {folder} ({why}): starting anew; --require-checkpoint makes this "
        f"an error"
    )


def _make(folder: Path) -> list[Path]:
    """Make a folder and those above it; returns the new ones, the inner ones first."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(folder, error) from error
    return new


def _lock(folder: Path, info: Info) -> int | None:
    """Take the folder's lock, which the system frees when this process ends, however it ends."""
    path = folder / LOCK_FILE
    try:
        flock = importlib.import_module("fcntl")
    except ImportError:  # not on Windows
        return None
    while True:
        try:
            number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _not_writable(path, error) from error
        try:
            flock.flock(number, flock.LOCK_EX | flock.LOCK_NB)
        except BlockingIOError:
            holder = os.read(number, 200).decode(errors="replace").split()
            os.close(number)
            raise ValueError(_in_use(folder, holder)) from None
        except OSError as error:  # some network disks
            info(
                f"{folder} cannot be locked ({error.strerror}): see that no other training writes "
                f"there"
            )
            break
        # The one who had it before may have removed the file since it was opened.
        if path.exists() and os.path.samestat(os.fstat(number), path.stat()):
            break
        os.close(number)
    try:
        os.ftruncate(number, 0)
        os.pwrite(number, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
    except OSError as error:
        path.unlink(missing_ok=True)
        os.close(number)
        raise _not_writable(path, error) from error
    return number


def _in_use(folder: Path, holder: list[str]) -> str:
    process = f"process {holder[0]}" if holder else "another process"
    if len(holder) > 1 and holder[1] != socket.gethostname():
        process += f" on {holder[1]}"
    return (
        f"{folder} is in use: {process} trains in it; wait for its end, stop it, or choose another "
        f"folder (--out)"
    )


def _try_writing(folder: Path) -> None:
    """Write where the run will: asking for permission is not enough, a read-only disk grants it."""
    for path in (folder, folder / CHECKPOINTS):
        if path.exists():
            try:
                with tempfile.TemporaryFile(dir=path) as stream:
                    stream.write(bytes(4096))
                    stream.flush()
            except OSError as error:
                raise _not_writable(path, error) from error
    log = folder / metrics.FILE
    if log.exists():
        open_regular(log).close()  # a pipe would wait for who reads it
        try:
            with log.open("ab"):
                pass
        except OSError as error:
            raise _not_writable(log, error) from error


def _not_writable(path: Path, error: OSError) -> OSError:
    if error.errno in FULL_DISK:
        advice = "free some space, or choose a folder on another disk (--out)"
    elif error.errno == errno.EROFS:
        advice = "the disk takes no files, choose a folder on another one (--out)"
    else:
        advice = "see that you may write there, or choose another folder (--out)"
    return OSError(f"{path} cannot be written ({error.strerror or error}): {advice}")


def _let_go() -> None:
    """In a fork: a worker that outlives its parent must not keep the lock."""
    for _, number in _held.values():
        if number is not None:
            os.close(number)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
