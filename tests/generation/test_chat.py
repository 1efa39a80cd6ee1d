"""Chat: what was said and shown is remembered, and not computed again."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from nanomolmo2.generation.vlm import VLM, Answer
from nanomolmo2.processor import Point
from tests.generation.test_vlm import LONG, ended, noise, scripted, small_vlm
from tests.golden_points import consistent_pipeline, golden_folder, picture


def test_a_conversation_is_the_messages_that_ask_takes() -> None:
    """Against the same turns in one list, without a cache."""
    vlm, plain = small_vlm(), small_vlm(reuse_bytes=0)
    chat = vlm.chat(noise(0))
    questions = ["What is this?", "Where?", "And this?"]
    messages: list[Any] = []
    for number, question in enumerate(questions):
        shown = {0: noise(0), 2: noise(2)}.get(number)
        content: Any = question
        if shown is not None:
            content = [{"type": "image", "image": shown}, {"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        wanted = plain.ask(None, messages, max_new_tokens=6)
        answer = chat.ask(question, noise(2) if number == 2 else None, max_new_tokens=6)
        assert answer.text == wanted.text
        messages.append({"role": "assistant", "content": wanted.text})
    assert [one["role"] for one in chat.messages] == ["user", "assistant"] * 3
    assert [one["content"] for one in chat.messages[1::2]] == [a.text for a in chat.answers]
    assert chat.messages[2]["content"] == "Where?"
    assert chat.answers[-1].image_sizes == ((64, 64), (64, 64))


def test_earlier_turns_are_not_computed_again() -> None:
    chat = small_vlm().chat(noise(0))
    first = chat.ask("What is this?", max_new_tokens=6)
    assert first.reused_tokens == 0
    second = chat.ask("Where?", max_new_tokens=6)
    # All of the prompt; of the answer what the chat format does not write otherwise.
    assert second.reused_tokens >= first.prompt_tokens
    assert second.prompt_tokens > second.reused_tokens


def test_undo_takes_turns_back_with_what_they_showed() -> None:
    vlm = scripted("one", "two", "three", "two again")
    chat = vlm.chat()
    assert not chat.undo()
    chat.ask("First?", noise(0))
    before = list(chat.messages)
    chat.ask("Second?", noise(1))
    assert chat.undo()
    assert (chat.messages, [a.text for a in chat.answers]) == (before, ["one"])
    answer = chat.ask("Second?")
    assert answer.text == "three" and len(answer.image_sizes) == 1
    assert chat.undo() and chat.undo() and not chat.undo()
    assert (chat.messages, chat.answers) == ([], [])


def test_reset_begins_anew() -> None:
    chat = scripted("one", "two").chat(noise(0))
    chat.ask("First?")
    chat.show(noise(1))
    chat.reset()
    answer = chat.ask("Again?")
    assert answer.image_sizes == () and len(chat.messages) == 2


def test_a_turn_that_was_refused_is_as_if_it_had_not_been_asked() -> None:
    chat = scripted("one", "two").chat(noise(0))
    for wrong, error in (
        (lambda: chat.ask(" "), ValueError),
        (lambda: chat.ask("What?", Path("missing.png")), FileNotFoundError),
        (lambda: chat.ask("What?", max_new_tokens=10**6), ValueError),
        (lambda: chat.stream("What?", video="missing.mp4"), (ValueError, FileNotFoundError)),
    ):
        with pytest.raises(error):
            wrong()
        assert (chat.messages, chat.answers) == ([], [])
    assert chat.ask("What?").image_sizes == ((64, 64),)  # still to be shown


@pytest.mark.parametrize("how", ["close", "drop", "next turn", "reset"])
def test_a_turn_that_was_left_is_as_if_it_had_not_been_asked(how: str) -> None:
    vlm = small_vlm()
    chat = vlm.chat(noise(0))
    stream = chat.stream("Dogs?", **LONG)
    assert isinstance(next(stream), str)
    if how == "close":
        stream.close()
    elif how == "reset":
        chat.reset()
    elif how == "drop":
        del stream
    answer = chat.ask("Cats?", max_new_tokens=2, eos_token_id=None)
    assert len(chat.messages) == 2 and chat.answers == [answer]
    assert answer.image_sizes == (() if how == "reset" else ((64, 64),))
    if how == "next turn":
        assert list(stream) == []
    assert ended(vlm) == {"cancelled": 1, "length": 1}


def test_a_streamed_turn_counts_once_its_answer_is_taken() -> None:
    text = '<points coords="1 1 210 455">dog</points>'
    chat = scripted(text).chat()
    stream = chat.stream("Point to the dog.", noise(0, 200, 50))
    items = []
    for item in stream:
        if not isinstance(item, Answer):
            assert chat.messages == []
        items.append(item)
    assert [p for p in items if isinstance(p, Point)] == [Point(42, 22.75, id=1)]
    assert chat.messages[-1] == {"role": "assistant", "content": text}


def test_what_is_shown_may_change_afterwards(tmp_path: Path) -> None:
    """Files are read when they are shown: later ones of the same name are other pictures."""
    path, stream = tmp_path / "shot.png", io.BytesIO()
    noise(0).save(path)
    noise(1).save(stream, "PNG")
    vlm = small_vlm()
    chat = vlm.chat([path, stream])
    wanted = [chat.ask("What?", max_new_tokens=4).text]
    path.unlink()
    stream.close()
    wanted.append(chat.ask("Where?", max_new_tokens=4).text)
    again = vlm.chat([noise(0), noise(1)])
    assert [again.ask(q, max_new_tokens=4).text for q in ("What?", "Where?")] == wanted


def test_several_conversations_go_on_together() -> None:
    vlm = small_vlm()
    first, second = vlm.chat(noise(0)), vlm.chat(noise(1))
    streams = [
        first.stream("Dogs?", max_new_tokens=5, eos_token_id=None),
        second.stream("Cats?", max_new_tokens=5, eos_token_id=None),
    ]
    for stream in streams:
        assert isinstance(next(stream), str)
    answers = [stream.answer() for stream in reversed(streams)]
    assert (first.answers, second.answers) == ([answers[1]], [answers[0]])


@pytest.fixture(scope="module")
def pointer(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return consistent_pipeline(golden_folder(tmp_path_factory.mktemp("own") / "model"))


def test_points_that_were_selected_stay_where_they_were(pointer: VLM) -> None:
    """<POINT_k> means another place once the conversation shows another picture."""
    chat = pointer.chat(picture(0, (150, 100)))
    options: Any = {"max_new_tokens": 40, "eos_token_id": None}
    first = chat.ask("Point to the cups.", **options)
    assert "<POINT_" in first.text and len(first.points) > 2
    chat.ask("And here?", picture(1, (90, 120)), **options)
    prompt = pointer.processor.encode(chat.messages[:3])
    space = prompt.point_space
    assert space is not None and prompt.point_targets is not None
    targets = [t for t in prompt.point_targets.tolist() if t[0] != 1_000_000 and t[2] >= 0]
    again = [space.point(tuple(target)) for target in targets]
    assert [(p.image, p.x, p.y) for p in again] == [
        (p.image, pytest.approx(p.x), pytest.approx(p.y)) for p in first.points
    ]
