"""The command ``nanomolmo2``: one module for each of its commands.

A command is a frozen dataclass: its fields are the options, ``run`` does the work. Help is answered
without loading torch: everything heavy is imported inside ``run``.

Exit codes: 0; 1 an input or the work failed; 2 the command line is wrong; 130 interrupted; 143
training was told to end by SIGTERM.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import sys
import textwrap
import traceback
import typing
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from tyro.conf import subcommand

from nanomolmo2 import __version__
from nanomolmo2.cli.ask import Ask
from nanomolmo2.cli.bench import Bench
from nanomolmo2.cli.data import Data
from nanomolmo2.cli.demo import Demo
from nanomolmo2.cli.download import Download
from nanomolmo2.cli.eval import Eval
from nanomolmo2.cli.export import Export
from nanomolmo2.cli.info import Info
from nanomolmo2.cli.inspect import Inspect
from nanomolmo2.cli.options import UsageError, check_ranges
from nanomolmo2.cli.output import (
    STDOUT,
    CheckedOutput,
    note,
    noted_warnings,
    open_streams,
    silence_stdout,
)
from nanomolmo2.cli.plan import Plan
from nanomolmo2.cli.plot import Plot
from nanomolmo2.cli.quantize import Quantize
from nanomolmo2.cli.train import Train
from nanomolmo2.terminal import visible

Command = (
    Ask
    | Info
    | Download
    | Quantize
    | Export
    | Train
    | Plan
    | Plot
    | Inspect
    | Data
    | Eval
    | Bench
    | Demo
)


def parse(arguments: Sequence[str]) -> Command:
    """Command line -> command.

    Raises: UsageError if it cannot be read; SystemExit(0) after --help.
    """
    kinds = {kind.__name__.lower(): kind for kind in typing.get_args(Command)}
    chosen = bool(arguments) and arguments[0] in kinds  # else a list: a line for each will do
    commands = []
    for name, kind in kinds.items():
        paragraphs = [
            textwrap.fill(" ".join(p.split()), 80) for p in str(kind.__doc__).split("\n\n")
        ]
        description = "\n\n".join(paragraphs) if chosen else paragraphs[0]
        commands.append(Annotated[kind, subcommand(name, description=description)])
    form: Any = typing.Union[tuple(commands)]  # noqa: UP007
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                form,
                prog="nanomolmo2",
                description="A vision-language model small enough to read. `nanomolmo2 COMMAND "
                "--help` tells all about a command.",
                args=list(arguments),
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
    raise UsageError(
        f"{first_sentence(complaint.getvalue())}; see nanomolmo2 "
        f"{f'{arguments[0]} ' if chosen else ''}--help"
    )


def first_sentence(box: str) -> str:
    """What tyro says first in its box; below a rule follow hints, more indented option help."""
    lines = [line.strip("│") for line in box.splitlines()[1:]]  # the top border holds the title
    said = itertools.takewhile(lambda line: line.strip("─╰╯ "), lines)
    text = " ".join(line.strip() for line in said if not line.startswith(" " * 9)).rstrip(".")
    if found := re.search(r"parsing (--\S+): no type matching .*(INT|FLOAT).* from \[(.*)\]", text):
        kind = "a whole number" if found[2] == "INT" else "a number"
        return f"{found[1]} must be {kind}, found {found[3]}"
    if found := re.search(r"Perhaps you meant:[^-]*(--[\w-]+)", box):
        text += f" (perhaps {found[1]}?)"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (by default the process's own) and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        open_streams()
        output: Any = CheckedOutput(sys.stdout)
        with noted_warnings(), contextlib.redirect_stdout(output):
            code = _run(arguments)
            output.release()
            output.flush()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        # Python would end itself by the signal if it came inside an exec(), as of a dataclass.
        exec("")
        return 130
    except BrokenPipeError:
        # Whoever read our output is gone, as in `nanomolmo2 info tiny | head`.
        silence_stdout()
        return 141
    except Exception as error:
        if "--debug" in arguments:
            print(visible(traceback.format_exc()), end="", file=sys.stderr)
        if isinstance(error, OSError) and error.filename == STDOUT:
            silence_stdout()
        note(f"nanomolmo2: {describe(error)}")
        return 2 if isinstance(error, UsageError) else 1
    return 141 if output.broken else code


def _run(arguments: Sequence[str]) -> int:
    if arguments in (["--version"], ["-V"]):
        print(f"nanomolmo2 {__version__}")
        return 0
    try:
        command = parse(arguments)
        check_ranges(command)
        command.run()
    except SystemExit as stop:  # --help, and a training that was told to end
        return int(stop.code or 0)
    return 0


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
