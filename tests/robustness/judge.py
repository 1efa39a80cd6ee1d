"""What happens to one hostile input, and whether that is within the rules.

An input ends as a result or as one expected exception with a one-line message, within `SECONDS` of
processor time and `MEGABYTES` above the start; it runs no code, writes nothing outside of its
folder, and shows neither terminal codes nor content of other files.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

SECONDS = 5.0
MEGABYTES = 1500.0
LONGEST_MESSAGE = 500  # characters, names that we gave not counted
SECRET = "correct-horse-battery-staple"  # stands in a file that nobody may quote
LOUD = (255, 0, 254)  # colour of a picture that nobody may read

KINDS = ("pictures", "videos", "checkpoints", "texts", "records", "commands", "kills", "threads")

# What a terminal obeys, written anew: the product's own list is what is tested.
_CODES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass
class Case:
    """A hostile input, ready to be given to the product.

    Attributes:
        what: a few words for reports.
        call: gives it to the product.
        check: of what `call` returned: what is wrong, or None.
        names: parts of messages that come from the input, such as its path.
        closed: it may read nothing outside of its folder.
        watched: what it does to files is looked at.
        seconds: limit of this case.
    """

    what: str
    call: Callable[[], Any]
    check: Callable[[Any], str | None] = lambda result: None
    names: tuple[str, ...] = ()
    closed: bool = False
    watched: bool = True
    seconds: float = SECONDS


@dataclass
class Outcome:
    """``kind:seed:number`` and what became of it."""

    name: str
    what: str = ""
    refused: str = ""  # the message; empty: there was a result
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    megabytes: float = 0.0


@dataclass
class Surroundings:
    """Beside the folder of an input: what must stay as it is, and what must not be read."""

    root: Path

    def __post_init__(self) -> None:
        self.outside.mkdir(parents=True, exist_ok=True)
        (self.outside / "secret.txt").write_text(f"{SECRET}\n" * 3)
        (self.outside / "secret.json").write_text(f'{{"password": "{SECRET}"}}')
        if not (self.outside / "pipe").exists():
            os.mkfifo(self.outside / "pipe")
        from PIL import Image

        Image.new("RGB", (24, 16), LOUD).save(self.outside / "loud.png")

    @property
    def outside(self) -> Path:
        return self.root / "outside"

    @property
    def marker(self) -> Path:
        """Made by code that was planted, if it is run."""
        return self.root / "ran"


class Planted:
    """Pickled into files: unpickling it makes the marker."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


# ---- watching ----

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink"}
_CHANGES |= {"os.chmod", "os.truncate", "os.chown", "shutil.rmtree", "os.utime"}
_FORBIDDEN = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect"}
_FORBIDDEN |= {"socket.getaddrinfo", "os.kill"}


class _Watch:
    """An audit hook (it can not be taken out again) that notes what an input should not do."""

    def __init__(self) -> None:
        self.here: str | None = None
        self.outside = ""
        self.closed = False
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: Any) -> None:
        if self.here is None:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes)):
                self._opened(os.fsdecode(path), flags if isinstance(flags, int) else 0)
        elif event in _CHANGES:
            # Beneath an open folder (rmtree goes so) names are relative to that.
            inside = event in ("os.remove", "os.rmdir") and arguments[1] != -1
            if (
                isinstance(arguments[0], (str, bytes))
                and not inside
                and not self._is_ours(arguments[0])
            ):
                self.seen.append(f"{event} {arguments[0]!r}")
        elif event in _FORBIDDEN:
            self.seen.append(f"{event} {str(arguments)[:120]}")

    def _opened(self, path: str, flags: int) -> None:
        if flags & _WRITES and not self._is_ours(path) and path != os.devnull:
            self.seen.append(f"{path!r} opened for writing")
        if self.closed and os.path.realpath(path).startswith(self.outside):
            self.seen.append(f"{path!r}, outside of it, was read")

    def _is_ours(self, path: str | bytes) -> bool:
        return os.path.realpath(os.fsdecode(path)).startswith(self.here or "")

    @contextlib.contextmanager
    def over(self, case: Case, here: Path, outside: Path) -> Iterator[list[str]]:
        self.seen = []
        self.outside, self.closed = str(outside), case.closed
        self.here = str(here) if case.watched else None
        try:
            yield self.seen
        finally:
            self.here = None


_watch: _Watch | None = None


def _memory(name: str) -> float:
    """VmRSS or VmHWM, megabytes."""
    with open("/proc/self/status", encoding="ascii") as stream:
        for line in stream:
            if line.startswith(name):
                return int(line.split()[1]) / 1024
    return 0.0


def _forget_peak() -> None:
    with open("/proc/self/clear_refs", "w", encoding="ascii") as stream:
        stream.write("5")


# ---- judging ----


