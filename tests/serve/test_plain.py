"""The plain routes: points in pixels and shares, forms, server-sent events, where it looked."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx
import pytest

from nanomolmo2.generation.vlm import VLM
from nanomolmo2.processor.image import load_image
from nanomolmo2.serve import reading
from tests.generation.gate import Gate
from tests.serve.conftest import SCENE, SCENE_URL, Running, running

# `tiny` on assets/demo/scene.png, which has 192 x 192 pixels: thousandths -> pixels and shares.
SUNFLOWERS = '<points coords="1 1 300 700 2 500 700 3 800 400">sunflower</points>'
PLACES = [(57.6, 134.4, 0.3, 0.7), (96.0, 134.4, 0.5, 0.7), (153.6, 76.8, 0.8, 0.4)]


def places(answer: dict[str, Any]) -> list[tuple[float, ...]]:
    keys = ("x", "y", "x_share", "y_share")
    return [tuple(point[key] for key in keys) for point in answer["points"]]


def events(text: str) -> list[tuple[str, Any]]:
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    return [
        (name.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
        for name, data in blocks
    ]


def test_points_in_pixels_and_shares(http: httpx.Client) -> None:
    answer = http.post("/v1/point", json={"image": SCENE_URL, "object": "sunflower"}).json()
    assert answer["text"] == SUNFLOWERS
    assert places(answer) == PLACES
    assert [(p["id"], p["label"], p["image"]) for p in answer["points"]] == [
        (number, "sunflower", 1) for number in (1, 2, 3)
    ]
    assert (answer["count"], answer["model"], answer["finish_reason"]) == (3, "tiny", "stop")
    assert answer["images"] == [{"width": 192, "height": 192}]
    assert answer["usage"]["completion_tokens"] == answer["output_tokens"] == 26


OBJECT_NAMES = ["object", "objects", "noun", "label", "target", "name", "query", "prompt"]
OBJECT_NAMES += ["question", "text"]


@pytest.mark.parametrize("name", OBJECT_NAMES)
def test_names_of_the_object(http: httpx.Client, name: str) -> None:
    answer = http.post("/v1/count", json={"images": [SCENE_URL], name: "sunflowers"}).json()
    assert answer["count"] == 3


@pytest.mark.parametrize("name", ["question", "prompt", "query", "text"])
def test_names_of_the_question(http: httpx.Client, name: str) -> None:
    asked = {name: "Point to the sunflower."}
    answer = http.post("/v1/query", json={"image": SCENE_URL, **asked}).json()
    assert places(answer) == PLACES
    file = {"file": ("scene.png", SCENE.read_bytes(), "image/png")}
    assert places(http.post("/v1/query", files=file, data=asked).json()) == PLACES


@pytest.mark.parametrize("name", ["max_tokens", "max_new_tokens", "max_completion_tokens"])
def test_names_of_the_longest_answer(http: httpx.Client, name: str) -> None:
    answer = http.post("/v1/caption", json={"image": SCENE_URL, name: 3}).json()
    assert (answer["output_tokens"], answer["finish_reason"]) == (3, "length")


def test_forms_are_the_same_as_json(http: httpx.Client, vlm: VLM) -> None:
    file = {"image": ("scene.png", SCENE.read_bytes(), "image/png")}
    answer = http.post("/v1/point", files=file, data={"object": "sunflower"}).json()
    assert places(answer) == PLACES
    caption = http.post("/v1/caption", files={"images": SCENE.read_bytes()}).json()
    assert caption["text"] == vlm.caption(SCENE).text
    fields = {"question": "Describe this picture.", "max_tokens": "3", "temperature": "0"}
    short = http.post("/v1/query", files=file, data=fields).json()
    assert (short["output_tokens"], short["finish_reason"]) == (3, "length")
    messages = json.dumps([{"role": "user", "content": "Describe this picture."}])
    whole = http.post("/v1/query", files=file, data={"messages": messages}).json()
    assert whole["text"] == caption["text"]


def test_other_ways_to_send_a_picture(http: httpx.Client) -> None:
    bare = SCENE_URL.partition(",")[2]
    for shown in (
        {"image": bare},
        {"image_url": SCENE_URL},
        {"image_url": {"url": SCENE_URL}},
        {"images": [{"url": SCENE_URL}]},
        {"images": SCENE_URL},
        {"image": [SCENE_URL]},
        {"image_base64": bare},
        {"images": [{"type": "image_url", "image_url": {"url": SCENE_URL}}]},
    ):
        answer = http.post("/v1/point", json={**shown, "object": "sunflower"}).json()
        assert places(answer) == PLACES
    part = {"type": "image", "image": SCENE_URL}  # as transformers and `VLM.ask` have it
    content = [part, {"type": "text", "text": "Point to the sunflower."}]
    messages = [{"role": "user", "content": content}]
    assert places(http.post("/v1/query", json={"messages": messages}).json()) == PLACES


def test_pictures_come_before_the_question(http: httpx.Client, vlm: VLM) -> None:
    asked = {"images": [SCENE_URL, SCENE_URL], "question": "Point to the snail."}
    answer = http.post("/v1/query", json=asked).json()
    assert answer["text"] == vlm.ask([SCENE, SCENE], "Point to the snail.").text
    messages = [
        {"role": "user", "content": "Point to the snail."},
        {"role": "assistant", "content": '<points coords="1 1 500 350">snail</points>'},
        {"role": "user", "content": "How many sunflowers are there?"},
    ]
    later = http.post("/v1/query", json={"images": [SCENE_URL], "messages": messages}).json()
    same = vlm.ask([SCENE], messages)  # type: ignore[arg-type]
    assert later["text"] == same.text and later["count"] == 3


def test_a_stream_has_texts_points_and_the_answer(http: httpx.Client) -> None:
    asked = {"image": SCENE_URL, "object": "sunflower"}
    whole = http.post("/v1/point", json=asked).json()
    response = http.post("/v1/point", json={**asked, "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    found = events(response.text)
    assert "".join(data["text"] for name, data in found if name == "text") == SUNFLOWERS
    points = [data for name, data in found if name == "point"]
    assert places({"points": points}) == PLACES
    # The first point is there before the third is written.
    names = [name for name, _ in found]
    assert names.index("point") < len(names) - 10 and names[-1] == "answer"
    answer = found[-1][1]
    assert {**answer, "timings": 0, "reused_tokens": 0, "usage": 0} == {
        **whole,
        "timings": 0,
        "reused_tokens": 0,
        "usage": 0,
    }


def test_a_video_has_times(http: httpx.Client, clip_url: str) -> None:
    answer = http.post("/v1/query", json={"question": "What is seen?", "video": clip_url}).json()
    assert (answer["video"]["width"], answer["video"]["height"]) == (64, 48)
    assert answer["video"]["frame_times"][:3] == [0.0, 0.5, 1.0]
    assert answer["images"] == []


def test_where_it_looked(http: httpx.Client) -> None:
    asked = {"image": SCENE_URL, "question": "Point to the snail.", "answer": "<points coords="}
    found = http.post("/v1/attention", json=asked).json()
    (image,) = found["images"]
    assert (image["rows"], image["cols"]) == (6, 6)
    assert sum(map(sum, image["weights"])) == pytest.approx(1)
    assert found["token"] == len(found["tokens"]) - 1
    assert "".join(found["tokens"]) == "<points coords="
    assert found["note"].startswith("Weak evidence")


def test_a_client_that_leaves_frees_its_row(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer stands still until the server has heard of it."""
    scheduler, gate, stream = server.vlm.scheduler, Gate(free=3), server.vlm.stream
    before = scheduler.stats.requests.get("cancelled", 0)
    monkeypatch.setattr(
        server.vlm, "stream", lambda *shown, **options: stream(*shown, constraint=gate, **options)
    )
    question = {"image": SCENE_URL, "question": "Point to the flowers.", "stream": True}
    with server.client() as client, client.stream("POST", "/v1/query", json=question) as response:
        for line in response.iter_lines():
            if line.startswith("event: text"):
                break
    deadline = time.monotonic() + 50
    while not (scheduler._leaving or scheduler.stats.requests.get("cancelled", 0) > before):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    gate.open()
    server.wait_until_idle()
    assert scheduler.stats.requests["cancelled"] == before + 1


