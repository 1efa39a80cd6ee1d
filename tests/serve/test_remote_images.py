"""Pictures behind addresses: their time has an end, and they hold nobody else up."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from nanomolmo2 import remote
from nanomolmo2.serve import reading
from nanomolmo2.serve.answering import Server
from nanomolmo2.serve.reading import conversation, is_remote
from nanomolmo2.serve.refusal import Refusal
from nanomolmo2.serve.schemas import ChatRequest, Message, ObjectRequest, QueryRequest
from nanomolmo2.serve.settings import ServeSettings
from nanomolmo2.serve.store import ModelStore
from tests.serve.conftest import SCENE, picture_sizes

ADDRESS = "http://pictures.test/a.png"
ALLOWED = ServeSettings(allow_remote_images=True, max_body_bytes=1_000_000)
QUESTION = [Message(role="user", content="What is it?")]


def chat(*addresses: str) -> ChatRequest:
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in addresses]
    content = [*parts, {"type": "text", "text": "What is it?"}]
    return ChatRequest(model="tiny", messages=[Message(role="user", content=content)])


def test_a_picture_is_fetched_where_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []

    def fetch(url: str, *, max_bytes: int, timeout: float) -> bytes:
        assert 0 < timeout <= reading.FETCH_SECONDS
        calls.append((url, max_bytes))
        return SCENE.read_bytes()

    monkeypatch.setattr(remote, "fetch", fetch)
    messages = conversation(QUESTION, ALLOWED, images=[ADDRESS])
    assert picture_sizes(messages) == [(192, 192)]
    assert calls == [(ADDRESS, 1_000_000)]
    with pytest.raises(Refusal, match="--allow-remote-images") as refused:
        conversation(QUESTION, ServeSettings(), images=[ADDRESS])
    assert refused.value.code == "remote_images_not_allowed"
    assert len(calls) == 1


def test_all_pictures_of_a_request_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(reading.time, "monotonic", lambda: now[0])
    timeouts: list[float] = []

    def fetch(url: str, *, max_bytes: int, timeout: float) -> bytes:
        timeouts.append(timeout)
        now[0] += 8
        return SCENE.read_bytes()

    monkeypatch.setattr(remote, "fetch", fetch)
    with pytest.raises(Refusal, match="longer than 20 seconds together") as refused:
        conversation(QUESTION, ALLOWED, images=[ADDRESS] * 5)
    assert timeouts == [20, 12, 4]
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (chat("data:image/png;base64,AAAA", ADDRESS), True),
        (chat("HTTPS://pictures.test/"), True),
        (chat("data:image/png;base64,http:"), False),
        (chat(), False),
        (ObjectRequest(image=ADDRESS, object="cups"), True),
        (ObjectRequest(images=["AAAA", ADDRESS], object="cups"), True),
        (ObjectRequest(images=["AAAA"], object="http://x"), False),
        (QueryRequest(video=ADDRESS, question="What is it?"), True),
        (QueryRequest(messages=chat(ADDRESS).messages), True),
        (QueryRequest(question=ADDRESS), False),
    ],
)
def test_requests_that_show_what_lies_elsewhere(asked: Any, expected: bool) -> None:
    assert is_remote(asked) is expected


def test_who_waits_for_other_computers_holds_nobody_up() -> None:
    server = Server(ModelStore({"tiny": lambda: None}), ALLOWED)  # type: ignore[dict-item, return-value]
    go = threading.Event()

    async def run() -> None:
        waiting = [
            asyncio.ensure_future(server.in_thread(lambda: go.wait(60), chat(ADDRESS)))
            for _ in range(40)
        ]
        try:
            async with asyncio.timeout(50):
                assert await server.in_thread(lambda: "answer", chat()) == "answer"
            assert not any(task.done() for task in waiting)
        finally:
            go.set()
        assert all(await asyncio.gather(*waiting))

    asyncio.run(run())
