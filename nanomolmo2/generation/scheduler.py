"""Scheduler: one engine for requests from any thread, which are continued together.

The engine is for one thread at a time. Here that is a thread of the scheduler's own: requests come
in through a queue, join between two steps, and get their events back through queues of their own.

    scheduler = Scheduler(model.llm, prefix_cache)
    ticket = scheduler.submit(request)      # from any thread
    for event in ticket: ...                # as the tokens come; async for in an event loop
    ticket.cancel()                         # frees its row at the next step

The thread starts with the first request and ends when there was nothing to do for a while, so that
a model which nobody uses any more can go.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Self

from nanomolmo2.generation.engine import Engine, Event, Request
from nanomolmo2.generation.prefix_cache import PrefixCache
from nanomolmo2.models import LanguageModel

LINGER_SECONDS = 2.0  # how long the thread waits for the next request
_LONGEST_STEP = 10.0  # seconds that closing waits for the step that runs


class Way(NamedTuple):
    """What of the options is the engine's: requests of one way share an engine."""

    batch_invariant: bool = False
    lookup: bool = True
    reuse: bool = True


@dataclass
class Stats:
    """What has happened since the scheduler was made, and what is going on.

    Attributes:
        waiting: requests that have no row yet. running: those that have one.
        prompt_tokens, reused_tokens, output_tokens: of requests that ended.
        requests: that ended, by their reason: ``stop``, ``length``, ``cancelled``, ``error``.
        steps, step_seconds: of all engines.
    """

    waiting: int = 0
    running: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    output_tokens: int = 0
    requests: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    step_seconds: float = 0.0


class Ticket:
    """A request that was submitted; iterating gives its events, the last with its result.

    Iterating may be interrupted, by Ctrl-C or a timeout, and gone on with. It raises what went
    wrong with this request.
    """

    def __init__(self, scheduler: Scheduler, request: Request, way: Way) -> None:
        self.request, self.way = request, way
        self.number: tuple[Way, int] | None = None  # once the engine has it
        self.ended = False
        self._scheduler = scheduler
        self._events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        self._accepted = threading.Event()
        self._refused: BaseException | None = None
        self._notify: Callable[[], object] | None = None  # after every event

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        if self.ended:
            raise StopIteration
        return self._read(self._events.get())

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        loop = asyncio.get_running_loop()
        while not self.ended:
            arrived = asyncio.Event()
            self._notify = partial(_wake, loop, arrived)  # before the look, so that none is missed
            with contextlib.suppress(queue.Empty):
                return self._read(self._events.get_nowait())
            await arrived.wait()
        raise StopAsyncIteration

    def _read(self, found: Event | BaseException) -> Event:
        if isinstance(found, BaseException):
            self.ended = True
            raise found
        self.ended = found.finished
        return found

    def cancel(self) -> None:
        """End the request; its row is free at the next step. Nothing if it has ended."""
        self._scheduler.cancel(self)

    def wait_until_taken(self) -> Ticket:
        """Raises: what the engine refuses the request for."""
        self._accepted.wait()
        if self._refused is not None:
            raise self._refused
        return self

    def taken(self, number: tuple[Way, int] | None, refused: BaseException | None = None) -> None:
        """Called by the scheduler's thread."""
        self.number, self._refused = number, refused
        self._accepted.set()

    def put(self, found: Event | BaseException) -> None:
        """Called by the scheduler's thread."""
        self._events.put(found)
        notify = self._notify
        if notify is not None:
            notify()


