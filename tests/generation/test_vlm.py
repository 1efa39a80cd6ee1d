"""VLM: from any thread and event loop the answers of one by one, and nothing left behind."""

from __future__ import annotations

import asyncio
import copy
import gc
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import nanomolmo2
from nanomolmo2.generation import scheduler
from nanomolmo2.generation.scheduler import Cancelled
from nanomolmo2.generation.vlm import VLM, Answer, Question
from nanomolmo2.processor import Point, collate, format_points, format_tracks
from nanomolmo2.processor.config import VideoConfig
from nanomolmo2.processor.video import Video
from tests.generation.gate import Gate
from tests.generation.threads import run_together
from tests.golden_points import cases, consistent_pipeline, golden_folder, picture
from tests.small_model import ScriptedModel, small_model, small_processor

ROOT = Path(__file__).parents[2]
SCENE = ROOT / "nanomolmo2" / "assets" / "demo" / "scene.png"


def noise(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def small_vlm(seed: int = 0, **options: Any) -> VLM:
    model = small_model(seed)
    # Random weights would write halves of characters; those have tests of their own.
    model.llm.embed_tokens.weight.data[:257] = 0
    return VLM(model, small_processor(), **options)


def scripted(*texts: str) -> VLM:
    model = ScriptedModel(*texts)
    return VLM(model, model.processor)


@pytest.fixture(scope="module")
def tiny() -> VLM:
    return VLM("tiny")


@pytest.fixture
def vlm() -> Iterator[VLM]:
    with small_vlm() as vlm:
        yield vlm


LONG: Any = {"max_new_tokens": 300, "eos_token_id": None, "lookup": False}


def ended(vlm: VLM) -> dict[str, int]:
    """The requests by their reason, once none is left; nothing of them may be there any more."""
    vlm.scheduler.close(finish=True, timeout=60)
    stats = vlm.scheduler.stats
    assert (stats.running, stats.waiting) == (0, 0)
    assert not vlm.scheduler._tickets and not vlm.scheduler._engines
    return stats.requests


# ---- names ----


def test_the_public_names() -> None:
    from nanomolmo2.generation.pipeline import Pipeline

    assert nanomolmo2.VLM is nanomolmo2.Pipeline is Pipeline is VLM
    assert nanomolmo2.Answer is Answer and nanomolmo2.Question is Question
    assert VLM.from_pretrained("tiny").ask(SCENE, "Point to the snail.").count == 1


def test_parts_and_names_are_told_apart(tiny: VLM) -> None:
    assert VLM(tiny.model, tiny.processor).ask(SCENE, "Point to the snail.").count == 1
    with pytest.raises(ValueError, match=r"needs its processor: VLM\(model, processor\)"):
        VLM(tiny.model)
    with pytest.raises(ValueError, match="a processor beside the name of a model"):
        VLM("tiny", tiny.processor)
    with pytest.raises(ValueError, match="found dtype beside a model that is loaded already"):
        VLM(tiny.model, tiny.processor, dtype="bfloat16")


# ---- threads ----


@pytest.mark.parametrize("which", ["tiny", "random"])
def test_eight_threads_get_the_answers_of_one_by_one(which: str, tiny: VLM) -> None:
    """Mixed images, chats, batches, and streams that are left in between."""
    exact: Any = {} if which == "tiny" else {"batch_invariant": True}

    def new() -> VLM:
        return VLM(tiny.model, tiny.processor) if which == "tiny" else small_vlm()

    images: list[Any] = [SCENE, noise(1), [noise(2, 200, 50), SCENE], None]
    questions = ["Point to the snail.", "How many circles are there?"]
    options: Any = {"max_new_tokens": 10, **exact}

    def answers_of(vlm: VLM, number: int) -> list[str]:
        left = vlm.stream(images[number % 2], "Describe this picture.", **LONG)
        texts = [vlm.ask(images[number % 4], questions[number // 4], **options).text]
        next(left, None)
        left.close()
        chat = vlm.chat(noise(number))
        texts += [chat.ask(question, **options).text for question in questions]
        return texts

    with new() as alone:
        wanted = [answers_of(alone, number) for number in range(8)]
    found: dict[int, list[str]] = {}
    with new() as shared:
        problems = run_together(
            lambda number: found.update({number: answers_of(shared, number)}), 8
        )
        assert not problems
        assert ended(shared)["cancelled"] == 8
    assert [found[number] for number in range(8)] == wanted


def test_questions_of_threads_are_written_together() -> None:
    vlm, gate = small_vlm(), Gate()
    first = vlm.stream(noise(0), "Dogs?", constraint=gate, **LONG)
    assert gate.reached.wait(60)
    started = []

    def ask(number: int) -> None:
        stream = vlm.stream(noise(number), "Cats?", **LONG)
        started.append(stream)
        next(stream)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    gate.open()
    for thread in threads:
        thread.join()
    next(first)
    assert vlm.scheduler.stats.running == 4
    for stream in (first, *started):
        stream.close()
    assert ended(vlm) == {"cancelled": 4}


def test_a_row_is_free_at_the_step_after_its_stream_was_left() -> None:
    """With one row the second question waits for the first to be left, not to end."""
    vlm, gate = small_vlm(max_rows=1), Gate(free=3)
    first = vlm.stream(noise(0), "Dogs?", constraint=gate, **LONG)
    assert gate.reached.wait(60)
    threading.Timer(0.0, lambda: (first.close(), gate.open())).start()
    answer = vlm.ask(noise(1), "Cats?", max_new_tokens=2, eos_token_id=None)
    assert answer.output_tokens == 2
    assert ended(vlm) == {"cancelled": 1, "length": 1}
    assert vlm.scheduler.stats.steps < 10


@pytest.mark.parametrize("how", ["close", "cancel", "with", "drop", "never begun"])
def test_a_stream_that_is_left_ends(how: str) -> None:
    vlm = small_vlm()
    stream = vlm.stream(noise(0), "Dogs?", **LONG)
    if how != "never begun":
        assert isinstance(next(stream), str)
    if how in ("close", "cancel"):
        getattr(stream, how)()
        assert list(stream) == []
    elif how == "with":
        with stream:
            pass
        assert next(stream, None) is None
    del stream
    gc.collect()
    assert ended(vlm) == {"cancelled": 1}


def test_another_thread_may_end_a_stream_that_is_waited_for() -> None:
    vlm, gate = small_vlm(), Gate()
    stream = vlm.stream(noise(0), "Dogs?", constraint=gate, **LONG)
    threading.Timer(0.0, lambda: (gate.reached.wait(60), stream.close(), gate.open())).start()
    assert not [item for item in stream if isinstance(item, Answer)]
    with pytest.raises(Cancelled, match="before it was whole"):
        stream.answer()
    assert ended(vlm) == {"cancelled": 1}


def test_closing_a_model_ends_what_is_written() -> None:
    vlm, gate = small_vlm(), Gate()
    stream = vlm.stream(noise(0), "Dogs?", constraint=gate, **LONG)
    assert gate.reached.wait(60)
    threading.Timer(0.0, gate.open).start()
    vlm.close()
    with pytest.raises(Cancelled, match="the model was closed before the answer ended"):
        list(stream)
    with pytest.raises(RuntimeError, match="the model was closed: make a new one"):
        vlm.ask(noise(0), "Dogs?")
    vlm.close()


def test_an_interrupt_ends_the_answer_that_is_waited_for() -> None:
    """Ctrl-C, while the main thread waits for the first token."""
    vlm, gate = small_vlm(), Gate()

    def interrupt() -> None:
        assert gate.reached.wait(60)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        vlm.ask(noise(0), "Dogs?", constraint=gate, **LONG)
    gate.open()
    assert vlm.ask(noise(0), "Dogs?", max_new_tokens=2, eos_token_id=None).output_tokens == 2
    assert ended(vlm) == {"cancelled": 1, "length": 1}


def test_an_interrupted_stream_may_go_on(vlm: VLM) -> None:
    gate, waiting = Gate(), threading.Event()
    options: Any = {"max_new_tokens": 8, "eos_token_id": None}
    wanted = vlm.ask(noise(0), "Dogs?", **options).text
    stream = vlm.stream(noise(0), "Dogs?", constraint=gate, **options)

    class Announced:
        """A queue that says when it is waited for."""

        put, get_nowait = (getattr(stream._ticket._events, name) for name in ("put", "get_nowait"))

        def get(self, of: Any = stream._ticket._events) -> Any:
            waiting.set()
            return of.get()

    stream._ticket._events = Announced()  # type: ignore[assignment]

    def interrupt() -> None:
        assert waiting.wait(60)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    gate.open()
    assert stream.answer().text == wanted


# ---- event loops ----


def test_tasks_get_the_answers_of_one_by_one(tiny: VLM) -> None:
    images = [SCENE, noise(1), noise(2)]
    wanted = [tiny.ask(image, "Point to the snail.").text for image in images]
    batch: Any = [(image, "Point to the snail.") for image in images]

    async def streamed(image: Any) -> str:
        pieces = []
        async for item in tiny.stream_async(image, "Point to the snail."):
            pieces.append(item)
        assert isinstance(pieces[-1], Answer)
        assert "".join(p for p in pieces if isinstance(p, str)) == pieces[-1].text
        return pieces[-1].text

    async def main() -> None:
        answers = await asyncio.gather(*(tiny.ask_async(i, "Point to the snail.") for i in images))
        assert [answer.text for answer in answers] == wanted
        assert await asyncio.gather(*map(streamed, images)) == wanted
        answers = await tiny.ask_batch_async(batch)
        assert [answer.text for answer in answers] == wanted
        snail = await tiny.point_async(SCENE, "snail")
        assert snail.points == tiny.point(SCENE, "snail").points != ()
        assert (await tiny.count_async(SCENE, "snails")).count == tiny.count(SCENE, "snails").count
        assert (await tiny.caption_async(SCENE)).text == tiny.caption(SCENE).text
        chat = tiny.chat(SCENE)
        answer = await chat.ask_async("Point to the snail.")
        *_, last = [item async for item in chat.stream_async("How many snails are there?")]
        assert chat.answers == [answer, last] and len(chat.messages) == 4
        with pytest.raises(ValueError, match="the question is empty"):
            await tiny.ask_async(SCENE, " ")

    asyncio.run(main())


@pytest.mark.parametrize("how", ["ask_async", "stream_async", "chat", "ask_batch_async"])
def test_a_cancelled_task_frees_its_row(how: str) -> None:
    vlm, gate = small_vlm(), Gate(free=2)

    async def work() -> None:
        if how == "ask_async":
            await vlm.ask_async(noise(0), "Dogs?", constraint=gate, **LONG)
        elif how == "chat":
            await vlm.chat(noise(0)).ask_async("Dogs?", constraint=gate, **LONG)
        elif how == "stream_async":
            async for _ in vlm.stream_async(noise(0), "Dogs?", constraint=gate, **LONG):
                pass
        else:
            await vlm.ask_batch_async([(noise(0), "Dogs?")], constraint=gate, **LONG)

    async def main() -> None:
        task = asyncio.create_task(work())
        await asyncio.to_thread(gate.reached.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open()

    asyncio.run(main())  # waits for the threads of the loop
    assert ended(vlm) == ({} if how == "ask_batch_async" else {"cancelled": 1})


def test_a_task_that_is_cancelled_while_it_begins_leaves_no_row(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeing, go_on = threading.Event(), threading.Event()
    see = vlm._see

    def slowly(*arguments: Any) -> Any:
        seeing.set()
        assert go_on.wait(60)
        return see(*arguments)

    monkeypatch.setattr(vlm, "_see", slowly)

    async def main() -> None:
        task = asyncio.create_task(vlm.ask_async(noise(0), "Dogs?", **LONG))
        await asyncio.to_thread(seeing.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    asyncio.run(main())
    assert ended(vlm) == {"cancelled": 1}


def test_a_timeout_of_one_piece_loses_nothing(vlm: VLM) -> None:
    gate = Gate()
    options: Any = {"max_new_tokens": 6, "eos_token_id": None}
    wanted = vlm.ask(noise(0), "Dogs?", **options).text
    stream = vlm.stream(noise(0), "Dogs?", constraint=gate, **options)

    async def main() -> str:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.01)
        gate.open()
        return (await stream.answer_async()).text

    assert asyncio.run(main()) == wanted


# ---- points while they are written ----

DOGS = [Point(42, 22.75), Point(128, 24), Point(200, 50)]
SIZE = (200, 50)
TEXTS = {
    "points": format_points(DOGS, "dogs", [SIZE], mode="point_count"),
    "two lists": f"{format_points(DOGS, 'a', [SIZE])} and {format_points(DOGS[:1], 'b', [SIZE])}.",
    "largest": '<points coords="1 1 1000 1000 2 100 000">x</points>',
    "cut off": '<points coords="1 1 210 455 2 640 48',
    "cut off behind a point": '<points coords="1 1 210 455 2 640 480 ',
    "Molmo 1": '<point x="10.5" y="20" alt="dog">dog</point> <points x1="10" y1="2" x2="6" '
    'y2="48.2" alt="dogs">dogs</points>',
    "none": "There are none. A < B, and <point of no return>.",
    "at the end": 'a <points coords="1 1 210 455"',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_each_point_comes_once_and_in_order(text: str) -> None:
    *items, answer = scripted(text).stream(noise(0, *SIZE), "Point to the dogs.", max_new_tokens=99)
    assert isinstance(answer, Answer) and answer.text == text
    assert "".join(item for item in items if isinstance(item, str)) == text
    points = [item for item in items if isinstance(item, Point)]
    assert [(p.x, p.y, p.id) for p in points] == [(p.x, p.y, p.id) for p in answer.points]


def test_a_point_comes_with_the_piece_that_makes_it_sure() -> None:
    text = '<points coords="1 1 210 455 2 640 480">dogs</points>'
    *items, _ = scripted(text).stream(noise(0, *SIZE), "Point to the dogs.")
    written, when = "", []
    for item in items:
        if isinstance(item, str):
            written += item
        else:
            when.append((written, item.x, item.y))
    first, second = when
    assert first[1:] == (42, 22.75) and second[1:] == (128, 24)
    # Behind the space or quote that follows its last number, long before the text ends.
    assert first[0].startswith(text[:27]) and len(first[0]) <= 29
    assert second[0].startswith(text[:39]) and len(second[0]) <= 41


def test_points_of_a_video_come_with_their_times() -> None:
    processor = small_processor()
    points = [Point(10, 20, id=1, time=0.0), Point(30, 40, id=1, time=0.5)]
    text = format_tracks(points, "dog", (64, 64))
    config = replace(processor.config, video=VideoConfig())
    model = ScriptedModel(text)
    vlm = VLM(model, type(processor)(config, processor.tokenizer))
    frames = Video(tuple(np.asarray(noise(n)) for n in range(2)), (0.0, 0.5))
    *items, answer = vlm.stream(None, "Track the dog.", video=frames)
    found = [item for item in items if isinstance(item, Point)]
    assert [(p.time, p.id) for p in found] == [(0.0, 1), (0.5, 1)]
    assert isinstance(answer, Answer)
    assert [(p.x, p.y) for p in found] == [(p.x, p.y) for p in answer.points]
    drawn = answer.draw()
    assert isinstance(drawn, list) and [frame.size for frame in drawn] == [(64, 64)] * 2
    assert "confidence" in answer.to_dict() and answer.to_dict()["video"] == {
        "width": 64,
        "height": 64,
        "frame_times": [0.0, 0.5],
    }


@pytest.fixture(scope="module")
def pointer(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return consistent_pipeline(golden_folder(tmp_path_factory.mktemp("own") / "model"))


@pytest.mark.parametrize("case", ["one", "two"])
def test_points_that_are_selected_come_once_and_in_order(case: str, pointer: VLM) -> None:
    images = [picture(k, (w, h)) for k, (w, h) in enumerate(cases()[case]["picture_sizes"])]
    options: Any = {"max_new_tokens": 60, "eos_token_id": None}
    *items, answer = pointer.stream(images, "Point to the cups.", **options)
    assert isinstance(answer, Answer) and len(answer.points) > 3
    points = [item for item in items if isinstance(item, Point)]
    places = [(p.image, p.id, p.x, p.y) for p in points]
    assert places == [(p.image, p.id, p.x, p.y) for p in answer.points]
    assert "".join(item for item in items if isinstance(item, str)) == answer.text
    before_the_end = [type(item) for item in items[:-3]]
    assert before_the_end.count(Point) >= 2  # not all of them at the end


# ---- how sure the model was ----


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "seed": 3},
        {"repetition_penalty": 1.5, "logit_bias": {300: 2.0}},
        {"lookup": False, "logprobs": 2},
    ],
    ids=["greedy", "drawn", "changed logits", "plain"],
)
def test_confidence_is_the_geometric_mean_of_the_models_own_probabilities(
    options: Any, vlm: VLM
) -> None:
    """Softmax of the logits of one plain forward pass, whatever the settings chose from."""
    question = "Point to the dog."
    answer = vlm.ask(noise(0), question, max_new_tokens=9, eos_token_id=None, **options)
    assert len(answer.token_ids) == answer.output_tokens == 9
    encoded = vlm.processor.encode([{"role": "user", "content": question}], [noise(0)])
    batch = collate([encoded], vlm.processor.pad_token_id)
    ids = torch.cat([batch.input_ids, torch.tensor([answer.token_ids])], dim=1)
    with torch.no_grad():
        logits = vlm.model(ids, batch.pixel_values)[0].double()
    chances = [
        float(torch.exp(row[id]) / torch.exp(row).sum())
        for row, id in zip(logits[-10:-1], answer.token_ids, strict=True)
    ]
    assert answer.confidence == pytest.approx(math.prod(chances) ** (1 / 9), rel=1e-4)
    assert 0 < answer.confidence < 0.5


def test_confidence_counts_every_part_of_a_point(pointer: VLM) -> None:
    """Against the log-probabilities, which are held against the reference's logits elsewhere."""
    options: Any = {"max_new_tokens": 40, "eos_token_id": None}
    shot = picture(0, (150, 100))
    answer = pointer.ask(shot, "Point to the cups.", **options)
    known = pointer.ask(shot, "Point to the cups.", logprobs=0, **options)
    assert answer.points and answer.text == known.text
    logprobs = [one.logprob for one in known.logprobs]
    assert len(logprobs) == 40
    mean = math.exp(sum(one for one in logprobs if one is not None) / 40)
    assert answer.confidence == pytest.approx(mean, rel=1e-4)
    assert known.confidence == pytest.approx(mean, rel=1e-4)


def test_an_empty_answer_is_sure(vlm: VLM) -> None:
    answer = vlm.ask(noise(0), "Dogs?", max_new_tokens=0)
    assert (answer.text, answer.confidence, answer.token_ids) == ("", 1.0, ())


def test_usage_counts_visual_tokens_and_what_was_known(vlm: VLM) -> None:
    answer = vlm.ask(noise(0), "Dogs?", max_new_tokens=5, eos_token_id=None)
    encoded = vlm.processor.encode([{"role": "user", "content": "Dogs?"}], [noise(0)])
    length = len(encoded.input_ids)  # with 4 tokens of the image
    assert answer.usage == (length, 5, 0)
    assert answer.usage.total_tokens == length + 5
    again = vlm.ask(noise(0), "Dogs?", max_new_tokens=5, eos_token_id=None)
    assert again.usage == (length, 5, length - 1)  # the last position is always computed


# ---- many questions ----


def test_a_batch_takes_questions_in_all_forms(tiny: VLM) -> None:
    questions: list[Any] = [
        (SCENE, "Point to the snail."),
        {"images": [SCENE], "question": "Describe this picture.", "max_new_tokens": 3},
        Question("How many snails are there?", SCENE),
        [noise(0), [{"role": "user", "content": "Describe this picture."}]],
        {"image": SCENE, "prompt": "Point to the snail."},
        {"image": noise(0), "messages": [{"role": "user", "content": "Describe this picture."}]},
    ]
    answers = tiny.ask_batch(questions, batch_size=3, max_new_tokens=20)
    wanted = [
        tiny.ask(SCENE, "Point to the snail.", max_new_tokens=20),
        tiny.ask(SCENE, "Describe this picture.", max_new_tokens=3),
        tiny.ask(SCENE, "How many snails are there?", max_new_tokens=20),
        tiny.ask(noise(0), "Describe this picture.", max_new_tokens=20),
    ]
    wanted += [wanted[0], wanted[3]]
    assert [answer.text for answer in answers] == [answer.text for answer in wanted]
    assert answers[1].finish_reason == "length"
    assert tiny.ask_batch([]) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ((SCENE, ""), "question 2 of 3: the question is empty"),
        ((ROOT / "missing.png", "Dogs?"), r"question 2: there is no file .*missing\.png"),
        ("Dogs?", "question 2 is a str: expected a pair"),
        ((SCENE, "Dogs?", "Cats?"), "question 2 is a tuple: expected a pair"),
        ({"images": SCENE}, "question 2 has the fields images: expected question, images, video"),
        ({"question": "?", "picture": SCENE}, "question 2 has the fields question, picture"),
        ({"question": "?", "prompt": "!"}, "question 2 has the fields question, prompt"),
    ],
)
def test_a_batch_names_the_question_that_is_refused(wrong: Any, message: str, tiny: VLM) -> None:
    good = (SCENE, "Point to the snail.")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        tiny.ask_batch([good, wrong, good], max_new_tokens=4)


def test_one_question_is_no_batch_and_a_mapping_no_options(tiny: VLM) -> None:
    for one in ("Dogs?", {"images": SCENE, "question": "Dogs?"}, Question("Dogs?", SCENE)):
        with pytest.raises(ValueError, match="expected a list of questions, found a single"):
            tiny.ask_batch(one)  # type: ignore[arg-type]
    options: Any = {"max_new_tokens": 4}
    for ask in (tiny.ask, tiny.stream, lambda *_, **given: tiny.ask_batch([], **given)):
        with pytest.raises(ValueError, match="options must be GenerateOptions, found dict"):
            ask(SCENE, "Dogs?", options=options)


def test_what_is_meant_by_point_count_and_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    vlm = scripted(*["5"] * 9)
    ask = vlm.stream

    def recorded(images: Any, question: Any, **options: Any) -> Any:
        asked.append(question)
        return ask(images, question, **options)

    monkeypatch.setattr(vlm, "stream", recorded)
    for label in ("cups", " the cups. ", "a red cup", "the"):
        vlm.point(noise(0), label)
    assert vlm.count(noise(0), "cups", max_new_tokens=9).count == 5
    assert vlm.caption(noise(0)).text == "5"
    assert asked == [
        *("Point to the cups.", "Point to the cups.", "Point to the red cup.", "Point to the the."),
        *("How many cups are there?", "Describe this picture."),
    ]
    for nothing in ("", " ", "?", None, 3):
        with pytest.raises(ValueError, match="the name of the things is empty"):
            vlm.point(noise(0), nothing)  # type: ignore[arg-type]
    assert len(asked) == 6


def test_tiny_points_counts_and_describes(tiny: VLM) -> None:
    snail = tiny.point(SCENE, "snail")
    assert [point.label for point in snail.points] == ["snail"]
    assert tiny.count(SCENE, "snails").count == 1
    assert tiny.caption(SCENE).text


# ---- what stays behind ----


def test_a_model_that_nobody_holds_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler's thread ends when it had nothing to do for a while, and holds nothing."""
    monkeypatch.setattr(scheduler, "LINGER_SECONDS", 0.01)
    vlm = small_vlm()
    answer = vlm.ask(noise(0), "Dogs?", max_new_tokens=3)
    left = vlm.stream(noise(0), "Dogs?", **LONG)
    next(left)
    thread = vlm.scheduler._thread
    assert thread is not None
    gone = weakref.ref(vlm.model)
    del vlm, left
    thread.join(60)
    assert not thread.is_alive()
    gc.collect()
    assert gone() is None
    drawn = answer.draw()  # needs the picture alone
    assert not isinstance(drawn, list) and drawn.size == (64, 64)


def test_a_thread_that_ended_is_followed_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "LINGER_SECONDS", 0.01)
    vlm = small_vlm()
    for _ in range(2):
        vlm.ask(noise(0), "Dogs?", max_new_tokens=3)
        thread = vlm.scheduler._thread
        if thread is not None:
            thread.join(60)
        assert vlm.scheduler._thread is None
    assert vlm.scheduler.stats.requests.keys() <= {"length", "stop"}


def test_a_mistake_in_the_thread_reaches_every_waiting_question(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = vlm.stream(noise(0), "Dogs?", **LONG)
    next(stream)
    with monkeypatch.context() as patched:
        patched.setattr(vlm.scheduler, "_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(stream)
    assert vlm.ask(noise(0), "Dogs?", max_new_tokens=2, eos_token_id=None).output_tokens == 2


EXIT = """
import asyncio, threading
from tests.generation.test_vlm import LONG, noise, small_vlm
vlm = small_vlm()
streams = [vlm.stream(noise(0), "Dogs?", **LONG) for _ in range(3)]
async def first():
    return await anext(streams[0])
asyncio.run(first())
next(streams[1])
threading.Thread(target=list, args=(streams[2],), daemon=True).start()
print("end")
"""


def test_the_interpreter_may_end_while_answers_are_written() -> None:
    """Iterated, in an event loop, and in a thread that still waits; nothing is said about it."""
    done = subprocess.run(
        [sys.executable, "-c", EXIT],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "end", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_answers_too(vlm: VLM) -> None:
    """Threads are not there in it, nor is what they were writing."""
    gate = Gate()
    wanted = vlm.ask(noise(0), "Dogs?", max_new_tokens=4).text
    running = vlm.stream(noise(1), "Cats?", constraint=gate, **LONG)
    assert gate.reached.wait(60)
    receives, sends = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child = os.fork()
    if not child:
        try:
            os.write(sends, vlm.ask(noise(0), "Dogs?", max_new_tokens=4).text.encode())
        finally:
            os._exit(0)
    gate.open()
    os.close(sends)
    with open(receives, "rb") as stream:
        assert stream.read().decode() == wanted
    os.waitpid(child, 0)
    running.close()


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "copy"])
def test_copies_answer_too(how: str, vlm: VLM) -> None:
    wanted = vlm.ask(noise(0), "Dogs?", max_new_tokens=4)
    make: Any = {
        "pickle": lambda one: pickle.loads(pickle.dumps(one)),
        "deepcopy": copy.deepcopy,
        "copy": copy.copy,
    }[how]
    twin = make(vlm)
    assert twin.ask(noise(0), "Dogs?", max_new_tokens=4).text == wanted.text
    assert (twin.scheduler is vlm.scheduler) == (how == "copy")
    again = make(wanted)
    assert again == wanted and again.draw().tobytes() == wanted.draw().tobytes()
    twin.close()
