"""Words that were taught by examples: their files, which questions are about them, the answers."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nanomolmo2.checks import with_digest
from nanomolmo2.emoji import wordings as emoji_wordings
from nanomolmo2.generation import taught
from nanomolmo2.generation.answer import Answer, Shown
from nanomolmo2.generation.pipeline import Pipeline, Question
from nanomolmo2.generation.taught import messages_about, task_of
from nanomolmo2.generation.words import (
    Sample,
    Word,
    Words,
    checked_name,
    picture_name,
    read_words,
    words_of,
)
from nanomolmo2.processor import Point
from nanomolmo2.things import wordings as thing_wordings
from tests.small_model import ScriptedModel, small_processor

SIZE = (100, 50)


def picture(colour: str, size: tuple[int, int] = SIZE) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


RED, BLUE = picture("red"), picture("blue", (60, 40))
FILES = {picture_name(data, ".png"): data for data in (RED, BLUE)}
RED_FILE, BLUE_FILE = FILES
WALNUT = Word("walnut", "walnuts", (Sample(RED_FILE, 10, 20),))
HEX_NUT = Word("hex nut", "hex nuts", (Sample(RED_FILE, 30, 40), Sample(BLUE_FILE, 5, 6)))


def words(*taught: Word, others: tuple[str, ...] = ("dog", "dogs")) -> Words:
    made = Words({}, {}, others)
    for word in taught:
        made = made.with_word(word, FILES)
    return made


def found(points: Sequence[tuple[float, float, float]], size: tuple[int, int] = SIZE) -> Answer:
    """An answer of `VLM.find` with points (x, y, confidence)."""
    given = [Point(x, y, 2, i, "thing", None, c) for i, (x, y, c) in enumerate(points, start=1)]
    return Answer(
        text="...",
        points=tuple(given),
        count=len(given),
        problems=(),
        image_sizes=((60, 40), size),
        video_size=None,
        frame_times=(),
        input_tokens=7,
        output_tokens=0,
        timings={"prepare": 0.5, "generate": 1.0},
        show=lambda: Shown(["reference", "asked"]),
    )


class Finds:
    """Stands for `VLM.find`: gives answers in turn, and keeps what it was asked."""

    def __init__(self, *answers: Answer) -> None:
        self.answers, self.calls = list(answers), list[dict[str, Any]]()

    def __call__(self, image: Any, **asked: Any) -> Answer:
        self.calls.append({"image": image, **asked})
        return self.answers.pop(0)


def vlm_of(words: Words, finds: Finds, *texts: str) -> Pipeline:
    model = ScriptedModel(*texts)
    vlm = Pipeline(model, model.processor)
    vlm.words = words
    vlm.find = finds  # type: ignore[method-assign]
    return vlm


PHOTO = Image.new("RGB", SIZE, "green")


# ---- which question ----


@pytest.mark.parametrize("task", ["count", "number", "point", "presence"])
def test_all_wordings_that_the_model_learned_are_told_apart(task: str) -> None:
    for wording in emoji_wordings.QUESTIONS[task]:  # type: ignore[index]
        asked = wording.format(a="a walnut", one="walnut", many="walnuts")
        for text in (asked, asked[0].lower() + asked[1:].rstrip("?.")):
            assert task_of(words(WALNUT).rest(text)) == task, text


def test_wordings_by_name_are_told_apart() -> None:
    for name, task in (("named", "point"), ("count_named", "count")):
        for wording in thing_wordings.QUESTIONS[name]:  # type: ignore[index]
            asked = wording.format(one="walnut", many="walnuts", place="")
            assert task_of(words(WALNUT).rest(asked)) == task, asked


@pytest.mark.parametrize("task", ["spatial", "size", "more", "difference", "track", "appears"])
def test_what_compares_or_places_things_is_left_to_the_model(task: str) -> None:
    for wording in emoji_wordings.QUESTIONS[task]:  # type: ignore[index]
        slots = {"a": "a walnut", "one": "walnut", "many": "walnuts", "other": "dog"}
        slots |= {"where": "left of the", "order": "larger", "most": "largest", "at": "1 2"}
        asked = wording.format(more="more", which="the first", **slots)
        assert task_of(words(WALNUT).rest(asked)) is None, asked


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("Locate each walnut in the photo.", "point"),
        ("What are the coordinates of all walnuts?", "point"),
        ("Give me the positions of the walnuts.", "point"),
        ("How many walnuts are on the table?", "count"),
        ("Give the number of walnuts, please.", "count"),
        ("Can you count the walnuts?", "count"),
        ("Does this image contain a walnut?", "presence"),
    ],
)
def test_other_wordings(text: str, task: str) -> None:
    assert task_of(words(WALNUT).rest(text)) == task


@pytest.mark.parametrize(
    "text",
    [
        "Are the walnuts rusty?",
        "How many red walnuts are there?",
        "How many walnuts are red?",
        "How many things are not walnuts?",
        "Point to everything except the walnuts.",
        "Is there no walnut?",
        "Are walnuts made of wood?",
        "Where do walnuts come from?",
        "How many walnuts are left of the dog?",
        "Wie viele walnuts sind da?",
    ],
)
def test_what_asks_for_more_than_the_things_is_left_to_the_model(text: str) -> None:
    known = words(WALNUT)
    assert known.mentioned(text)[0] and task_of(known.rest(text)) is None


def test_words_are_found_as_whole_words_the_longest_first() -> None:
    nut = Word("nut", "nuts", WALNUT.samples)
    known = words(WALNUT, HEX_NUT, nut)

    def names(text: str) -> tuple[list[str], list[str]]:
        mentioned, others = known.mentioned(text)
        return [word.name for word in mentioned], others

    assert names("How many Hex  Nuts are there?") == (["hex nut"], [])
    assert names("Point to the nuts and the WALNUT, and the nut.") == (["nut", "walnut"], [])
    assert names("Is there a doughnut or a walnutty dog?") == ([], ["dog"])
    screws = words(Word("screws", "screws", WALNUT.samples))
    assert [w.name for w in screws.mentioned("Where is the screw?")[0]] == ["screws"]
    accented = words(Word("n\u00f6sschen", "n\u00f6sschen", WALNUT.samples))
    assert accented.mentioned("How many No\u0308sschen are there?")[0]  # the accent apart


# ---- answers ----


def test_a_count_says_what_find_found_in_the_words_of_the_model() -> None:
    finds = Finds(found([(10.4, 5, 0.9), (50, 25, 0.5), (90, 40, 0.49)]))
    vlm = vlm_of(words(WALNUT), finds)
    answer = vlm.ask(PHOTO, "How many walnuts are there?")
    assert answer.text == (
        'Counting the <points coords="1 1 104 100 2 500 500">walnut</points> shows a total of 2.'
    )
    assert (answer.count, answer.image_sizes) == (2, (SIZE,))
    first, second = answer.points
    assert (first.x, first.image, first.id, first.label) == (10.4, 1, 1, "walnut")
    assert (second.confidence, second.id) == (0.5, 2)
    assert answer.show is not None
    (shown,) = answer.show().images
    assert shown.size == SIZE and shown.tobytes() == PHOTO.tobytes()
    (call,) = finds.calls
    assert call["like"] == [(10, 20)] and not call["unlike"] and call["min_confidence"] == 0.5
    assert call["reference"].size == SIZE and call["reference"].getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("question", "text", "count"),
    [
        ("Point to the walnut.", '<points coords="1 1 100 100">walnut</points>', None),
        ("How many walnuts are there? Answer with a number.", "1", 1),
        ("Is there a walnut?", "Yes.", None),
    ],
)
def test_other_questions_about_a_word(question: str, text: str, count: int | None) -> None:
    answer = vlm_of(words(WALNUT), Finds(found([(10, 5, 0.9)]))).ask(PHOTO, question)
    assert (answer.text, answer.count) == (text, count)


@pytest.mark.parametrize(
    ("question", "text"),
    [
        ("Where is the walnut?", "There are none."),
        ("Count the walnuts.", "There are none."),
        ("Do you see any walnuts?", "No."),
        ("How many walnuts are there? Just the number.", "0"),
    ],
)
def test_nothing_is_found(question: str, text: str) -> None:
    answer = vlm_of(words(WALNUT), Finds(found([]))).ask(PHOTO, question)
    assert (answer.text, answer.points) == (text, ())
    assert answer.count == (None if text == "No." else 0)


def test_two_words_in_one_question_and_a_noun_of_the_model() -> None:
    finds = Finds(found([(10, 5, 0.9)]), found([]), found([]))
    vlm = vlm_of(words(WALNUT, HEX_NUT), finds)
    answer = vlm.ask(PHOTO, "Point to the walnut, the hex nut and the dog.")
    assert answer.text == '<points coords="1 1 100 100">walnut</points>'
    assert answer.problems == ("the answer is about walnut and hex nut alone: ask about dog apart",)
    walnut, red, blue = finds.calls
    # What another word was shown by, in the same picture, is a counter-example.
    assert (walnut["like"], walnut["unlike"]) == ([(10, 20)], [(30, 40)])
    assert (red["like"], red["unlike"]) == ([(30, 40)], [(10, 20)])
    assert (blue["like"], blue["unlike"], blue["min_confidence"]) == ([(5, 6)], [], 0.05)


def test_several_pictures_of_samples_agree_about_each_thing() -> None:
    first = found([(10, 10, 0.9), (50, 10, 0.6), (90, 10, 0.2)])
    second = found([(11, 10, 0.7), (89, 10, 0.8), (30, 40, 0.9)])
    answer = vlm_of(words(HEX_NUT), Finds(first, second)).ask(PHOTO, "Point to the hex nuts.")
    # (.9 + .7) / 2, (.2 + .8) / 2; of one search alone .6 / 2 and .9 / 2 are not sure.
    assert [(p.x, p.confidence) for p in answer.points] == [(10, 0.8), (89, 0.5)]


def test_all_else_is_answered_by_the_model() -> None:
    vlm = vlm_of(words(WALNUT), Finds(), "A dog.", "Yes.", "2", "No.")
    assert vlm.ask(PHOTO, "Describe this picture.").text == "A dog."
    assert vlm.ask(PHOTO, "What is left of the walnut?").text == "Yes."
    with pytest.warns(
        UserWarning, match="walnut, a word that was taught, which is found in one image"
    ):
        assert vlm.ask([PHOTO, PHOTO], "How many walnuts are there?").text == "2"
    content: Any = [{"type": "text", "text": "Tell me about"}, {"type": "text", "text": "walnuts"}]
    assert vlm.ask(PHOTO, [{"role": "user", "content": content}]).text == "No."


def test_every_way_of_asking_knows_the_words() -> None:
    answers = [found([(10, 5, 0.9)]) for _ in range(6)]
    vlm = vlm_of(words(WALNUT), Finds(*answers), "A dog.")
    question = "How many walnuts are there?"
    pieces = list(vlm.stream(PHOTO, question))
    assert isinstance(pieces[-1], Answer) and pieces[0] == pieces[-1].text
    assert pieces[1:-1] == list(pieces[-1].points)
    said: list[str] = []
    assert vlm.ask(PHOTO, question, on_text=said.append).text == said[0]
    assert asyncio.run(vlm.ask_async(PHOTO, question)).count == 1
    chat = vlm.chat(PHOTO)
    assert chat.ask(question).count == 1 and len(chat.messages) == 2
    batch = vlm.ask_batch([(PHOTO, question), (PHOTO, "Describe this picture.")])
    assert [answer.count for answer in batch] == [1, None] and batch[1].text == "A dog."
    (only,) = vlm.ask_many([Question(question, PHOTO)])
    assert isinstance(only, Answer) and only.count == 1
    stream = vlm.stream(PHOTO, question) if vlm.find.answers else None  # type: ignore[attr-defined]
    assert stream is None


def test_a_stream_that_was_said_can_be_left_and_forgets_its_images() -> None:
    vlm = vlm_of(words(WALNUT), Finds(found([(10, 5, 0.9)]), found([])))
    stream = vlm.stream(PHOTO, "Point to the walnut.")
    assert stream.encoded.image_sizes == (SIZE,)
    stream.forget_images()
    assert stream.answer().show is None
    left = vlm.stream(PHOTO, "Point to the walnut.")
    left.cancel()
    assert list(left) == []


def test_the_asked_picture_needs_no_reference() -> None:
    finds = Finds(found([]))
    vlm_of(words(WALNUT), finds).ask(Image.new("RGB", SIZE, "red"), "Point to the walnut.")
    assert finds.calls[0]["reference"] is None


def test_the_model_can_be_told_in_place_of_finding() -> None:
    told = dataclasses.replace(words(WALNUT), way="prompt")
    said = '<points coords="2 1 100 200">walnut</points>'
    vlm = vlm_of(told, Finds(), said)
    vlm.processor = vlm.processor.with_settings(image_tokens=4)
    answer = vlm.ask(PHOTO, "Point to the walnuts.")
    assert answer.text == '<points coords="1 1 100 200">walnut</points>'
    assert [(p.x, p.y, p.image) for p in answer.points] == [(10, 10, 1)]
    assert answer.image_sizes == (SIZE,)
    samples = [Sample(RED_FILE, 1, 2), Sample(RED_FILE, 3, 4), Sample(RED_FILE, 5, 6)]
    shown = told.pictures[RED_FILE]
    first, second, third = messages_about(WALNUT, samples, shown, PHOTO, "Count the walnuts")
    texts = [part.get("text", part["type"]) for part in first["content"]]  # type: ignore[union-attr]
    assert texts == (
        ["image", "image", "This ", "point", ", ", "point", " and ", "point", " is a walnut."]
    )
    assert second["content"] == "A walnut."
    assert third["content"] == "Count the walnuts in the second picture?"


# ---- files ----


def test_words_come_back_from_their_folder(tmp_path: Path) -> None:
    saved = words(WALNUT, HEX_NUT)
    saved.save(tmp_path)
    again = read_words(tmp_path)
    assert again.words == saved.words and again.files == FILES and again.others == saved.others
    assert again.way == taught.Words({}, {}).way == "find"
    assert words_of(str(tmp_path)) is not None and words_of("tiny") is None
    assert words_of(tmp_path / "nothing") is None and words_of(ScriptedModel()) is None
    assert again.knows("WALNUTS") == "walnut" and again.knows("nut") is None


def test_a_word_in_place_of_another_takes_its_pictures_along() -> None:
    known = words(WALNUT, HEX_NUT)
    other = Word("Hex Nuts", "Hex Nuts", (Sample(RED_FILE, 1, 1),))
    replaced = known.with_word(other, {})
    assert list(replaced.words) == ["walnut", "Hex Nuts"] and list(replaced.files) == [RED_FILE]


def spoil(folder: Path, **changes: Any) -> None:
    path = folder / "words.json"
    values = json.loads(path.read_text())
    values.pop("digest")
    path.write_text(json.dumps(with_digest({**values, **changes})))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"way": "magic"}, "its way is 'magic', expected one of find, prompt"),
        ({"words": [{"name": "a@b", "plural": "x", "samples": [[RED_FILE, 1, 2]]}]}, "the name is"),
        ({"words": [{"name": "nut", "plural": "x", "samples": []}]}, "a word has no sample"),
        ({"words": 7}, "its fields are others"),
        ({"words": [{"name": "n", "plural": "x", "samples": [["a.png", 1, 2]]}]}, "without digest"),
        ({"pictures": {"../../etc/passwd": "0"}}, "is no name of a picture of a word"),
        ({"pictures": {RED_FILE: "0"}}, "is not as it was written"),
        ({"others": [1]}, "its fields are others"),
    ],
)
def test_a_file_that_is_not_as_it_was_written_is_refused(
    tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    words(WALNUT).save(tmp_path)
    spoil(tmp_path, **changes)
    with pytest.raises(ValueError, match="cannot be read") as error:
        read_words(tmp_path)
    assert problem in str(error.value) and "\n" not in str(error.value)


def test_damage_is_told(tmp_path: Path) -> None:
    words(WALNUT).save(tmp_path)
    path = tmp_path / "words.json"
    path.write_text(path.read_text().replace("walnuts", "walmuts"))
    with pytest.raises(ValueError, match="its values are not as they were written"):
        read_words(tmp_path)
    words(WALNUT).save(tmp_path)
    (tmp_path / RED_FILE).unlink()
    with pytest.raises(ValueError, match="No such file"):
        read_words(tmp_path)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (" hex   nut ", "hex nut"),
        ("cafe\u0301", "caf\u00e9"),
        ("\u0905\u0916\u0930\u094b\u091f", "\u0905\u0916\u0930\u094b\u091f"),  # with vowel signs
        ("jack-o'-lantern", "jack-o'-lantern"),
        ("\u6838\u6843", "\u6838\u6843"),
    ],
)
def test_names_in_any_letters(given: str, name: str) -> None:
    assert checked_name(given) == name


@pytest.mark.parametrize("given", ["", " ", "nut7", "a<b", "x" * 65, "nut.jpg@1,2", "\x1b[31m"])
def test_what_is_no_name_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="expected one or several words of letters"):
        checked_name(given)


def test_pictures_are_named_by_their_bytes() -> None:
    assert picture_name(RED, ".PNG") == picture_name(RED, "png") != picture_name(BLUE, "png")
    assert picture_name(RED, ".a/b").endswith(".png")
    assert np.asarray(words(WALNUT).pictures[RED_FILE]).shape == (50, 100, 3)
    assert small_processor().config.trained_on == ()
