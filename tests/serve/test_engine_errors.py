"""What goes wrong inside the model ends one answer, and tells nobody what was in it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from nanomolmo2.generation.sampling import Likeliest, Sampled, Sampler
from nanomolmo2.generation.vlm import VLM
from tests.serve.conftest import SCENE_URL, Running, running

BAD_SEED = 666


def body(question: str, **fields: Any) -> dict[str, Any]:
    shown = {"type": "image_url", "image_url": {"url": SCENE_URL}}
    content = [shown, {"type": "text", "text": question}]
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], **fields}


@pytest.fixture
def failing(server: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    """A server on which requests with a certain seed fail at their third token."""
    taken: dict[int, int] = {}
    pick = Sampler.pick

    def fails(self: Sampler, logits: Likeliest | torch.Tensor) -> Sampled:
        if self.params.seed == BAD_SEED:
            taken[id(self)] = taken.get(id(self), 0) + 1
            if taken[id(self)] == 3:
                raise ValueError("/home/secret.py: cannot reshape 'my secret question'")
        return pick(self, logits)

    monkeypatch.setattr(Sampler, "pick", fails)
    with server.client() as client:
        yield client
    server.wait_until_idle()


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"stream": True}, {"stream": True, "n": 2}])
def test_an_error_of_the_engine_is_that_of_one_request(
    fields: dict[str, Any], failing: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    path, good = "/v1/chat/completions", body("Describe this picture.")
    expected = failing.post(path, json=good).json()["choices"][0]["message"]["content"]
    bad = body("my secret question", temperature=0.5, seed=BAD_SEED, **fields)
    with caplog.at_level(logging.INFO), ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(failing.post, path, json=good) for _ in range(3)]
        found = threads.submit(failing.post, path, json=bad).result()
        answered = [one.result().json()["choices"][0]["message"]["content"] for one in answers]
    assert answered == [expected] * 3
    if "stream" in fields:
        assert found.status_code == 200
        *_, last = (line for line in found.text.splitlines() if line)
        error = json.loads(last.removeprefix("data: "))["error"]
    else:
        assert found.status_code == 500
        error = found.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert "ValueError in nanomolmo2.generation." in caplog.text
    for secret in ("secret", "reshape", "/home", "Traceback"):
        assert secret not in found.text + caplog.text


def test_damaged_weights_are_the_servers_fault_until_they_are_not() -> None:
    with VLM("tiny", device="cpu") as vlm, running(vlm) as server, server.client() as http:
        asked = body("Point to the snail.")
        before = http.post("/v1/chat/completions", json=asked).json()["choices"]
        weight = vlm.model.llm.norm.weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(float("nan"))
            broken = http.post("/v1/chat/completions", json=asked)
            weight.copy_(kept)
        assert broken.status_code == 500
        assert broken.json()["error"]["type"] == "server_error"
        assert http.post("/v1/chat/completions", json=asked).json()["choices"] == before
        server.wait_until_idle()


def test_what_a_request_leaves_nothing_of_is_its_own_fault(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json=body("a", logit_bias={"999999": 1}))
    assert answer.status_code == 400
    assert "logit_bias names token 999999" in answer.json()["error"]["message"]
