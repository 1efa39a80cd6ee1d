"""Errors of a worker come out as they were raised."""

from __future__ import annotations

import multiprocessing

import pytest

from nanomolmo2.data.example import BadExample
from nanomolmo2.data.worker import Failure, guarded, received


class Unsendable(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("found 3, expected 4"),
        FileNotFoundError(2, "No such file", "a.png"),
        MemoryError(),
        BadExample("bad record", "line 3"),
        NameError("name 'x' is not defined"),
    ],
)
def test_an_error_keeps_its_type_and_sentence(error: Exception) -> None:
    said = str(error)
    queue = multiprocessing.get_context("fork").SimpleQueue()
    queue.put(guarded(lambda: fail(error)))
    with pytest.raises(type(error)) as raised:
        received(iter([queue.get()]))
    assert str(raised.value) == said
    # Where this program is at fault, it also says where.
    notes = getattr(raised.value, "__notes__", [])
    assert len(notes) == isinstance(error, NameError)
    assert all("in a worker: Traceback" in note for note in notes)


def test_an_error_that_cannot_be_sent_is_told_by_its_name() -> None:
    failure = guarded(lambda: fail(Unsendable(1, 2)))
    assert isinstance(failure, Failure)
    with pytest.raises(RuntimeError, match=r"^Unsendable: 1 and 2$"):
        received(iter([failure]))


def test_a_worker_that_is_gone_is_one_sentence() -> None:
    def gone():
        raise RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly")
        yield

    with pytest.raises(OSError, match="the process that prepares the data has ended"):
        received(gone())


def test_what_is_made_is_received() -> None:
    assert guarded(lambda: 5) == 5
    assert received(iter([5])) == 5
    with pytest.raises(StopIteration):
        received(iter([]))
    with pytest.raises(KeyboardInterrupt):
        guarded(lambda: fail(KeyboardInterrupt()))  # type: ignore[arg-type]
