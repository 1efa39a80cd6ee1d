"""Models that select points, and models that read crops."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from nanomolmo2.generation.vlm import VLM
from nanomolmo2.processor import Processor, ProcessorConfig
from nanomolmo2.processor.crops import MultiCrop
from nanomolmo2.serve.logprobs import token_bytes
from nanomolmo2.serve.reading import conversation, system_use
from nanomolmo2.serve.schemas import Message
from nanomolmo2.serve.settings import ServeSettings
from tests.golden_points import golden_folder, picture
from tests.serve.conftest import Running, data_url, running
from tests.small_model import small_model, small_processor

QUESTION = "Point to the lamps."


def png(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return data_url(stream.getvalue())


@pytest.fixture(scope="module")
def selecting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The golden point model, under the name `tiny`."""
    folder = golden_folder(tmp_path_factory.mktemp("golden") / "model")
    with VLM(folder, device="cpu") as vlm, running(vlm) as found:
        yield found


def test_selected_points_are_quoted_as_coordinates(selecting: Running) -> None:
    """What a selection means is known in its own prompt alone."""
    image = picture(0, (150, 100))
    same = selecting.vlm.ask(image, QUESTION, max_new_tokens=60)
    assert "<POINT_" in same.text and same.points
    shown = {"type": "image_url", "image_url": {"url": png(image)}}
    asked: Any = {
        "model": "tiny",
        "max_tokens": 60,
        "messages": [{"role": "user", "content": [shown, {"type": "text", "text": QUESTION}]}],
    }
    with openai.OpenAI(base_url=f"{selecting.url}/v1", api_key="none") as client:
        message = client.chat.completions.create(**asked).choices[0].message
        pieces = [
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(**asked, stream=True)
        ]
        (card,) = client.models.list().data
    assert message.content == same.coordinates and "<POINT_" not in message.content
    assert "".join(pieces) == message.content
    assert message.model_extra is not None
    points = message.model_extra["points"]
    assert [point["x"] for point in points] == [point.x for point in same.points]
    assert all(0 < point["confidence"] < 1 for point in points)
    assert card.model_extra is not None and card.model_extra["abilities"]["points"] == "selected"


def test_where_it_looked_behind_a_selection(selecting: Running) -> None:
    body = {"question": QUESTION, "image": png(picture(0, (150, 100)))}
    url = f"{selecting.url}/v1/attention"
    found = httpx.post(url, json={**body, "answer": "<POINT_12><POINT_26>"}).json()
    assert found["tokens"] == ["<POINT_12>", "<POINT_26>"] and found["token"] == 1
    assert sum(map(sum, found["images"][0]["weights"])) == pytest.approx(1)
    response = httpx.post(url, json={**body, "answer": "<POINT_26><POINT_12>"})
    assert response.status_code == 400
    assert "is out of order" in response.json()["error"]["message"]


@pytest.fixture(scope="module")
def cropping() -> Iterator[Running]:
    """Random weights behind crops of 4 x 4 patches."""
    crops = MultiCrop(max_crops=4, image_size=64, patch_size=16, overlap_margins=(1, 1))
    processor = Processor(ProcessorConfig.molmo2(multicrop=crops), small_processor().tokenizer)
    with VLM(small_model(), processor) as vlm, running(vlm) as found:
        yield found


def test_crops_are_those_of_the_request(cropping: Running) -> None:
    picture = png(Image.new("RGB", (200, 50), "green"))
    body = {"question": "Is it?", "image": picture, "max_tokens": 2}
    counts = []
    for more in ({}, {"max_crops": 1}, {"max_crops": 4}, {}):
        response = httpx.post(f"{cropping.url}/v1/query", json={**body, **more})
        counts.append(response.json()["usage"]["prompt_tokens"])
    assert counts[0] == counts[2] == counts[3] > counts[1]
    shapes = []
    for more in ({"max_crops": 1}, {}):
        looked = {**body, "answer": "a", **more}
        (image,) = httpx.post(f"{cropping.url}/v1/attention", json=looked).json()["images"]
        assert sum(map(sum, image["weights"])) == pytest.approx(1)
        shapes.append((image["rows"], image["cols"]))
    assert shapes[0][1] < shapes[1][1]  # the picture is four times as wide as high


def test_bytes_of_tokens() -> None:
    """A character may take several tokens: none is a text alone, together they are."""
    processor = small_processor()
    for text in ("snail", " two  words", "é", "🙂🙃", "日本"):
        ids = processor.tokenizer.encode_text(text)
        assert b"".join(token_bytes(processor, id) for id in ids) == text.encode("utf-8")
        assert len(ids) > 1 or text == "snail"


def test_a_system_message_stands_in_front_of_the_question_where_the_format_has_none() -> None:
    messages = [
        Message(role="system", content="Be short."),
        Message(role="user", content="What is this?"),
    ]
    (user,) = conversation(messages, ServeSettings(), system="in front")
    assert [part["text"] for part in user["content"]] == ["Be short.\n", "What is this?"]
    (user,) = conversation(messages, ServeSettings(), system="left out")
    assert [part["text"] for part in user["content"]] == ["What is this?"]
    system, _ = conversation(messages, ServeSettings(), system="own")
    assert system["role"] == "system"


def test_what_becomes_of_a_system_message_hangs_on_the_model() -> None:
    molmo2 = ProcessorConfig.molmo2(image_size=64, image_tokens=4)
    assert system_use(molmo2) == "in front"
    assert system_use(replace(molmo2, trained_on=("emoji",))) == "left out"
    assert system_use(replace(molmo2, chat_format="qwen3")) == "own"
