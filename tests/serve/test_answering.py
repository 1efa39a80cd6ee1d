"""Work in threads for clients that leave, and what waiting answers keep in memory."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest
from PIL import Image

from nanomolmo2.generation.answer import Answer
from nanomolmo2.generation.request import Request
from nanomolmo2.generation.scheduler import Ticket, Way
from nanomolmo2.generation.vlm import VLM
from nanomolmo2.serve.answering import Server
from nanomolmo2.serve.schemas import Sampling
from nanomolmo2.serve.settings import ServeSettings
from nanomolmo2.serve.store import ModelStore
from tests.serve.conftest import SCENE


@pytest.fixture
def state(vlm: VLM) -> Server:
    return Server(ModelStore({"tiny": lambda: vlm}), ServeSettings())


class _Picture:
    """Something large."""


def test_who_leaves_waits_for_the_thread_that_works_for_him(state: Server) -> None:
    """Else there were more work than the queue has places, from clients that ask and leave."""
    begun, go = threading.Event(), threading.Event()
    late: list[str] = []

    def work() -> str:
        begun.set()
        assert go.wait(10)
        return "done"

    async def run() -> None:
        task = asyncio.create_task(state.in_thread(work, late=late.append))
        await asyncio.to_thread(begun.wait, 10)
        for _ in range(2):  # the client left, and then the server ends
            task.cancel()
            done, _ = await asyncio.wait({task}, timeout=0.1)
            assert not done and not late
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert late == ["done"]

    asyncio.run(run())


def test_an_error_of_a_thread_for_which_nobody_waits_is_nobodys(state: Server) -> None:
    begun, go = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert go.wait(10)
        raise ValueError("a picture that is none")

    async def run() -> None:
        task = asyncio.create_task(state.in_thread(work, late=lambda _: pytest.fail("no result")))
        await asyncio.to_thread(begun.wait, 10)
        task.cancel()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def test_work_that_has_not_begun_never_does_and_keeps_nothing(state: Server) -> None:
    go = threading.Event()
    done: list[str] = []

    async def run() -> None:
        busy = [
            asyncio.create_task(state.in_thread(lambda: go.wait(10)))
            for _ in range(state._threads._max_workers)
        ]
        await asyncio.sleep(0)
        picture = _Picture()
        kept = weakref.ref(picture)

        def work(picture: _Picture = picture) -> None:
            done.append(f"{picture}")

        task = asyncio.create_task(state.in_thread(work))
        await asyncio.sleep(0.01)
        del picture, work
        assert kept() is not None
        task.cancel()
        await asyncio.wait({task})
        del task
        gc.collect()
        assert kept() is None
        go.set()
        await asyncio.gather(*busy)

    asyncio.run(run())
    state._threads.shutdown()
    assert done == []


def test_an_answer_that_waits_keeps_no_picture(state: Server, vlm: VLM) -> None:
    expected = vlm.ask(SCENE, "Point to the snail.")
    picture = Image.open(SCENE).convert("RGB")
    kept = weakref.ref(picture)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "Point to the snail."}]
    stream = state.stream(vlm, [{"role": "user", "content": content}], Sampling(), longest=None)
    del picture, content
    gc.collect()
    assert kept() is None
    assert stream.encoded.pixel_values is None
    *_, answer = stream
    assert isinstance(answer, Answer)
    assert (answer.text, answer.points) == (expected.text, expected.points)
    assert answer.image_sizes == ((192, 192),) and answer.show is None


@pytest.mark.parametrize("batch_invariant", [True, False])
def test_answers_to_the_last_bit_where_that_is_asked_for(
    batch_invariant: bool, vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: list[Way | None] = []
    submit = vlm.scheduler.submit

    def watched(request: Request, way: Way | None = None) -> Ticket:
        ways.append(way)
        return submit(request, way)

    monkeypatch.setattr(vlm.scheduler, "submit", watched)
    settings = ServeSettings(batch_invariant=batch_invariant)
    state = Server(ModelStore({"tiny": lambda: vlm}), settings)
    messages = [{"role": "user", "content": "What is this?"}]
    state.stream(vlm, messages, Sampling(), longest=2).close()
    assert [way and way.batch_invariant for way in ways] == [batch_invariant]
