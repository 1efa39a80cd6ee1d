"""Models by name, with fakes in place of them."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from nanomolmo2.serve.refusal import Refusal
from nanomolmo2.serve.store import ModelStore


class Fake:
    """In place of a VLM."""

    def __init__(self, name: str) -> None:
        self.name, self.closed = name, False

    def close(self) -> None:
        self.closed = True


class Loader:
    """Counts what it loads; waits for `go` before it has done so."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.made: list[Fake] = []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, name: str) -> Callable[[], Any]:
        def load() -> Fake:
            self.loaded.append(name)
            assert self.go.wait(60)
            self.made.append(Fake(name))
            return self.made[-1]

        return load


@pytest.fixture
def loader() -> Loader:
    return Loader()


def store_of(
    loader: Loader, sizes: dict[str, int], memory: int | None = None, patience: float = 60.0
) -> ModelStore:
    return ModelStore(
        {name: loader(name) for name in sizes},
        weight_bytes={name: lambda size=size: size for name, size in sizes.items()},
        memory_bytes=memory,
        patience=patience,
    )


def used(store: ModelStore, name: str | None = None) -> Any:
    with store.use(name) as vlm:
        return vlm


def test_a_model_is_loaded_when_it_is_first_used_and_stays(loader: Loader) -> None:
    store = store_of(loader, {"a": 1, "b": 1})
    assert store.names() == ["a", "b"]
    assert store.default == "a"
    assert loader.loaded == []
    assert store.loaded() == {}
    first = used(store, "b")
    assert used(store, "b") is first
    assert loader.loaded == ["b"]
    assert store.loaded() == {"b": first}
    assert used(store).name == "a"


def test_a_name_that_is_not_there_is_refused_with_those_that_are(loader: Loader) -> None:
    store = store_of(loader, {"tiny": 1, "large": 1})
    with pytest.raises(
        Refusal, match="there is no model 'gpt-4' here: choose one of tiny, large"
    ) as r:
        used(store, "gpt-4")
    assert (r.value.status, r.value.code, r.value.param) == (404, "model_not_found", "model")
    with pytest.raises(Refusal):
        used(store, "")


@pytest.mark.parametrize("by_tasks", [True, False])
def test_many_who_ask_at_once_load_it_once(by_tasks: bool, loader: Loader) -> None:
    store = store_of(loader, {"a": 1})
    loader.go.clear()
    found: list[Any] = []

    async def ask() -> None:
        async with store.use("a") as vlm:
            found.append(vlm)

    async def ask_all() -> None:
        tasks = [asyncio.create_task(ask()) for _ in range(50)]
        await asyncio.sleep(0)
        assert found == []
        loader.go.set()
        await asyncio.gather(*tasks)

    if by_tasks:
        asyncio.run(ask_all())
    else:
        threads = [
            threading.Thread(target=lambda: found.append(used(store, "a"))) for _ in range(50)
        ]
        for thread in threads:
            thread.start()
        loader.go.set()
        for thread in threads:
            thread.join(10)
    assert loader.loaded == ["a"]
    assert found == loader.made * 50


def test_the_loop_goes_on_while_a_model_is_loaded(loader: Loader) -> None:
    """And who leaves meanwhile takes nothing from those who wait for the same model."""
    store = store_of(loader, {"a": 1}, memory=1)
    loader.go.clear()

    async def ask() -> Any:
        async with store.use("a") as vlm:
            return vlm

    async def run() -> None:
        leaves, stays = asyncio.create_task(ask()), asyncio.create_task(ask())
        await asyncio.sleep(0)
        leaves.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaves
        assert not stays.done()
        loader.go.set()
        assert await stays is loader.made[0]

    asyncio.run(run())
    assert loader.loaded == ["a"]
    assert store._entries["a"].users == 0


def test_the_least_recently_used_idle_models_go(loader: Loader) -> None:
    store = store_of(loader, {"a": 40, "b": 40, "c": 50, "d": 90}, memory=100)
    a, b = used(store, "a"), used(store, "b")
    assert used(store, "a") is a  # b is now the one that was used longest ago
    c = used(store, "c")
    assert (a.closed, b.closed, c.closed) == (False, True, False)
    assert set(store.loaded()) == {"a", "c"}
    d = used(store, "d")  # needs the room of both
    assert (a.closed, c.closed, d.closed) == (True, True, False)
    assert used(store, "a") is not a
    assert loader.loaded == ["a", "b", "c", "d", "a"]


