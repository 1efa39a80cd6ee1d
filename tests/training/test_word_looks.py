"""Nouns of annotated pictures, learned by the finder of a model that writes coordinates."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanomolmo2 import cli
from nanomolmo2.convert.pretrained import find_directory
from nanomolmo2.data.sources import RecordSource, SourceConfig, open_source
from nanomolmo2.evaluation.scorers import point_f1
from nanomolmo2.generation.find import find_words
from nanomolmo2.generation.pipeline import Pipeline
from nanomolmo2.generation.words import read_words
from nanomolmo2.models import preset
from nanomolmo2.processor import load_image
from nanomolmo2.recipes import finetune
from nanomolmo2.training import word_looks
from nanomolmo2.training.recipe import ValidationConfig
from nanomolmo2.training.split import open_split
from nanomolmo2.training.word_looks import learn_looks, learns_words, read_places, take_words
from tests.photos import draw_photos

PHOTOS = 16
NUMBER = 6  # of these are kept back


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of nuts in ``photos``."""
    made = tmp_path_factory.mktemp("nuts")
    draw_photos(made / "photos", PHOTOS)
    return made


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, ...]]]:
    return draw_photos(tmp_path_factory.mktemp("again") / "photos", PHOTOS)


def middles(found: list[tuple[int, ...]]) -> list[dict[str, float]]:
    return [{"x": (a + c) / 2, "y": (b + d) / 2} for a, b, c, d in found]


def records(boxes: dict[str, list[tuple[int, ...]]]) -> list[dict[str, Any]]:
    """Two questions about each photo."""
    lines: list[dict[str, Any]] = []
    for name, found in boxes.items():
        one = {"image": f"photos/{name}", "points": middles(found), "label": "hex nut"}
        lines.append({**one, "question": "Point to the hex nuts.", "task": "point"})
        lines.append({**one, "question": "How many hex nuts are there?", "mode": "point_count"})
    return lines


def source(folder: Path, lines: list[dict[str, Any]], name: str = "my.jsonl") -> RecordSource:
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    opened = open_source(SourceConfig(str(path)))
    assert isinstance(opened, RecordSource)
    return opened


def test_nouns_are_read_off_the_answers(
    folder: Path, boxes: dict[str, list[tuple[int, ...]]]
) -> None:
    lines = records(boxes)
    none = {"image": "photos/00.png", "answer": "There are none."}
    lines += [
        {**none, "question": "Is there a hex nut?", "answer": "Yes."},
        {**none, "question": "What is this?", "answer": "A table."},
    ]
    found = read_places([source(folder, lines)])
    assert [(word.name, word.plural, word.look) for word in found.words] == [
        ("hex nut", "hex nuts", None)
    ]
    assert found.others == 1  # "What is this?": the question about presence is found, too
    assert len(found.pictures) == PHOTOS  # of one with two records, both
    by_picture: dict[str, list[tuple[float, float]]] = {}
    for places in found.pictures:
        assert isinstance(places.source, RecordSource)
        image = str(places.source.rows[places.number].values["image"])
        by_picture[image] = places.things["hex nut"]
    (place,), (point,) = by_picture["photos/00.png"], middles(boxes["00.png"])
    assert place == pytest.approx((point["x"], point["y"]), abs=0.5)


def test_few_things_words_that_are_known_and_phrases_are_left_to_the_model(
    folder: Path, boxes: dict[str, list[tuple[int, ...]]]
) -> None:
    lines = records(boxes)
    few = read_places([source(folder, lines[:4], "few.jsonl")])
    assert few.words == []
    assert few.left == ["'hex nut' is not learned: 3 things in 2 pictures, and 8 in 6 are needed"]
    known = read_places([source(folder, lines)], {"hex nut"})
    assert (known.words, known.left) == ([], ["'hex nut' is not learned: the model knew it before"])
    left = [
        {**line, "question": "Point to the hex nut left of the others."}
        for line in lines
        if line["question"].startswith("Point")
    ]
    assert read_places([source(folder, left, "left.jsonl")]).words == []
    named = [{**line, "label": "nut (M4)"} for line in lines]
    it = [{**line, "label": "point", "question": "Point to it."} for line in lines]
    for odd, said in (
        (named, "'nut (M4)' is not learned: it is no word of letters"),
        (it, "'point' is not learned: no name of a thing"),
    ):
        found = read_places([source(folder, odd)])
        assert (found.words, found.left) == ([], [said])


@pytest.mark.parametrize(
    ("label", "every", "name"),
    [
        (None, 1, "hex nuts"),  # as the questions say
        ("hex nuts", 2, "hex nut"),  # one word with its plural
    ],
)
def test_labels_that_are_left_out_or_in_the_plural(
    folder: Path,
    boxes: dict[str, list[tuple[int, ...]]],
    label: str | None,
    every: int,
    name: str,
) -> None:
    lines = records(boxes)
    for line in lines[::every]:
        del line["label"]
        line |= {} if label is None else {"label": label}
    found = read_places([source(folder, lines)])
    assert [(word.name, word.plural) for word in found.words] == [(name, "hex nuts")]
    assert len(found.pictures) == PHOTOS and found.others == 0


