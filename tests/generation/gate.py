"""A grammar that lets anything come, once a test says so: answers stand still meanwhile."""

from __future__ import annotations

import threading


class Gate:
    """A `Constraint` at which an answer waits; ``reached`` once it does, ``open`` lets it go on."""

    def __init__(self, free: int = 0) -> None:
        """
        Args:
            free: tokens that are chosen before it waits.
        """
        self.free = free
        self.reached = threading.Event()
        self._open = threading.Event()

    def open(self) -> None:
        self._open.set()

    def start(self) -> Gate:
        return self

    def allowed(self) -> None:
        if self.free:
            self.free -= 1
            return
        self.reached.set()
        assert self._open.wait(60)

    def advance(self, id: int) -> None:
        pass
