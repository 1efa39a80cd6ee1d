"""What is wrong with a request is said in one sentence, in OpenAI's shape, and changes nothing."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from nanomolmo2.generation.vlm import VLM
from nanomolmo2.serve.settings import ServeSettings
from tests.serve.conftest import SCENE, SCENE_URL, Running, data_url, running

ROOT = Path(__file__).parents[2]

TEXT = {"type": "text", "text": "What is this?"}


def image(url: str = SCENE_URL) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [*parts, TEXT]}


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": list(messages), "max_tokens": 4, **fields}


def bomb(side: int = 30_000) -> str:
    """A PNG of a few hundred bytes that says it has 900 million pixels."""

    def piece(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = (
        piece(b"IHDR", header) + piece(b"IDAT", zlib.compress(b"\0" * 1000)) + piece(b"IEND", b"")
    )
    return data_url(b"\x89PNG\r\n\x1a\n" + data)


def video(name: str = "video_url") -> dict[str, Any]:
    stream = io.BytesIO()
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:], duration=500)
    return {"type": name, name: {"url": data_url(stream.getvalue(), "video/gif")}}


# name -> (body, status, what the sentence says, the field that it names)
CHATS: dict[str, tuple[Any, int, str, str | None]] = {
    "base 64": (chat(user(image("data:image/png;base64,$$$"))), 400, "data URL", "image"),
    "no base 64": (chat(user(image("data:image/png,abc"))), 400, "data URL", "image"),
    "no picture": (chat(user(image(data_url(b"abc")))), 400, "expected a picture", "image"),
    "cut off": (
        chat(user(image(data_url(SCENE.read_bytes()[:2000])))),
        400,
        "",
        "image",
    ),
    "bomb": (chat(user(image(bomb()))), 400, "found 900000000 pixels", "image"),
    "file": (chat(user(image("file:///etc/passwd"))), 400, "neither a data URL nor", "image"),
    "path": (chat(user(image("/etc/passwd"))), 400, "neither a data URL nor", "image"),
    "remote": (chat(user(image("http://127.0.0.1/x.png"))), 400, "--allow-remote", "image"),
    "scheme": (chat(user(image("ftp://example.org/x.png"))), 400, "neither a data URL", "image"),
    "nested list": (
        chat({"role": "user", "content": [[[]]]}),
        400,
        "a part of a message has no type, expected text",
        "messages[0].content[0]",
    ),
    "long text": (
        chat({"role": "user", "content": "a b " * 2_500_000}),
        400,
        "10,000,000 characters",
        None,
    ),
    "empty": (chat({"role": "user", "content": "  "}), 400, "the question is empty", None),
    "model": ({**chat(user()), "model": "huge"}, 404, "choose one of tiny", "model"),
    "order": (chat(user(), user()), 400, "'assistant' must speak", None),
    "assistant first": (
        chat({"role": "assistant", "content": "Hi"}, user()),
        400,
        "must speak",
        None,
    ),
    "assistant last": (
        chat(user(), {"role": "assistant", "content": "Hi"}),
        400,
        "end with a message of the role user",
        "messages",
    ),
    "only system": (
        chat({"role": "system", "content": "Hi"}),
        400,
        "at least one user message",
        None,
    ),
    "image of the assistant": (
        chat(user(), {"role": "assistant", "content": [image()]}, user()),
        400,
        "only users show them",
        None,
    ),
    "image of the system": (
        chat({"role": "system", "content": [image()]}, user()),
        400,
        "the system message holds a picture",
        "messages",
    ),
    "negative": (chat(user(), max_tokens=-5), 400, "at least 1, found -5", "max_tokens"),
    "none": (chat(user(), max_tokens=0), 400, "at least 1, found 0", "max_tokens"),
    "not whole": (chat(user(), max_tokens=1.5), 400, "a whole number", "max_tokens"),
    "no number": (chat(user(), max_tokens="5"), 400, "a whole number", "max_tokens"),
    "hot": (chat(user(), temperature=3), 400, "at most 2, found 3", "temperature"),
    "top_p": (chat(user(), top_p=0), 400, "above 0, found 0", "top_p"),
    "n": (chat(user(), n=9), 400, "n must be at most 8, found 9", "n"),
    "top_logprobs": (chat(user(), top_logprobs=21), 400, "at most 20", "top_logprobs"),
    "two videos": (chat(user(video(), video())), 400, "2 videos", "messages"),
    "video and picture": (chat(user(video(), image())), 400, "a video and pictures", "messages"),
    "no video": (
        chat(user({"type": "video_url", "video_url": {"url": data_url(b"abc", "video/mp4")}})),
        400,
        "expected a video",
        None,
    ),
    "many pictures": (
        chat(user(*[image()] * 17)),
        400,
        "17 pictures, expected at most 16",
        "messages",
    ),
    "role": (chat({"role": "wizard", "content": "Hi"}), 400, "'wizard'", "messages[0].role"),
    "no role": (chat({"content": "Hi"}), 400, "is missing", "messages[0].role"),
    "no content": (chat({"role": "user"}), 400, "is missing", "messages[0].content"),
    "content": (
        chat({"role": "user", "content": 5}),
        400,
        "a text or a list, found 5",
        "messages[0].content",
    ),
    "no parts": (chat({"role": "user", "content": []}), 400, "the question is empty", None),
    "no messages": ({"model": "tiny"}, 400, "messages is missing", "messages"),
    "no message": (chat(), 400, "at least 1 items", "messages"),
    "no model": ({"messages": [user()]}, 400, "model is missing", "model"),
    "tools": (chat(user(), tools=[{"type": "function"}]), 400, "tools is not supported", None),
    "tool": (chat({"role": "tool", "content": "5"}), 400, "call of a tool", "messages[0]"),
    "audio": (
        chat(user({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}})),
        400,
        "'input_audio'",
        "messages[0].content[0]",
    ),
    "speech": (chat(user(), modalities=["text", "audio"]), 400, "modalities", None),
    "penalty": (chat(user(), presence_penalty=0.5), 400, "repetition_penalty", None),
    "stop": (chat(user(), stop=""), 400, "at least 1 characters", "stop"),
    "stops": (chat(user(), stop=["."] * 17), 400, "at most 16 items, found 17 items", "stop"),
    "bias": (chat(user(), logit_bias={"abc": 1}), 400, "its id, a whole number", "logit_bias.abc"),
    "schema": (
        chat(
            user(),
            response_format={
                "type": "json_schema",
                "json_schema": {
                    "name": "a",
                    "schema": {
                        "type": "object",
                        "properties": {"mood": {"type": "string"}},
                        "required": ["mood"],
                    },
                },
            },
        ),
        400,
        "requires 'mood'",
        None,
    ),
    "crops": (chat(user(image()), max_crops=4), 400, "leave max_crops out", "max_crops"),
    "list": ([1, 2], 400, "an object", None),
}


def told(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer, whose shape is checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    message = error["message"]
    assert error["type"] == "invalid_request_error" and error["code"]
    assert "\n" not in message and 20 < len(message) < 700
    for inside in ("Traceback", str(ROOT), "nanomolmo2/", "pydantic", "site-packages", "root:"):
        assert inside not in message
    return dict(error)


@pytest.mark.parametrize("name", CHATS)
def test_chats(name: str, server: Running, http: httpx.Client) -> None:
    body, status, says, param = CHATS[name]
    before = dict(server.vlm.scheduler.stats.requests)
    error = told(http.post("/v1/chat/completions", json=body), status)
    assert says in error["message"]
    assert error["param"] == param
    assert dict(server.vlm.scheduler.stats.requests) == before
    if isinstance(body, dict):  # refused before the stream begins
        told(http.post("/v1/chat/completions", json={**body, "stream": True}), status)


@pytest.mark.parametrize(
    ("body", "kind", "status", "says"),
    [
        (b"{", "application/json", 400, "no JSON"),
        (b"\xff\xfe", "application/json", 400, "no JSON"),
        (b"[" * 100_000, "application/json", 400, "no JSON"),
        (b'{"max_tokens": NaN}', "application/json", 400, "no JSON"),
        (b"", "application/json", 400, "no JSON"),
        (b'{"object": "\\ud800"}', "application/json", 400, ""),  # half a character
        (b"{}", "text/plain", 415, "expected application/json"),
        (b"a=b", "application/x-www-form-urlencoded", 415, "expected application/json"),
    ],
)
def test_bodies(http: httpx.Client, body: bytes, kind: str, status: int, says: str) -> None:
    for route in ("/v1/chat/completions", "/v1/point"):
        response = http.post(route, content=body, headers={"content-type": kind})
        assert says in told(response, status)["message"]


@pytest.mark.parametrize(
    ("route", "body", "says", "param"),
    [
        ("point", {"image": SCENE_URL}, "object is missing", "object"),
        ("point", {"object": "cups"}, "image is missing", "image"),
        ("point", {"image": "data:image/png;base64,", "object": "cups"}, "data URL", "image"),
        ("point", {"image": "/etc/passwd", "object": "cups"}, "neither a data URL", "image"),
        ("point", {"image": SCENE_URL, "object": "   "}, "the things is empty", None),
        ("point", {"image": 5, "object": "cups"}, "a text, a list or an object", "image"),
        ("count", {"image": SCENE_URL, "object": 5}, "object must be a text", "object"),
        ("count", {"image": bomb(), "object": "cups"}, "found 900000000 pixels", "image"),
        ("caption", {}, "image is missing", "image"),
        ("caption", {"image": SCENE_URL, "max_tokens": -1}, "at least 1", "max_tokens"),
        ("query", {"image": SCENE_URL}, "question or messages, found neither", None),
        ("query", {"question": "a", "messages": [user()]}, "found both", None),
        ("query", {"question": "a", "model": "huge"}, "choose one of tiny", "model"),
        ("attention", {"question": "a", "answer": "b"}, "nothing is shown", None),
        (
            "attention",
            {"question": "a", "answer": "No.", "token": 99, "image": SCENE_URL},
            "token 99 is asked for",
            None,
        ),
    ],
)
def test_plain_routes(
    http: httpx.Client, route: str, body: dict[str, Any], says: str, param: str | None
) -> None:
    status = 404 if body.get("model") == "huge" else 400
    error = told(http.post(f"/v1/{route}", json=body), status)
    assert says in error["message"] and error["param"] == param


def test_forms(http: httpx.Client) -> None:
    broken = told(http.post("/v1/point", files={"image": b"abc"}, data={"object": "cups"}), 400)
    assert "expected a picture" in broken["message"]
    cut = {"image": "data:image/png", "object": "cups"}  # by curl -F, where --form-string would do
    told_of = told(http.post("/v1/point", files={"model": (None, "tiny")}, data=cut), 400)
    assert "curl -F ends a text at its first semicolon" in told_of["message"]
    many = [("images", SCENE.read_bytes()) for _ in range(30)]
    told(http.post("/v1/point", files=many, data={"object": "cups"}), 400)
    two = [("video", b"a"), ("video", b"b")]
    assert (
        "2 videos"
        in told(http.post("/v1/query", files=two, data={"question": "a"}), 400)["message"]
    )
    told(http.post("/v1/query", files={"image": b"a"}, data={"question": "a", "seed": "x"}), 400)
    response = http.post(
        "/v1/point", content=b"abc", headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert response.status_code == 400


def test_addresses_that_there_are_not(http: httpx.Client) -> None:
    assert "there is no '/v2'" in told(http.get("/v2"), 404)["message"]
    refused = http.get("/v1/chat/completions")
    assert refused.headers["allow"] == "POST"
    told(refused, 405)


@pytest.fixture
def narrow(vlm: VLM) -> Iterator[httpx.Client]:
    settings = ServeSettings(max_images=1, max_pixels=192 * 191, max_new_tokens=3)
    with running(vlm, settings) as found, found.client() as client:
        yield client


def test_the_limits_are_those_of_the_settings(narrow: httpx.Client) -> None:
    error = told(narrow.post("/v1/caption", json={"image": SCENE_URL}), 400)
    assert "192 x 192" in error["message"]
    two = {"images": [SCENE_URL, SCENE_URL]}
    assert "2 pictures" in told(narrow.post("/v1/caption", json=two), 400)["message"]
    answer = narrow.post("/v1/query", json={"question": "Hello", "max_tokens": 50}).json()
    assert answer["output_tokens"] == 3


def test_files_of_this_computer_are_not_opened(http: httpx.Client, tmp_path: Path) -> None:
    """Nor is it said whether they are there."""
    there, not_there = tmp_path / "a.png", tmp_path / "b.png"
    there.write_bytes(SCENE.read_bytes())
    messages = []
    for path in (there, not_there):
        for address in (str(path), path.as_uri()):
            for body in ({"image": address}, {"video": address}):
                messages.append(told(http.post("/v1/caption", json=body), 400)["message"])
    assert len(set(messages)) == 2  # of pictures, and of videos


@pytest.mark.parametrize("charset", ["punycode", "idna", "utf-16", "latin-1", "no such"])
def test_forms_are_in_utf_8(http: httpx.Client, charset: str) -> None:
    """Of Python's encodings, which a client may name, some take minutes for a megabyte."""
    field = b'Content-Disposition: form-data; name="question"\r\n\r\n-' + b"a9" * 100_000
    body = b"--B\r\n" + field + b"\r\n--B--\r\n"
    kind = {"content-type": f'multipart/form-data; boundary=B; charset="{charset}"'}
    response = http.post("/v1/query", content=body, headers=kind)
    assert "in another encoding than UTF-8" in told(response, 415)["message"]
    kind = {"content-type": "multipart/form-data; boundary=B; charset=UTF-8"}
    response = http.post("/v1/query", content=body, headers=kind)
    assert "the question has 200,001 characters" in told(response, 400)["message"]


def test_as_little_as_can_be_drawn_from(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", json=chat(user(), temperature=1.0, top_p=1e-320))
    assert response.status_code == 200