def test_records_that_do_not_open_are_told(
    folder: Path, boxes: dict[str, list[tuple[int, ...]]]
) -> None:
    lines = records(boxes)
    lines[0] = {**lines[0], "image": "photos/none.png"}
    found = read_places([source(folder, lines)])
    assert found.words and found.left == ["1 records are left out (missing picture)"]


def test_questions_about_more_than_the_things_are_others(
    folder: Path, boxes: dict[str, list[tuple[int, ...]]]
) -> None:
    asked = [
        {"image": "photos/00.png", "question": "Are the hex nuts rusty?", "answer": "No."},
        {"image": "photos/00.png", "question": "Is there a rusty hex nut?", "answer": "No."},
        {"image": "photos/00.png", "question": "How many hex nuts are not there?", "answer": "0"},
    ]
    found = read_places([source(folder, [*records(boxes), *asked])])
    assert found.words and found.others == len(asked)


def test_no_file_starves_another(
    folder: Path, boxes: dict[str, list[tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(word_looks, "MOST_PICTURES", 12)
    names, washers = sorted(boxes), {}
    first = source(folder, records({name: boxes[name] for name in names[:8]}), "a.jsonl")
    washers = {name: boxes[name] for name in names[8:]}
    second = [
        {**line, "label": "washer", "question": line["question"].replace("hex nut", "washer")}
        for line in records(washers)
    ]
    found = read_places([first, source(folder, second, "b.jsonl")])
    assert {word.name for word in found.words} == {"hex nut", "washer"}
    assert len(found.pictures) == 12


def test_answers_that_contradict_each_other_are_not_learned_from(
    folder: Path, boxes: dict[str, list[tuple[int, ...]]]
) -> None:
    lines = records(boxes)
    lines[2] = {**lines[2], "points": []}  # of photo 1, which has two
    found = read_places([source(folder, lines, "both.jsonl")])
    assert found.words and len(found.pictures) == PHOTOS - 1


def test_a_noun_is_found_in_photos_that_were_not_learned_from(
    folder: Path, boxes: dict[str, list[tuple[int, ...]]]
) -> None:
    vlm = Pipeline.from_pretrained("tiny", dtype=torch.float32, device="cpu")
    names = sorted(boxes)
    learned = source(folder, records({name: boxes[name] for name in names[:-NUMBER]}))
    nouns = read_places([learned])
    encoder = {name: x.clone() for name, x in vlm.model.vision_encoder.state_dict().items()}
    (word,) = learn_looks(vlm.model, vlm.processor, nouns.words, nouns.pictures)
    assert all(torch.equal(x, encoder[n]) for n, x in vlm.model.vision_encoder.state_dict().items())
    assert word.name == "hex nut" and word.look is not None
    assert len(word.look.patch) == len(word.look.token) == preset("tiny").finder_dim
    marks = []
    for name in names[-NUMBER:]:
        image = load_image(folder / "photos" / name)
        (answer,) = find_words(
            vlm.model, vlm.processor, image, [word.look], seeing=vlm.scheduler.seeing
        )
        marks.append(point_f1([(p.x, p.y) for p in answer.points], boxes[name]))
    assert sum(marks) / len(marks) > 0.85
    with pytest.raises(ValueError, match="learned as 3 numbers, and this model knows looks of 64"):
        other = word.look._replace(patch=(1.0, 0.0, 0.0))
        find_words(vlm.model, vlm.processor, image, [other], seeing=vlm.scheduler.seeing)


# ---- in a run ----


def test_which_runs_learn_words(folder: Path) -> None:
    recipe = finetune([str(folder / "my.jsonl")], "tiny")
    assert recipe.find_weight == 1.0 and learns_words(recipe, preset("tiny"))
    assert not learns_words(replace(recipe, find_weight=0.0), preset("tiny"))
    assert not learns_words(recipe, preset("tiny-find"))  # it learns them with all else
    assert not learns_words(recipe, replace(preset("tiny"), finder_dim=None))


def copy_of_tiny(folder: Path) -> Path:
    shutil.copytree(find_directory("tiny"), folder)
    return folder


def test_words_are_taken_where_they_are_better(
    folder: Path,
    boxes: dict[str, list[tuple[int, ...]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(word_looks, "STEPS", 40)
    path = source(folder, records(boxes)).rows  # writes the file
    assert len(path) == 2 * PHOTOS
    recipe = finetune([str(folder / "my.jsonl")], "tiny")
    recipe = replace(recipe, validation=ValidationConfig(share=0.25))
    split, said = open_split(recipe), list[str]()
    model = copy_of_tiny(tmp_path / "model")
    found = take_words(model, split, torch.float32, said.append)
    assert found is not None and found.others == 0 and len(found.pictures) == 12
    assert "hex nut: found by their looks now; mean score" in said[-1]
    assert set(read_words(model).words) == {"hex nut"}
    vlm = Pipeline.from_pretrained(model)
    answer = vlm.ask(folder / "photos" / "00.png", "How many hex nuts are there?")
    assert answer.count == len(answer.points) and all(p.confidence for p in answer.points)
    assert answer.points[0].label == "hex nut"
    # What the language model knows it still says itself.
    tiny = Pipeline.from_pretrained("tiny")
    question = "How many dogs are there?"
    photo = folder / "photos" / "00.png"
    assert vlm.ask(photo, question).text == tiny.ask(photo, question).text

    scores = iter([0.9, 0.8])
    monkeypatch.setattr(word_looks, "_mean_score", lambda *_: next(scores))
    again = copy_of_tiny(tmp_path / "again")
    before = {path.name: path.read_bytes() for path in again.iterdir()}
    assert take_words(again, split, torch.float32, said.append) is None
    assert said[-1].endswith(
        "left to the language model; mean score on what is held out 0.800, 0.900 written"
    )
    assert {path.name: path.read_bytes() for path in again.iterdir()} == before


def test_words_that_were_taught_before_stay(
    folder: Path,
    boxes: dict[str, list[tuple[int, ...]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(word_looks, "STEPS", 30)
    source(folder, records(boxes))
    coins = str(find_directory("tiny").parent / "photos" / "coins.png")
    taught, more, third = (str(tmp_path / name) for name in ("taught", "more", "third"))
    assert cli.main(["teach", "drachma", f"{coins}@157,52", "--out", taught]) == 0
    data = ["--data", str(folder / "my.jsonl")]
    assert cli.main(["teach", "hex nut", *data, "--model", taught, "--out", more]) == 0
    words = read_words(Path(more))
    assert set(words.words) == {"drachma", "hex nut"} and len(words.files) == 1
    photo = f"{folder / 'photos' / '00.png'}@125,63"
    capsys.readouterr()
    again = ["teach", "hex nut", photo, *data, "--replace", "--model", more, "--out", third]
    assert cli.main(again) == 0
    said = capsys.readouterr()
    assert "the finder, which learns too, knew hex nut before" not in said.out + said.err
    assert "mean score on the photos held out" in said.out
    assert set(read_words(Path(third)).words) == {"drachma", "hex nut"}


def test_teach_learns_from_photos_and_changes_nothing_else(
    folder: Path,
    boxes: dict[str, list[tuple[int, ...]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(word_looks, "STEPS", 40)
    source(folder, records(boxes))
    out = tmp_path / "learned"
    teach = ["teach", "hex nut", "--data", str(folder / "my.jsonl"), "--out", str(out)]
    assert cli.main(teach) == 0
    assert "F1 of points" in capsys.readouterr().out
    assert (out / "report.html").is_file() and set(read_words(out).words) == {"hex nut"}
    model = Pipeline.from_pretrained(out, dtype=torch.float32).model
    tiny = Pipeline.from_pretrained("tiny", dtype=torch.float32).model
    for part in ("llm", "vision_encoder", "connector"):
        mine, theirs = (getattr(m, part).state_dict() for m in (model, tiny))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert cli.main(["info", str(out)]) == 0
    assert "words: hex nut, taught from annotated pictures" in capsys.readouterr().out
    # A word that was learned is known, and examples of it may take its place.
    photo = f"{folder / 'photos' / '00.png'}@60,60"
    again = ["teach", "hex nut", photo, "--model", str(out), "--out", str(tmp_path / "more")]
    assert cli.main(again) == 1
    assert "was taught hex nut before, from annotated pictures" in capsys.readouterr().err
    assert cli.main([*again, "--replace"]) == 0
    assert read_words(tmp_path / "more").words["hex nut"].look is None


@pytest.mark.slow
def test_a_run_ends_with_the_words_of_its_data(
    folder: Path,
    boxes: dict[str, list[tuple[int, ...]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(word_looks, "STEPS", 40)
    source(folder, records(boxes))
    run = ["train", "--data", str(folder / "my.jsonl"), "--steps", "1", "--workers", "0"]
    assert cli.main([*run, "--replay", "0", "--out", str(tmp_path / "run")]) == 0
    assert "not measured: nothing held out asks for them" in capsys.readouterr().err
    assert set(read_words(tmp_path / "run" / "model").words) == {"hex nut"}
    off = [*run, "--replay", "0", "--set", "find_weight=0", "--out", str(tmp_path / "off")]
    assert cli.main(off) == 0
    assert not (tmp_path / "off" / "model" / "words.json").exists()
