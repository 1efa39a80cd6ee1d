"""OpenAI's own client against a real server."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from nanomolmo2.generation.vlm import VLM
from nanomolmo2.serve.settings import ServeSettings
from tests.serve.conftest import SCENE, SCENE_URL, Running, running

SNAIL = (67.0, 33.0, 127.0, 94.0)  # left, top, right, bottom; of assets/demo/scene.json
NO_END = {"708": -100.0, "706": -100.0}  # logit_bias with which `tiny` never ends an answer


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def asks(text: str, *urls: str, kind: str = "image_url") -> list[Any]:
    shown = [{"type": kind, kind: {"url": url}} for url in urls]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


def test_an_answer_is_that_of_the_model(client: openai.OpenAI, vlm: VLM) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=asks("Point to the snail.", SCENE_URL)
    )
    same = vlm.ask(SCENE, "Point to the snail.")
    (choice,) = answer.choices
    assert choice.message.content == same.text == '<points coords="1 1 500 350">snail</points>'
    assert choice.finish_reason == "stop"
    assert choice.message.role == "assistant"
    (point,) = choice.message.model_extra["points"]  # the scene has 192 x 192 pixels
    assert (point["x"], point["y"], point["x_share"], point["y_share"]) == (96.0, 67.2, 0.5, 0.35)
    assert SNAIL[0] < point["x"] < SNAIL[2] and SNAIL[1] < point["y"] < SNAIL[3]
    assert (point["label"], point["image"], choice.message.model_extra["count"]) == ("snail", 1, 1)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == same.usage.prompt_tokens
    assert answer.usage.completion_tokens == same.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    messages = asks("Describe this picture.", SCENE_URL)
    whole = client.chat.completions.create(model="tiny", messages=messages)
    stream = client.chat.completions.create(
        model="tiny", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(filter(None, pieces)) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 3
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert ends == [None] * (len(ends) - 1) + ["stop"]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_without_include_usage_no_chunk_has_it(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=asks("Point to the snail.", SCENE_URL), stream=True
    )
    chunks = list(stream)
    assert all(chunk.choices and "usage" not in chunk.model_fields_set for chunk in chunks)
    points = [chunk.choices[0].delta.model_extra.get("points") for chunk in chunks]
    assert [len(found) for found in points if found] == [1]  # once, so that sums of deltas hold


def test_choices_are_drawn_with_seeds_of_their_own(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "messages": asks("Describe this picture.", SCENE_URL)}
    drawn: Any = {**asked, "temperature": 2.0, "seed": 5}
    three = client.chat.completions.create(**drawn, n=3)
    texts = [choice.message.content for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    alone = [
        client.chat.completions.create(**{**drawn, "seed": 5 + i}).choices[0].message.content
        for i in range(3)
    ]
    assert texts == alone and len(set(texts)) > 1
    greedy: Any = client.chat.completions.create(**asked, n=2)  # type: ignore[call-overload]
    one, two = greedy.choices
    assert one.message.content == two.message.content


def test_choices_share_the_prompt(server: Running, client: openai.OpenAI) -> None:
    before = server.vlm.scheduler.stats.reused_tokens
    answer = client.chat.completions.create(
        model="tiny", messages=asks("How many snails are there?", SCENE_URL), n=4
    )
    assert answer.usage is not None
    reused = server.vlm.scheduler.stats.reused_tokens - before
    assert reused >= 3 * (answer.usage.prompt_tokens - 1)


def test_streams_of_several_choices_do_not_mix(client: openai.OpenAI) -> None:
    asked: Any = {
        "model": "tiny",
        "messages": asks("Describe this picture.", SCENE_URL),
        "n": 3,
        "temperature": 2.0,
        "seed": 5,
    }
    whole = [c.message.content for c in client.chat.completions.create(**asked).choices]
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == whole


def test_logprobs_are_those_of_the_model(client: openai.OpenAI, vlm: VLM) -> None:
    asked: Any = {
        "model": "tiny",
        "messages": asks("Describe this picture.", SCENE_URL),
        "logprobs": True,
        "top_logprobs": 3,
    }
    (choice,) = client.chat.completions.create(**asked).choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    content = choice.logprobs.content
    assert "".join(token.token for token in content) == choice.message.content
    assert bytes(b for token in content for b in token.bytes or ()).decode() == (
        choice.message.content
    )
    same = vlm.ask(SCENE, "Describe this picture.", logprobs=3)
    for token, expected in zip(content, same.logprobs, strict=False):
        assert token.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token  # greedy
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1 + 1e-6
    last = list(client.chat.completions.create(**asked, stream=True))
    streamed = [
        token.token
        for chunk in last
        for choice in chunk.choices
        if choice.logprobs is not None
        for token in choice.logprobs.content or ()
    ]
    assert streamed == [token.token for token in content]


def test_an_answer_ends_where_it_is_told_to(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": asks("Describe this picture.", SCENE_URL)}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    assert whole is not None and ", " in whole
    short = client.chat.completions.create(**asked, max_tokens=3)
    assert short.choices[0].finish_reason == "length"
    assert short.usage is not None and short.usage.completion_tokens == 3
    newer = client.chat.completions.create(**asked, max_tokens=50, max_completion_tokens=2)
    assert newer.usage is not None and newer.usage.completion_tokens == 2
    for stop in (",", ["never", ","]):
        stopped = client.chat.completions.create(**asked, stop=stop).choices[0]
        assert stopped.message.content == whole.partition(",")[0]
        assert stopped.finish_reason == "stop"


def test_more_tokens_than_there_is_room_for_end_with_the_context(client: openai.OpenAI) -> None:
    """Clients send what they always send; `tiny` reads 2,048 positions."""
    answer = client.chat.completions.create(
        model="tiny", messages=asks("Point to the snail.", SCENE_URL), max_tokens=100_000
    )
    assert answer.choices[0].finish_reason == "stop"


def test_a_conversation_goes_on_and_is_read_once(client: openai.OpenAI) -> None:
    messages = asks("Point to the butterfly.", SCENE_URL)
    first = client.chat.completions.create(model="tiny", messages=messages)
    assert first.usage is not None
    said = first.choices[0].message.content
    messages += [
        {"role": "assistant", "content": said},
        {"role": "user", "content": "How many sunflowers are there?"},
    ]
    second = client.chat.completions.create(model="tiny", messages=messages)
    assert second.choices[0].message.model_extra["count"] == 3
    assert second.usage is not None and second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None and cached >= first.usage.prompt_tokens


def test_several_images_and_videos(client: openai.OpenAI, vlm: VLM, clip_url: str) -> None:
    two = client.chat.completions.create(
        model="tiny", messages=asks("Point to the snail.", SCENE_URL, SCENE_URL)
    )
    same = vlm.ask([SCENE, SCENE], "Point to the snail.")
    assert two.choices[0].message.content == same.text
    video = client.chat.completions.create(
        model="tiny", messages=asks("What is seen?", clip_url, kind="video_url")
    )
    assert video.usage is not None and video.usage.prompt_tokens > 3 * 4
    text = client.chat.completions.create(model="tiny", messages=asks("Hello"), max_tokens=5)
    assert text.usage is not None and text.usage.completion_tokens <= 5


def test_a_system_message_is_not_told_to_a_model_that_learned_its_questions_alone(
    client: openai.OpenAI, vlm: VLM
) -> None:
    """Every second client sends one; `tiny` would answer that it does not know that."""
    for role in ("system", "developer"):
        messages: Any = [
            {"role": role, "content": "You are a helpful assistant."},
            *asks("Describe this picture.", SCENE_URL),
        ]
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=16)
        same = vlm.ask(SCENE, "Describe this picture.", max_new_tokens=16)
        assert answer.choices[0].message.content == same.text
    assert client.models.retrieve("tiny").model_extra["abilities"]["system"] is False  # type: ignore[index]


class Place(BaseModel):
    x: int
    y: int
    label: str | None


class Snails(BaseModel):
    count: int
    points: list[Place]


def test_points_as_json(client: openai.OpenAI) -> None:
    messages = asks("Point to the snail.", SCENE_URL)
    answer = client.chat.completions.create(
        model="tiny", messages=messages, response_format={"type": "json_object"}
    )
    found = json.loads(answer.choices[0].message.content or "")
    assert (found["count"], found["points"][0]["x"], found["points"][0]["label"]) == (
        1,
        96,
        "snail",
    )
    parsed = client.chat.completions.parse(model="tiny", messages=messages, response_format=Snails)
    expected = Snails(count=1, points=[Place(x=96, y=67, label="snail")])
    assert parsed.choices[0].message.parsed == expected
    stream = client.chat.completions.create(
        model="tiny", messages=messages, response_format={"type": "json_object"}, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert json.loads(text) == found


def test_models(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert card.id == "tiny" and card.object == "model"
    assert {
        "video": True,
        "points": "text",
        "several_images": True,
        "max_crops": None,
        "context": 2048,
    }.items() <= card.model_extra["abilities"].items()
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is no model 'huge'"):
        client.models.retrieve("huge")


def test_a_client_that_leaves_frees_its_rows(server: Running, client: openai.OpenAI) -> None:
    before = server.vlm.scheduler.stats.requests.get("cancelled", 0)
    stream = client.chat.completions.create(
        model="tiny",
        messages=asks("Describe this picture.", SCENE_URL),
        stream=True,
        max_tokens=1900,
        logit_bias=NO_END,  # type: ignore[arg-type]
        n=2,
    )
    for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    stream.close()
    server.wait_until_idle()
    assert server.vlm.scheduler.stats.requests["cancelled"] == before + 2


def test_a_client_that_does_not_wait_frees_its_row(server: Running, client: openai.OpenAI) -> None:
    stats = server.vlm.scheduler.stats
    server.wait_until_idle()
    before = stats.requests.get("cancelled", 0)

    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none") as asking:
            answer = asyncio.ensure_future(
                asking.chat.completions.create(
                    model="tiny",
                    messages=asks("Describe this picture.", SCENE_URL),
                    max_tokens=1900,
                    logit_bias=NO_END,  # type: ignore[arg-type]
                )
            )
            while not stats.running:
                assert not answer.done()
                await asyncio.sleep(0.01)
            answer.cancel()
            with pytest.raises(asyncio.CancelledError):
                await answer

    asyncio.run(leave())
    server.wait_until_idle()
    assert stats.requests["cancelled"] == before + 1


def test_an_answer_that_takes_too_long_is_given_up(vlm: VLM) -> None:
    with running(vlm, ServeSettings(max_seconds=1)) as slow:
        with openai.OpenAI(base_url=f"{slow.url}/v1", api_key="none", max_retries=0) as client:
            asked: Any = {
                "model": "tiny",
                "messages": asks("Describe this picture.", SCENE_URL),
                "max_tokens": 1900,
                "logit_bias": NO_END,
                "n": 4,
            }
            cut_off = vlm.scheduler.stats.requests.get("length", 0)
            with pytest.raises(openai.APIStatusError) as caught:
                client.chat.completions.create(**asked)
            assert caught.value.status_code == 408
            with pytest.raises(openai.APIError, match="longer than this server allows"):
                list(client.chat.completions.create(**asked, stream=True))
        slow.wait_until_idle()
        assert vlm.scheduler.stats.requests.get("length", 0) == cut_off  # none was written out


def test_a_wrong_key(vlm: VLM) -> None:
    with running(vlm, ServeSettings(api_keys=("right",))) as locked:
        for key, fits in (("right", True), ("wrong", False)):
            client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=key, max_retries=0)
            if fits:
                assert client.models.list().data[0].id == "tiny"
                continue
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