def test_a_model_in_use_stays_and_another_waits_for_it(loader: Loader) -> None:
    store = store_of(loader, {"a": 60, "b": 60}, memory=100)
    other: list[Any] = []
    thread = threading.Thread(target=lambda: other.append(used(store, "b")))
    with store.use("a") as a, store.use("a"):
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        assert not a.closed
        assert loader.loaded == ["a"]
    thread.join(10)
    assert other[0].name == "b"
    assert a.closed


def test_who_waits_too_long_is_refused(loader: Loader) -> None:
    store = store_of(loader, {"a": 60, "b": 70}, memory=100, patience=0.05)
    with store.use("a"), pytest.raises(Refusal) as r:
        used(store, "b")
    assert "b needs 70 bytes for its weights beside the 60 of models in use" in r.value.message
    assert "may hold 100" in r.value.message
    assert (r.value.status, r.value.retry_after) == (503, 10)
    assert used(store, "b").name == "b"  # later


def test_one_that_does_not_fit_alone_is_refused_with_the_numbers(loader: Loader) -> None:
    store = store_of(loader, {"a": 60, "b": 1_000_000}, memory=100)
    a = used(store, "a")
    with pytest.raises(Refusal, match=r"b needs 1,000,000 bytes .* may hold 100") as r:
        used(store, "b")
    assert (r.value.status, r.value.code) == (503, "model_too_large")
    assert loader.loaded == ["a"]  # it was not even tried
    assert not a.closed


def test_without_a_limit_nothing_is_measured(loader: Loader) -> None:
    store = ModelStore({"a": loader("a")}, weight_bytes={"a": lambda: pytest.fail("measured")})
    assert used(store).name == "a"


def test_a_load_that_fails_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    """Neither the answer nor the log tells the text of the error, which names folders."""
    tries = []

    def load() -> Any:
        tries.append(1)
        if len(tries) == 1:
            raise OSError("/home/somebody/secret.safetensors is cut off")
        return Fake("a")

    store = ModelStore({"a": load}, weight_bytes={"a": lambda: 80}, memory_bytes=100)
    with caplog.at_level(logging.INFO), pytest.raises(Refusal) as r:
        used(store)
    assert (r.value.status, r.value.code) == (503, "model_not_loaded")
    assert isinstance(r.value.__cause__, OSError)
    assert "OSError" in caplog.text
    assert "secret" not in r.value.message + caplog.text
    assert used(store).name == "a"  # and the room that it had taken is free


def test_what_is_dropped_is_freed() -> None:
    """By itself, not at some later time when garbage is looked for."""
    from nanomolmo2.generation.vlm import VLM

    store = ModelStore(
        {"a": lambda: VLM("tiny"), "b": lambda: Fake("b")},  # type: ignore[dict-item, return-value]
        weight_bytes={"a": lambda: 6, "b": lambda: 6},
        memory_bytes=10,
    )
    gc.disable()
    try:
        with store.use("a") as vlm:
            vlm.ask(None, "Hello?", max_new_tokens=2)
            weight = weakref.ref(next(vlm.model.llm.parameters()))
        del vlm
        assert weight() is not None
        used(store, "b")
        assert weight() is None
    finally:
        gc.enable()


def test_closing_ends_all(loader: Loader) -> None:
    store = store_of(loader, {"a": 60, "b": 60}, memory=100, patience=60)
    refused: list[Refusal] = []

    def wait_for_room() -> None:
        try:
            used(store, "b")
        except Refusal as refusal:
            refused.append(refusal)

    thread = threading.Thread(target=wait_for_room)
    with store.use("a") as a:
        thread.start()
        thread.join(0.1)
        store.close()
        thread.join(10)
    assert a.closed
    assert [refusal.code for refusal in refused] == ["shutting_down"]
    with pytest.raises(Refusal, match="shutting down"):
        used(store, "a")
    assert store.loaded() == {}


def test_a_store_has_a_model() -> None:
    with pytest.raises(ValueError, match="at least one model"):
        ModelStore({})
