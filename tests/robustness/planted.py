"""Inputs that break the rules on purpose: what the judge must see."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.robustness.judge import LONGEST_MESSAGE, SECRET, Case, Surroundings


def make(rng: random.Random, here: Path, around: Surroundings) -> Case:
    return Case(f"{rng.random()}", lambda: None)


def _raising(error: BaseException) -> Callable[[Path, Surroundings], Case]:
    def call() -> Any:
        raise error

    return lambda here, around: Case("planted", call)


def _doing(
    do: Callable[[Path, Surroundings], Any], **fields: Any
) -> Callable[[Path, Surroundings], Case]:
    return lambda here, around: Case("planted", lambda: do(here, around), **fields)


def _memory(here: Path, around: Surroundings) -> None:
    bytearray(b"x") * 1_600_000_000


def _wait(here: Path, around: Surroundings) -> None:
    (around.outside / "pipe").open("rb").read()


def _spin(here: Path, around: Surroundings) -> None:
    while True:
        time.process_time()


FOUND: dict[str, Callable[[Path, Surroundings], Case]] = {
    "nothing": _doing(lambda here, around: (here / "a.txt").write_text("mine")),
    "refused": _raising(ValueError("a.png is no picture: convert it")),
    "several lines": _raising(ValueError("one\ntwo")),
    "a long message": _raising(ValueError("x" * (LONGEST_MESSAGE + 1))),
    "an empty message": _raising(ValueError()),
    "a secret": _raising(ValueError(f"found {SECRET[:20]!r}")),
    "another kind of error": _raising(TypeError("unhashable type: 'list'")),
    "an error of another make": _raising(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "start byte")),
    "no memory": _raising(MemoryError()),
    "a wrong result": _doing(lambda here, around: 1, check=lambda result: "is not 2"),
    "memory": _doing(_memory),
    "a crash": _doing(lambda here, around: os.abort()),
    "a wait": _doing(_wait),
    "a loop": _doing(_spin),
    "code": _doing(lambda here, around: os.mkdir(around.marker), watched=False),
    "a file outside": _doing(lambda here, around: (around.outside / "new").write_text("x")),
    "a file outside, deleted": _doing(
        lambda here, around: (around.outside / "missing").unlink(missing_ok=True)
    ),
    "a program": _doing(lambda here, around: os.system("true")),
    "a file outside, read": _doing(
        lambda here, around: (around.outside / "secret.txt").read_text(), closed=True
    ),
    "a link to outside, read": _doing(
        lambda here, around: _through_a_link(here, around), closed=True
    ),
}


def _through_a_link(here: Path, around: Surroundings) -> str:
    (here / "link").symlink_to(around.outside / "secret.txt")
    return (here / "link").read_text()
