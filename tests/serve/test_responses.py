"""OpenAI's newer route with OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from nanomolmo2.generation.vlm import VLM
from tests.serve.conftest import SCENE, SCENE_URL, Running

SNAIL = '<points coords="1 1 500 350">snail</points>'


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def asks(text: str) -> Any:
    shown = {"type": "input_image", "image_url": SCENE_URL, "detail": "auto"}
    return [{"role": "user", "content": [shown, {"type": "input_text", "text": text}]}]


def test_an_answer(client: openai.OpenAI, vlm: VLM) -> None:
    found = client.responses.create(model="tiny", input=asks("Point to the snail."))
    assert found.output_text == SNAIL and found.status == "completed"
    usage = vlm.ask(SCENE, "Point to the snail.").usage
    assert found.usage is not None
    assert (found.usage.input_tokens, found.usage.output_tokens) == (usage.prompt_tokens, 12)
    (message,) = found.output
    assert message.model_extra is not None and message.model_extra["count"] == 1
    short = client.responses.create(
        model="tiny", input=asks("Point to the snail."), max_output_tokens=2
    )
    assert short.status == "incomplete" and short.incomplete_details is not None
    assert short.incomplete_details.reason == "max_output_tokens"


def test_events(client: openai.OpenAI) -> None:
    stream = client.responses.create(model="tiny", input=asks("Point to the snail."), stream=True)
    events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == [
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == SNAIL and len(deltas) > 5
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == SNAIL


def test_instructions_text_and_json(client: openai.OpenAI, vlm: VLM) -> None:
    found = client.responses.create(
        model="tiny", input="Describe it.", instructions="Be short.", max_output_tokens=8
    )
    assert found.output_text == vlm.ask(None, "Be short.\nDescribe it.", max_new_tokens=8).text
    schema = {"type": "object", "properties": {"count": {"type": "integer"}}}
    form: Any = {"format": {"type": "json_schema", "name": "a", "schema": schema}}
    counted = client.responses.create(
        model="tiny", input=asks("How many sunflowers are there?"), text=form
    )
    assert json.loads(counted.output_text) == {"count": 3}


def test_what_is_not_there_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="previous_response_id is not supported"):
        client.responses.create(model="tiny", input="Hi", previous_response_id="resp_1")
    with pytest.raises(openai.BadRequestError, match="at least 1, found -1"):
        client.responses.create(model="tiny", input="Hi", max_output_tokens=-1)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="huge", input="Hi")