def _wake(loop: asyncio.AbstractEventLoop, arrived: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
        loop.call_soon_threadsafe(arrived.set)


class Cancelled(RuntimeError):
    """The request was cancelled, or the scheduler closed."""


class Scheduler:
    """Runs requests of any threads on engines of its own thread, which starts with the first."""

    def __init__(
        self, llm: LanguageModel, prefix_cache: PrefixCache | None = None, *, max_rows: int = 8
    ) -> None:
        """
        Args:
            max_rows: most requests that are continued together; others wait.
        """
        self.llm, self.prefix_cache, self.max_rows = llm, prefix_cache, max_rows
        self.seeing = threading.Lock()  # held while the vision encoder sees a prompt: one at a time
        self.stats = Stats()
        self._refusing = self._closed = self._exiting = False
        self._begin()
        _OPEN.add(self)

    def _begin(self) -> None:
        """No request is there; a forked process, too, begins like this."""
        self._engines: dict[Way, Engine] = {}
        self._tickets: dict[tuple[Way, int], Ticket] = {}
        self._changed = threading.Condition()
        self._incoming: deque[Ticket] = deque()
        self._leaving: deque[Ticket] = deque()
        self._thread: threading.Thread | None = None
        self._unfinished = 0  # tickets that have neither ended nor been refused

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has no requests, and starts a thread of its own."""
        return partial(Scheduler, max_rows=self.max_rows), (self.llm, self.prefix_cache)

    def submit(self, request: Request, way: Way | None = None) -> Ticket:
        """Take a request; it starts with the next step that has room.

        Raises: ValueError as `Engine.submit`; RuntimeError if the scheduler is closed.
        """
        ticket = Ticket(self, request, way or Way())
        with self._changed:
            if self._refusing:
                raise RuntimeError("the model was closed: make a new one")
            self._incoming.append(ticket)
            self._unfinished += 1
            self.stats.waiting += 1
            self._start_thread()
            self._changed.notify_all()
        try:
            return ticket.wait_until_taken()
        except KeyboardInterrupt:
            self.cancel(ticket)
            raise

    def cancel(self, ticket: Ticket) -> None:
        """See :meth:`Ticket.cancel`."""
        with self._changed:
            if ticket.number is None or ticket.number in self._tickets:
                self._leaving.append(ticket)
                self._changed.notify_all()

    def close(self, *, finish: bool = False, timeout: float | None = None) -> None:
        """Refuse later requests, and end those that there are.

        Args:
            finish: let them end by themselves.
            timeout: most seconds that this may take; None = as long as it takes.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._refusing = True
            if finish:
                self._changed.wait_for(lambda: not self._unfinished, timeout)
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            left = None if deadline is None else max(0.1, deadline - time.monotonic())
            thread.join(left if left is not None else _LONGEST_STEP)

    # ---- the thread ----

    def _start_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="nanomolmo2", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        error: BaseException = Cancelled("the model was closed before the answer ended")
        try:
            while self._take_in():
                for way, engine in list(self._engines.items()):
                    if engine.busy:
                        self._step(way, engine)
                self._count()
            if self._thread is not threading.current_thread():
                return  # nothing to do; another thread may have begun already
        except BaseException as mistake:
            error = mistake
        with self._changed:
            tickets = [*self._tickets.values(), *self._incoming]
            self._tickets.clear()
            self._incoming.clear()
            self._leaving.clear()
            self._engines.clear()
            self._thread = None
            for ticket in tickets if not self._exiting else ():
                self._ended("cancelled" if self._closed else "error")
                ticket.taken(None, error)
                ticket.put(error)
        self._count()

    def _take_in(self) -> bool:
        """Requests that came and went since the last step; waits where there is nothing to do.

        Returns: False once the scheduler is closed, or nothing came for a while.
        """
        with self._changed:
            while not (self._closed or self._incoming or self._leaving or self._tickets):
                if not self._changed.wait(LINGER_SECONDS) and not self._incoming:
                    self._engines.clear()
                    self._thread = None
                    return False
            if self._closed:
                return False
            incoming, self._incoming = self._incoming, deque()
            leaving, self._leaving = self._leaving, deque()
            for ticket in incoming:
                self._accept(ticket)
        for ticket in leaving:
            self._drop(ticket)
        return True

    def _accept(self, ticket: Ticket) -> None:
        way = ticket.way
        try:
            if way not in self._engines:
                self._engines[way] = Engine(
                    self.llm,
                    max_rows=self.max_rows,
                    batch_invariant=way.batch_invariant,
                    lookup=way.lookup,
                    prefix_cache=self.prefix_cache if way.reuse else None,
                )
            number = way, self._engines[way].submit(ticket.request)
        except Exception as error:
            self._ended("error")
            ticket.taken(None, error)
            return
        self._tickets[number] = ticket
        ticket.taken(number)

    def _drop(self, ticket: Ticket) -> None:
        if ticket.number is None or self._tickets.pop(ticket.number, None) is None:
            return
        way, number = ticket.number
        self._engines[way].cancel(number)
        self._ended("cancelled")
        ticket.put(Cancelled("the request was cancelled"))

    def _step(self, way: Way, engine: Engine) -> None:
        start = time.perf_counter()
        try:
            events = engine.step()
        except Exception as error:  # of the machine, not of a row: all rows of the step are lost
            self._engines.pop(way)
            for number in [number for number in self._tickets if number[0] == way]:
                self._ended("error")
                self._tickets.pop(number).put(error)
            return
        self.stats.steps += 1
        self.stats.step_seconds += time.perf_counter() - start
        for event in events:
            number = way, event.request_id
            ticket = self._tickets.get(number)
            if ticket is None:
                continue
            if event.finished:
                del self._tickets[number]
                self._finished(event)
            ticket.put(event.error or event)

    def _finished(self, event: Event) -> None:
        if event.result is None:
            self._ended("error")
            return
        self._ended(event.result.finish_reason)
        self.stats.prompt_tokens += event.result.prompt_tokens
        self.stats.reused_tokens += event.result.reused_tokens
        self.stats.output_tokens += len(event.result.token_ids)

    def _ended(self, reason: str) -> None:
        with self._changed:
            self.stats.requests[reason] = self.stats.requests.get(reason, 0) + 1
            self._unfinished -= 1
            self._changed.notify_all()

    def _count(self) -> None:
        running = sum(engine.running for engine in self._engines.values())
        with self._changed:
            self.stats.running = running
            self.stats.waiting = self._unfinished - running


# A thread that computes while the interpreter ends would take it down.
_OPEN: weakref.WeakSet[Scheduler] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for scheduler in list(_OPEN):
        scheduler._exiting = True  # threads that still wait end with the interpreter, silently
        scheduler.close()


def _begin_all() -> None:
    for scheduler in list(_OPEN):
        scheduler._begin()
        scheduler.seeing = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_all)  # threads and their locks stay with the parent
