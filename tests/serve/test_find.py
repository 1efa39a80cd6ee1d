"""`POST /v1/find`: what reaches `VLM.find`, what comes of its answer, and what is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from PIL import Image

from nanomolmo2.generation.vlm import VLM
from nanomolmo2.serve.finding import finds
from nanomolmo2.serve.replies import PlainAnswer
from nanomolmo2.serve.settings import ServeSettings
from tests.find_model import find_vlm
from tests.serve.conftest import SCENE, SCENE_URL, Running, data_url, file_url, running
from tests.serve.finder import Finder
from tests.serve.test_bad_input import bomb, told

# In a picture of 192 x 192 pixels.
THINGS = [(48.0, 24.0, 0.97), (96.0, 24.0, 0.4), (144.0, 96.0, 0.75)]


@pytest.fixture
def finder(server: Running, monkeypatch: pytest.MonkeyPatch) -> Finder:
    finder = Finder(THINGS)
    monkeypatch.setattr(server.vlm, "find", finder.find, raising=False)
    return finder


def test_points_with_their_confidence(http: httpx.Client, finder: Finder) -> None:
    answer = http.post("/v1/find", json={"image": SCENE_URL, "like": [[48, 24]]}).json()
    assert answer["count"] == 2 and answer["problems"] == []
    keys = ("id", "x", "y", "x_share", "y_share", "confidence", "image", "size")
    assert [tuple(point[key] for key in keys) for point in answer["points"]] == [
        (1, 48.0, 24.0, 0.25, 0.125, 0.97, 1, 20.5),
        (2, 144.0, 96.0, 0.75, 0.5, 0.75, 1, 20.5),
    ]
    assert answer["images"] == [{"width": 192, "height": 192}]
    assert (answer["model"], answer["finish_reason"]) == ("tiny", "stop")
    (call,) = finder.calls
    assert call["image"].size == (192, 192)
    assert {**call, "image": None} == {
        "image": None,
        "reference": None,
        "like": [(48.0, 24.0)],
        "unlike": [],
        "max_crops": None,
        "min_confidence": 0.5,
    }


def test_everything_reaches_the_model(http: httpx.Client, finder: Finder, clip_url: str) -> None:
    small = clip_url.replace("video/gif", "image/gif")  # 64 x 48
    body = {
        "image": SCENE_URL,
        "reference": {"url": small},
        "like": [[10, 20.5], [3, 4, 1], {"x": 5, "y": 6, "image": 2}],
        "unlike": [{"x": 7, "y": 8}],
        "min_confidence": 0.05,
        "model": "tiny",
    }
    answer = http.post("/v1/find", json=body).json()
    (call,) = finder.calls
    assert (call["image"].size, call["reference"].size) == ((192, 192), (64, 48))
    assert call["like"] == [(10.0, 20.5), (3.0, 4.0, 1), (5.0, 6.0, 2)]
    assert call["unlike"] == [(7.0, 8.0)] and call["min_confidence"] == 0.05
    assert answer["count"] == 3
    assert answer["images"] == [{"width": 64, "height": 48}, {"width": 192, "height": 192}]
    # Shares are of the picture that was asked about, which is the second.
    assert [(p["image"], p["x_share"]) for p in answer["points"]] == [
        (2, 0.25),
        (2, 0.5),
        (2, 0.75),
    ]


def test_a_form_is_the_same(http: httpx.Client, finder: Finder) -> None:
    files = {"image": SCENE.read_bytes(), "reference": SCENE.read_bytes()}
    fields = {"like": "[[48, 24]]", "unlike": json.dumps([[1, 2, 2]]), "min_confidence": "0.9"}
    answer = http.post("/v1/find", files=files, data=fields).json()
    assert answer["count"] == 1
    (call,) = finder.calls
    assert call["reference"].size == (192, 192)
    assert (call["like"], call["unlike"]) == ([(48.0, 24.0)], [(1.0, 2.0, 2)])
    assert call["min_confidence"] == 0.9
    alone = http.post("/v1/find", files={"file": SCENE.read_bytes()}, data={"like": "[[48, 24]]"})
    assert alone.json()["count"] == 2 and finder.calls[1]["reference"] is None


def test_other_ways_to_send_the_picture(http: httpx.Client, finder: Finder) -> None:
    bare = SCENE_URL.partition(",")[2]
    for shown in (
        {"image": bare},
        {"image": [SCENE_URL]},
        {"images": [SCENE_URL]},
        {"image_url": {"url": SCENE_URL}},
        {"image_base64": bare},
    ):
        answer = http.post("/v1/find", json={**shown, "like": [[48, 24]]})
        assert answer.json()["count"] == 2


def test_what_is_strange_is_said_with_the_answer(http: httpx.Client, finder: Finder) -> None:
    finder.problems = ("nothing seems to be there: confidence 0.03 at (48, 24)",)
    answer = http.post("/v1/find", json={"image": SCENE_URL, "like": [[48, 24]]}).json()
    assert answer["problems"] == list(finder.problems)


PLACE = {"like": [[48, 24]]}
SHOWN = {"image": SCENE_URL}


@pytest.mark.parametrize(
    ("body", "says", "param"),
    [
        (PLACE, "image is missing", "image"),
        (SHOWN, "like is missing", "like"),
        ({**SHOWN, "like": []}, "an empty list", "like"),
        ({**SHOWN, "like": [48, 24]}, "a list or an object, found 48", "like[0]"),
        ({**SHOWN, "like": [[48]]}, "at least 2 items", "like[0]"),
        ({**SHOWN, "like": [["a", 2]]}, "a number, found 'a'", "like[0][0]"),
        ({**SHOWN, "like": [[1, 2, 3]]}, "the number of its picture: 1 or 2", "like[0]"),
        ({**SHOWN, **PLACE, "unlike": [{"x": 1}]}, "is missing", "unlike[0].y"),
        ({**SHOWN, **PLACE, "min_confidence": 1.5}, "at most 1, found 1.5", "min_confidence"),
        ({**SHOWN, **PLACE, "max_crops": 0}, "at least 1, found 0", "max_crops"),
        ({"image": data_url(b"abc"), **PLACE}, "expected a picture", "image"),
        ({"image": bomb(), **PLACE}, "found 900000000 pixels", "image"),
        ({**SHOWN, "reference": bomb(), **PLACE}, "found 900000000 pixels", "reference"),
        ({**SHOWN, "reference": "/etc/passwd", **PLACE}, "neither a data URL", "reference"),
        ({"image": "http://127.0.0.1/x.png", **PLACE}, "--allow-remote", "image"),
        ({"images": [SCENE_URL, SCENE_URL], **PLACE}, "2 pictures, expected one", "image"),
    ],
)
def test_what_is_refused(
    http: httpx.Client, finder: Finder, body: dict[str, Any], says: str, param: str
) -> None:
    error = told(http.post("/v1/find", json=body), 400)
    assert says in error["message"] and error["param"] == param
    assert not finder.calls


def test_a_model_that_there_is_not(http: httpx.Client) -> None:
    asked = {**SHOWN, **PLACE, "model": "huge"}
    assert "choose one of tiny" in told(http.post("/v1/find", json=asked), 404)["message"]


def test_a_video_is_no_picture(http: httpx.Client) -> None:
    files = {"video": ("a.mp4", b"abc", "video/mp4")}
    error = told(http.post("/v1/find", files=files, data={"like": "[[1, 2]]"}), 400)
    assert "a video was sent, expected a picture" in error["message"]


@pytest.mark.parametrize(
    ("places", "param"),
    [
        ({"like": [[500, 24]]}, "like"),
        ({"like": [[48, 24], [48, 24, 2]]}, "like"),  # of a picture that is not there
        ({"like": [[48, 24]], "unlike": [[1, -1]]}, "unlike"),
        ({"like": [[48, 24]]}, None),  # nothing of its places
    ],
)
def test_the_models_sentence_names_the_field(
    http: httpx.Client, finder: Finder, places: dict[str, Any], param: str | None
) -> None:
    finder.error = ValueError("the example at (500, 24) lies outside\nof its picture")
    error = told(http.post("/v1/find", json={**SHOWN, **places}), 400)
    assert error["message"] == "the example at (500, 24) lies outside of its picture"
    assert (error["param"], error["code"]) == (param, "invalid_value")


@pytest.fixture
def narrow(vlm: VLM) -> Iterator[httpx.Client]:
    settings = ServeSettings(max_images=1, max_pixels=192 * 192, max_running=1, max_waiting=0)
    with running(vlm, settings) as found, found.client() as client:
        yield client


def test_limits_are_those_of_the_settings(narrow: httpx.Client, finder: Finder) -> None:
    error = told(narrow.post("/v1/find", json={**SHOWN, **PLACE, "reference": SCENE_URL}), 400)
    assert "2 pictures, expected at most 1" in error["message"] and error["param"] == "reference"
    assert narrow.post("/v1/find", json={**SHOWN, **PLACE}).json()["count"] == 2


def test_others_are_answered_beside_a_pass(
    server: Running, http: httpx.Client, finder: Finder, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go_on = threading.Event(), threading.Event()
    names = []

    def slow(*arguments: Any, **keywords: Any) -> Any:
        names.append(threading.current_thread().name)
        started.set()
        assert go_on.wait(60)
        return finder.find(*arguments, **keywords)

    monkeypatch.setattr(server.vlm, "find", slow)
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{server.url}/v1/find", json={**SHOWN, **PLACE}, timeout=60))

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for one in asking:
        one.start()
    assert started.wait(60)
    caption = http.post("/v1/caption", json={**SHOWN, "max_tokens": 1})
    assert caption.status_code == 200
    assert len(names) == 1 and names[0].startswith("nanomolmo2-pass")  # the second one waits
    go_on.set()
    for one in asking:
        one.join(60)
    assert [answer.json()["count"] for answer in answers] == [2, 2]


def test_a_net_is_asked(tmp_path: Path) -> None:
    """One with random weights: whatever it finds is the same as without a server."""
    Image.linear_gradient("L").convert("RGB").resize((300, 200)).save(tmp_path / "a.png")
    shown = file_url(tmp_path / "a.png")
    options = {"unlike": [(200, 150, 2)], "min_confidence": 0.05, "max_crops": 2}
    body = {"image": shown, "reference": SCENE_URL, "like": [[48, 24]], **options}
    with find_vlm() as vlm, running(vlm) as server, server.client() as client:
        direct = vlm.find(tmp_path / "a.png", [(48, 24)], reference=SCENE, **options)
        answer = client.post("/v1/find", json={**body, "unlike": [[200, 150, 2]]}).json()
        abilities = client.get("/v1/models/tiny").json()["abilities"]
        outside = told(client.post("/v1/find", json={**body, "unlike": [[48, 500]]}), 400)
    assert PlainAnswer.model_validate(answer).count == direct.count == len(answer["points"])
    assert (answer["text"], answer["problems"]) == (direct.text, list(direct.problems))
    assert [(p["x"], p["size"]) for p in answer["points"]] == [(p.x, p.size) for p in direct.points]
    assert abilities["find"] is True and abilities["max_crops"] == 4
    assert abilities["system"] is False  # it knows scenes alone
    assert "(48, 500)" in outside["message"] and outside["param"] == "unlike"


def test_a_second_click_does_not_see_the_picture_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither that of the examples nor the other one, and it waits for nobody's encoder."""
    Image.new("RGB", (64, 48), "green").save(tmp_path / "a.png")
    with find_vlm() as vlm, running(vlm) as server, server.client() as client:
        encoder, seen = vlm.model.vision_encoder, list[int]()
        features = encoder.features

        def counting(tiles: Any, *rest: Any) -> Any:
            seen.append(len(tiles))
            return features(tiles, *rest)

        monkeypatch.setattr(encoder, "features", counting)
        places = ([[48, 24]], [[48, 24], [90, 90]])
        first, second = (
            client.post("/v1/find", json={**SHOWN, "like": like}).json() for like in places
        )
        # Three looks and a larger one, since so small a net takes many places for things.
        assert first["usage"] == second["usage"] and seen == [1, 4, 9, 16]
        with vlm.scheduler.seeing:  # as if another prompt was seen
            again = client.post("/v1/find", json={**SHOWN, **PLACE}).json()
        assert again["points"] == first["points"] and len(seen) == 4
        for like in places:
            body = {"image": file_url(tmp_path / "a.png"), "reference": SCENE_URL, "like": like}
            assert len(client.post("/v1/find", json=body).json()["images"]) == 2
        assert len(seen) == 4 + 3


def test_its_time_is_limited(vlm: VLM, finder: Finder, monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()

    def slow(*arguments: Any, **keywords: Any) -> Any:
        never.wait(0.3)
        return finder.find(*arguments, **keywords)

    monkeypatch.setattr(vlm, "find", slow)
    with running(vlm, ServeSettings(max_seconds=0.1)) as server, server.client() as client:
        error = told(client.post("/v1/find", json={**SHOWN, **PLACE}), 408)
    assert error["code"] == "request_timeout"


def test_a_model_that_does_not_find_says_so(
    server: Running, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(server.vlm.model._modules, "finder", None)
    error = told(http.post("/v1/find", json={**SHOWN, **PLACE}), 400)
    assert "cannot find by example" in error["message"] and error["param"] is None


def test_abilities_say_whether_a_model_finds(http: httpx.Client, server: Running) -> None:
    abilities = http.get("/v1/models/tiny").json()["abilities"]
    assert abilities["find"] is finds(server.vlm)
    for size, expected in ((None, False), (64, True)):
        config = SimpleNamespace(finder_dim=size)
        vlm: Any = SimpleNamespace(model=SimpleNamespace(config=config))
        assert finds(vlm) is expected
