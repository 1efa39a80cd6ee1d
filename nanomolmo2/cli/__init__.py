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
import re
import sys
import textwrap
import traceback
import typing
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, Protocol

import tyro
from tyro.conf import subcommand

from nanomolmo2 import __version__
from nanomolmo2.cli.options import UsageError, check_ranges
from nanomolmo2.cli.output import (
    STDOUT,
    CheckedOutput,
    describe,
    note,
    noted_warnings,
    open_streams,
    silence_stdout,
)
from nanomolmo2.terminal import visible

# Each is a module of its name here, with a class of its name. Only the one that runs is imported.
COMMANDS = (
    *("ask", "chat", "info", "download", "quantize", "export", "train", "plan", "plot", "inspect"),
    *("data", "eval", "bench", "demo", "serve", "teach", "find"),
)


class Runs(Protocol):
    """A command with its options."""

    def run(self) -> None: ...


def command_class(name: str) -> type[Runs]:
    """The class of one of `COMMANDS`."""
    found: type[Runs] = getattr(import_module(f"nanomolmo2.cli.{name}"), name.capitalize())
    return found


def __getattr__(name: str) -> object:
    """The classes by name, and all of them as the union ``Command``, on first use (PEP 562)."""
    if name == "Command":
        return typing.Union[tuple(map(command_class, COMMANDS))]  # noqa: UP007
    if name.lower() in COMMANDS and name == name.capitalize():
        return command_class(name.lower())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def parse(arguments: Sequence[str]) -> Runs:
    """Command line -> command.

    Raises: UsageError if it cannot be read; SystemExit(0) after --help.
    """
    chosen = arguments[0] if arguments and arguments[0] in COMMANDS else None
    form: Any
    if chosen:
        form = command_class(chosen)
        description, prog = "\n\n".join(paragraphs(form)), f"nanomolmo2 {chosen}"
    else:  # a list: a line for each will do
        kinds = [(name, command_class(name)) for name in COMMANDS]
        forms = [Annotated[k, subcommand(n, description=paragraphs(k)[0])] for n, k in kinds]
        form, prog = typing.Union[tuple(forms)], "nanomolmo2"  # noqa: UP007
        description = (
            "A vision-language model small enough to read. `nanomolmo2 COMMAND --help` tells all "
            "about a command."
        )
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed: Runs = tyro.cli(
                form,
                prog=prog,
                description=description,
                args=arguments[1:] if chosen else list(arguments),
                config=(tyro.conf.FlagCreatePairsOff,),
            )
            return parsed
    except SystemExit as stop:
        if not stop.code:
            raise
    raise UsageError(f"{first_sentence(complaint.getvalue())}; see {prog} --help")


def paragraphs(kind: type) -> list[str]:
    """What a command says about itself, wrapped."""
    return [textwrap.fill(" ".join(p.split()), 80) for p in str(kind.__doc__).split("\n\n")]


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
