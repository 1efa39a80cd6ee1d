"""Many clients at once, a third of which leave: what is left gets its own answer, whole."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import pytest

from benchmarks import serving
from nanomolmo2.generation.vlm import VLM
from nanomolmo2.serve.settings import ServeSettings
from tests.serve.conftest import running


@pytest.mark.parametrize(
    ("clients", "seconds"), [(12, 3.0), pytest.param(64, 120.0, marks=pytest.mark.slow)]
)
def test_every_answer_is_that_given_alone(vlm: VLM, clients: int, seconds: float) -> None:
    bodies = serving.requests(pictures=2)

    async def ask(url: str) -> serving.Load:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            expected = await serving.alone(client, bodies)
        assert len(set(expected)) >= 4
        return await serving.run_load(url, clients, seconds, bodies, expected)

    with running(vlm, ServeSettings(max_running=4)) as server:
        load = asyncio.run(ask(server.url))
        assert load.wrong == []
        assert load.answers >= clients / 2 and load.left > 0
        server.wait_until_idle()


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        (["right", None], []),
        (["right"], ["'right' for 'right'"]),  # it has no end
        (["wrong", None], ["'wrong' for 'right'"]),
    ],
)
def test_what_is_lost_or_mixed_is_noticed(
    lines: list[str | None], wrong: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        text = ""
        for line in lines:
            usage = {"completion_tokens": 1} if line is None else None
            choices = [] if line is None else [{"delta": {"content": line}}]
            text += f"data: {json.dumps({'choices': choices, 'usage': usage})}\n\n"
        return httpx.Response(200, text=text)

    async def once() -> serving.Load:
        load = serving.Load()
        transport = httpx.MockTransport(answer)
        async with httpx.AsyncClient(base_url="http://test", transport=transport) as client:
            until = time.perf_counter() + 0.01
            await serving.one_client(client, [{}], ["right"], load, 0, until)
        return load

    monkeypatch.setattr(serving, "LEAVING", 0.0)
    assert asyncio.run(once()).wrong[:1] == wrong