def test_pictures_keep_no_other_answer_waiting(
    server: Running, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are decoded and encoded in threads, while the event loop goes on."""
    started, go_on = threading.Event(), threading.Event()
    names = []

    def slow_image(*arguments: Any, **keywords: Any) -> Any:
        names.append(threading.current_thread().name)
        started.set()
        assert go_on.wait(60)
        return load_image(*arguments, **keywords)

    encode = server.vlm.processor.encode

    def noted_encode(*arguments: Any, **keywords: Any) -> Any:
        names.append(threading.current_thread().name)
        return encode(*arguments, **keywords)

    monkeypatch.setattr(reading, "load_image", slow_image)
    monkeypatch.setattr(server.vlm.processor, "encode", noted_encode)
    found: list[httpx.Response] = []

    def ask() -> None:
        found.append(httpx.post(f"{server.url}/v1/caption", json={"image": SCENE_URL}, timeout=60))

    asking = threading.Thread(target=ask)
    asking.start()
    assert started.wait(60)
    assert http.get("/health").status_code == 200  # answered meanwhile
    go_on.set()
    asking.join(60)
    assert found[0].status_code == 200
    assert len(names) == 2 and all(name.startswith("nanomolmo2") for name in names)


def test_a_model_that_is_closed_says_so() -> None:
    with VLM("tiny", device="cpu") as vlm, running(vlm) as server, server.client() as client:
        asked = {"image": SCENE_URL, "question": "Point to the flowers.", "stream": True}
        with client.stream("POST", "/v1/query", json=asked) as response:
            lines = response.iter_lines()
            for line in lines:
                if line.startswith("event: text"):
                    break
            vlm.close()
            rest = "\n".join(lines)
    assert '"code": "model_closed"' in rest.partition("event: error")[2]


def test_health_and_examples(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok", "models": ["tiny"]}
    for route in ("/health", "/"):
        head = http.head(route)
        assert (head.status_code, head.content) == (200, b"")
    examples = http.get("/v1/examples").json()["data"]
    assert examples
    for example in examples:
        assert example["questions"] and http.get(example["image"]).status_code == 200
    text = http.get("/metrics").text
    assert 'nanomolmo2_output_tokens_total{model="tiny"}' in text
