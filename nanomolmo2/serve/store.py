"""ModelStore: several models by name, loaded when they are first asked for."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanomolmo2.serve.refusal import LOG, Refusal, closed, describe_error

if TYPE_CHECKING:
    from nanomolmo2.generation.vlm import VLM

log = logging.getLogger(LOG)

PATIENCE = 60.0  # seconds that a model waits for others to become idle


@dataclass
class _Entry:
    name: str
    load: Callable[[], VLM]
    weight_bytes: Callable[[], int]
    users: int = 0
    last_use: int = 0
    loading: Future[VLM] | None = None  # done: the model is there
    held_bytes: int = 0


class ModelStore:
    """Models by name. Each is loaded once, however many ask for it at the same time.

    ::

        with store.use("tiny") as vlm: ...          # or: async with store.use("tiny") as vlm: ...

    A model in use stays. Where the weights of another would take more than the limit together with
    those that are there, the models that nobody uses go, the least recently used first.
    """

    def __init__(
        self,
        models: Mapping[str, Callable[[], VLM]],
        *,
        weight_bytes: Mapping[str, Callable[[], int]] | None = None,
        memory_bytes: int | None = None,
        patience: float = PATIENCE,
    ) -> None:
        """
        Args:
            models: what loads the model of a name; the first name is the default.
            weight_bytes: what tells the bytes of its weights before it is loaded; needed with
                ``memory_bytes``.
            memory_bytes: of the weights of all models together; None = no limit.
            patience: seconds that a model waits until others that are in its way are idle.
        """
        if not models:
            raise ValueError("a server needs at least one model")
        self.memory_bytes, self.patience = memory_bytes, patience
        sizes = weight_bytes or {}
        self._entries = {
            name: _Entry(name, load, sizes.get(name, lambda: 0)) for name, load in models.items()
        }
        self._changed = threading.Condition()
        self._clock = itertools.count(1)
        self._closed = False
        self._threads = ThreadPoolExecutor(len(models), thread_name_prefix="nanomolmo2-load")

    @property
    def default(self) -> str:
        """The name of the model that answers where a request names none."""
        return next(iter(self._entries))

    def names(self) -> list[str]:
        """All names, in the order they were given, whether loaded or not."""
        return list(self._entries)

    def check(self, name: str) -> None:
        """Raises: Refusal (404) for a name that there is not, with those there are."""
        if name not in self._entries:
            raise Refusal(
                f"there is no model {name[:100]!r} here: choose one of {', '.join(self.names())}",
                status=404,
                code="model_not_found",
                param="model",
            )

    def loaded(self) -> dict[str, VLM]:
        """The models that are there, by name; not to be kept, or used for answers."""
        with self._changed:
            found = {name: entry.loading for name, entry in self._entries.items()}
        return {
            name: future.result()
            for name, future in found.items()
            if future is not None and future.done() and future.exception() is None
        }

    def use(self, name: str | None = None) -> Use:
        """A model for the length of a ``with`` or ``async with`` block; None = the default.

        Raises: Refusal on entering: 404 for a name that there is not, with those there are; 503 if
            it does not fit beside models in use, or at all, or could not be loaded (its cause).
        """
        return Use(self, self.default if name is None else name)

    def close(self) -> None:
        """Forget all models; what runs on them ends."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._threads.shutdown(wait=True)
        models = self.loaded()
        with self._changed:
            for entry in self._entries.values():
                entry.loading, entry.held_bytes = None, 0
        for vlm in models.values():
            vlm.close()

    # ---- of Use ----

    def join(self, name: str) -> Future[VLM]:
        """Count a user, and load the model if it is not there."""
        self.check(name)
        with self._changed:
            if self._closed:
                raise closed()
            entry = self._entries[name]
            if entry.loading is None:
                entry.loading = self._threads.submit(self._load, entry)
            entry.users += 1
            return entry.loading

    def leave(self, name: str) -> None:
        """Count a user less."""
        with self._changed:
            entry = self._entries[name]
            entry.users -= 1
            entry.last_use = next(self._clock)
            self._changed.notify_all()

    # ---- its threads ----

    def _load(self, entry: _Entry) -> VLM:
        try:
            if self.memory_bytes is not None:
                self._make_room(entry, entry.weight_bytes(), self.memory_bytes)
            return entry.load()
        except Exception as error:
            with self._changed:  # the next who asks tries again
                entry.loading, entry.held_bytes = None, 0
                self._changed.notify_all()
            if isinstance(error, Refusal):
                raise
            # Its text names folders, which are nobody's business.
            log.error("the model %s could not be loaded: %s", entry.name, describe_error(error))
            raise Refusal(
                f"the model {entry.name} could not be loaded: try again, or choose another",
                status=503,
                code="model_not_loaded",
                param="model",
            ) from error

    def _make_room(self, entry: _Entry, needed: int, limit: int) -> None:
        """Drop idle models until the weights fit, and take the room.

        Raises: Refusal if they do not fit at all, or not before those in use are idle.
        """
        if needed > limit:
            raise Refusal(
                f"the model {entry.name} needs {needed:,} bytes for its weights, and the server "
                f"may hold {limit:,}: choose another model, or raise --memory",
                status=503,
                code="model_too_large",
                param="model",
            )
        deadline = time.monotonic() + self.patience
        dropped: list[VLM] = []
        try:
            with self._changed:
                while (taken := self._taken()) + needed > limit:
                    if self._closed:
                        raise closed()
                    idle = [other for other in self._entries.values() if _is_idle(other)]
                    if idle:
                        dropped.append(_drop(min(idle, key=lambda other: other.last_use)))
                    elif not self._changed.wait(deadline - time.monotonic()):
                        raise self._no_room(entry, needed, taken)
                entry.held_bytes = needed
        finally:
            for vlm in dropped:  # not under the lock, which the event loop takes too
                vlm.close()

    def _no_room(self, entry: _Entry, needed: int, taken: int) -> Refusal:
        return Refusal(
            f"the model {entry.name} needs {needed:,} bytes for its weights beside the {taken:,} "
            f"of models in use, and the server may hold {self.memory_bytes:,}: try again when they "
            f"are idle",
            status=503,
            code="models_in_use",
            param="model",
            retry_after=10,
        )

    def _taken(self) -> int:
        return sum(other.held_bytes for other in self._entries.values())


def _is_idle(entry: _Entry) -> bool:
    future = entry.loading
    return future is not None and future.done() and not entry.users


def _drop(entry: _Entry) -> VLM:
    """Forget a model, which is still to be closed."""
    assert entry.loading is not None
    vlm = entry.loading.result()
    entry.loading, entry.held_bytes = None, 0
    return vlm


class Use:
    """See `ModelStore.use`."""

    def __init__(self, store: ModelStore, name: str) -> None:
        self.store, self.name = store, name

    def __enter__(self) -> VLM:
        future = self.store.join(self.name)
        try:
            return future.result()
        except BaseException:
            self.store.leave(self.name)
            raise

    def __exit__(self, *_: object) -> None:
        self.store.leave(self.name)

    async def __aenter__(self) -> VLM:
        future = self.store.join(self.name)
        try:
            # Shielded: others wait for the same model when this request's client has gone.
            return await asyncio.shield(asyncio.wrap_future(future))
        except BaseException:
            self.store.leave(self.name)
            raise

    async def __aexit__(self, *_: object) -> None:
        self.store.leave(self.name)