def make_case(name: str, here: Path, around: Surroundings) -> Case:
    """The input of a name ``kind:seed:number``, or ``kind:NAME`` for one that was once found."""
    kind, _, which = name.partition(":")
    module = import_module(f"tests.robustness.{kind}")
    if which in getattr(module, "FOUND", {}):
        return module.FOUND[which](here, around)
    # The name as a whole seeds it: neither the order nor the number of inputs matters.
    return module.make(random.Random(name), here, around)


def judge(name: str, around: Surroundings) -> Outcome:
    """Make one input in a folder of its own, give it to the product, and judge what happens."""
    global _watch
    _watch = _watch or _Watch()
    outcome = Outcome(name)
    here = Path(tempfile.mkdtemp(prefix="i", dir=around.root)).resolve()
    try:
        try:
            case = make_case(name, here, around)
        except Exception as error:
            outcome.problems.append(
                f"the generator failed: {type(error).__name__}: {_shown(error)}"
            )
            return outcome
        outcome.what = case.what
        _try(case, outcome, here, around, _watch)
    finally:
        shutil.rmtree(here, ignore_errors=True)
    if around.marker.exists():
        outcome.problems.append("planted code was run")
        around.marker.rmdir()
    return outcome


def _try(case: Case, outcome: Outcome, here: Path, around: Surroundings, watch: _Watch) -> None:
    _forget_peak()
    before, wall, start = _memory("VmRSS"), time.perf_counter(), time.process_time()
    result, error = None, None
    with watch.over(case, here, around.outside) as seen, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = case.call()
        except BaseException as caught:
            error = caught
    # Waiting for a processor is not the input's fault, waiting for a pipe is: the worker's owner
    # looks after that.
    outcome.seconds = min(time.process_time() - start, time.perf_counter() - wall)
    outcome.megabytes = _memory("VmHWM") - before
    outcome.problems += seen
    if outcome.seconds > case.seconds:
        outcome.problems.append(f"took {outcome.seconds:.1f} s")
    if outcome.megabytes > MEGABYTES:
        outcome.problems.append(f"took {outcome.megabytes:,.0f} MB")
    if error is None:
        problem = case.check(result)
        outcome.problems += [problem] if problem else []
    else:
        outcome.refused = f"{type(error).__name__}: {error}"
        # Of a damaged length Pillow may ask for 4 GB at once, and would use none of it.
        if "fit into memory" in outcome.refused and outcome.megabytes > MEGABYTES / 8:
            outcome.problems.append("needed more memory than a process here has")
        outcome.problems += problems_of(error, (*case.names, str(here), str(around.root)))


def problems_of(error: BaseException, names: tuple[str, ...] = ()) -> list[str]:
    """What is wrong with the way in which an input was refused."""
    from nanomolmo2.data.example import BadExample

    # Their subclasses of other makes (UnicodeDecodeError, JSONDecodeError) were not meant.
    kinds = (ValueError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    kinds += (OSError, FileExistsError, BadExample, ImportError)
    is_ours = type(error).__module__.startswith("nanomolmo2") and isinstance(error, kinds)
    if type(error) not in kinds and not is_ours:
        return [f"raised {type(error).__name__}: {_shown(error)}"]
    found = []
    text = printed = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    if not isinstance(error, BadExample):  # which is counted, and printed by others
        printed = print_by_command(error)
        if "(unexpected; --debug" in printed:
            found.append(f"is 'unexpected' to the command: {printed[:200]!r}")
        if _CODES.search(printed.rstrip("\n")) or printed.rstrip("\n").count("\n"):
            found.append(f"codes reach the terminal: {printed[:200]!r}")
    for name in sorted(filter(None, names), key=len, reverse=True):
        text = text.replace(name, "NAME").replace(repr(name)[1:-1], "NAME")
    if "\n" in text:
        found.append(f"a message of several lines: {text[:300]!r}")
    if len(text) > LONGEST_MESSAGE:
        found.append(f"a message of {len(text)} characters: {text[:300]!r}")
    if not text.strip():
        found.append(f"an empty message of {type(error).__name__}")
    if SECRET[:8] in text + printed:
        found.append(f"quotes a file that is none of its business: {text[:300]!r}")
    return found


def _shown(error: BaseException) -> str:
    import traceback

    last = traceback.extract_tb(error.__traceback__)[-3:]
    places = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(last))
    return f"{' '.join(str(error).split())[:200]} [{places}]"


def print_by_command(error: Exception) -> str:
    """What the command line prints when one of its commands raises this."""
    from nanomolmo2 import cli

    class Command:
        debug = False

        def run(self) -> None:
            raise error

    parse, check = cli.parse, cli.check_ranges
    cli.parse, cli.check_ranges = lambda arguments: Command(), lambda command: None
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(["ask"])
    finally:
        cli.parse, cli.check_ranges = parse, check
    assert code == 1, code
    return out.getvalue() + err.getvalue()


def has_codes(text: str) -> bool:
    """Whether a terminal would obey something in it."""
    return _CODES.search(text) is not None
