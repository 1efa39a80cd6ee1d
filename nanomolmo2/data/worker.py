"""Errors of the processes that prepare data: one sentence, whatever their number."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from nanomolmo2.data.example import BadExample

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """What a worker sends in place of data. PyTorch would put the worker's traceback into the
    message of the error; here it goes along as a note, where no sentence was meant for people.
    """

    error: Exception

    @classmethod
    def of(cls, error: Exception) -> Failure:
        if not isinstance(error, (ValueError, OSError, MemoryError, BadExample)):
            error.add_note("in a worker: " + "".join(traceback.format_exception(error)))
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # its class cannot be sent
            return cls(RuntimeError(f"{type(error).__name__}: {error}"))
        return cls(error)


def guarded(make: Callable[[], T]) -> T | Failure:
    """What a worker made, or what kept it from that."""
    try:
        return make()
    except Exception as error:
        return Failure.of(error)


def received(items: Iterator[T | Failure]) -> T:
    """The next item from a `DataLoader`.

    Raises: what the worker raised; OSError if it is gone; StopIteration at the end.
    """
    try:
        item = next(items)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(
            "the process that prepares the data has ended; most often the memory was full: free "
            "some, or let the data be prepared between the steps (--workers 0)"
        ) from None
    if isinstance(item, Failure):
        raise item.error
    return item
