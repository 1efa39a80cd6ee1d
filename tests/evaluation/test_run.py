"""Evaluation on own data: what is asked, how it is scored, and what stands beside the scores."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nanomolmo2.data.sources import SourceConfig, open_source
from nanomolmo2.emoji.write import write_scenes
from nanomolmo2.evaluation import evaluate
from nanomolmo2.evaluation.questions import find_questions
from nanomolmo2.evaluation.summary import judge
from nanomolmo2.generation.pipeline import Pipeline
from tests.small_model import ScriptedModel, small_model, small_processor

Record = dict[str, Any]


def write(folder: Path, *records: Record, name: str = "my.jsonl") -> Path:
    """A file of records about one white picture of 200 x 100 pixels."""
    Image.new("RGB", (200, 100), "white").save(folder / "white.png")
    path = folder / name
    path.write_text("".join(json.dumps({"image": "white.png", **r}) + "\n" for r in records))
    return path


def scripted(*answers: str) -> Pipeline:
    """A pipeline that gives these answers, in turn."""
    model = ScriptedModel(*answers)
    return Pipeline(model, model.processor)


def scores(path: Any, *answers: str, **options: Any) -> dict[str, float]:
    return evaluate(scripted(*answers), path, batch_size=1, **options).flat()


def tag(*places: tuple[int, int], image: int = 1, label: str = "dog") -> str:
    """Points in thousandths of the picture, as the model writes them."""
    triples = " ".join(f"{i} {x:03d} {y:03d}" for i, (x, y) in enumerate(places, start=1))
    return f'<points coords="{image} {triples}">{label}</points>'


# ---- numbers, each worked out by hand ----


def test_counts(tmp_path: Path) -> None:
    records = [{"question": "How many dogs?", "answer": str(n)} for n in (3, 2, 0, 9)]
    path = write(tmp_path, *records)
    # right; 3 off; right, in other words; says no number
    found = scores(path, "3", "5", "There are none.", "Dogs.")
    assert found == {
        "count": pytest.approx(2 / 4),
        "count_within_one": pytest.approx(2 / 4),
        "count_mae": pytest.approx((0 + 3 + 0) / 3),
    }
    (row,) = evaluate(scripted("3", "5", "0", "Dogs."), path, batch_size=1).rows
    assert (row.unreadable, row.questions, row.pictures) == (0.25, 4, 1)


def test_points_and_counts_by_how_many_and_how_large(tmp_path: Path) -> None:
    """200 x 100 pixels: two things of 20 px, one of 50 px, none."""
    small, large = [[10, 40, 30, 60], [100, 40, 120, 60]], [[150, 0, 200, 50]]
    path = write(
        tmp_path,
        {"question": "Point to the dogs.", "boxes": small},
        {"question": "Point to the cats.", "boxes": large},
        {"question": "Point to the birds.", "boxes": []},
        {"question": "How many dogs are there?", "count": 2},
        {"question": "How many cats are there?", "count": 1},
    )
    found = tag((100, 500), (550, 900)), tag((900, 250)), "Hm.", "4", "1"
    report = evaluate(scripted(*found), path, batch_size=1, baselines=False, out=tmp_path / "out")
    points, counts = (row.parts for row in report.rows)
    assert points["all"]["f1"] == pytest.approx((0.5 + 1 + 0) / 3) == report.scores["point"]
    assert points["all"]["precision"] == 2 / 3 and points["all"]["recall"] == 2 / 3
    assert points["all"]["exact"] == pytest.approx(2 / 3)  # a wrong place, but the right number
    assert points["all"]["mae"] == 0  # of those that say a number
    assert {n: part["f1"] for n, part in points["by_count"].items()} == {
        "0": 0,
        "1": 1,
        "2 to 5": 0.5,
    }
    assert {n: part["f1"] for n, part in points["by_size"].items()} == {
        "16 to 31 px": 0.5,
        "32 to 63 px": 1,
    }
    assert counts["by_count"]["2 to 5"]["mae"] == 2 and counts["by_count"]["1"]["exact"] == 1
    assert counts["by_size"] == {} and "f1" not in counts["all"]
    lines = [line.split("|")[1:5] for line in report.part_table().splitlines()[2:]]
    assert [[cell.strip() for cell in line[:3]] for line in lines] == [
        ["point", "all", "3"],
        *(["point", "0", "1"], ["point", "1", "1"], ["point", "2 to 5", "1"]),
        *(["point", "16 to 31 px", "1"], ["point", "32 to 63 px", "1"]),
        *(["count", "all", "2"], ["count", "1", "1"], ["count", "2 to 5", "1"]),
    ]
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["tasks"]["point"]["by_size"]["16 to 31 px"]["questions"] == 1
    assert report.part_table() in (tmp_path / "out" / "table.md").read_text()


def test_points_in_boxes_beside_the_question(tmp_path: Path) -> None:
    """200 x 100 pixels: (100, 500) thousandths are pixel (20, 50)."""
    boxes = [[10, 40, 30, 60], [150, 0, 200, 50]]
    path = write(
        tmp_path,
        {"question": "Point to the dogs.", "boxes": boxes},
        {"question": "Point to the dogs.", "boxes": boxes},
        {"question": "Point to the cats.", "boxes": []},
        {"question": "Point to the cats.", "boxes": []},
    )
    answers = (
        tag((100, 500), (110, 510)),  # both in the first box: one hit of two
        tag((100, 500), (900, 250), (500, 900)),  # both things, and one miss: 4 / 5
        "There are none.",
        tag((100, 500)),
    )
    assert scores(path, *answers) == {"point": pytest.approx((0.5 + 0.8 + 1 + 0) / 4)}


def test_boxes_have_the_unit_of_the_points_of_their_record(tmp_path: Path) -> None:
    record = {"question": "Point to it.", "points_scale": "percent", "boxes": [[5, 40, 15, 60]]}
    assert scores(write(tmp_path, record), tag((100, 500))) == {"point": 1}
    inside = {"question": "Point to it.", "truth": {"boxes": [[10, 40, 30, 60]]}}
    assert scores(write(tmp_path, {**inside, "points_scale": "percent"}), tag((100, 500)))


def test_points_alone_have_a_radius_of_a_share_of_the_diagonal(tmp_path: Path) -> None:
    """5 % of sqrt(200^2 + 100^2) are 11.18 pixels."""
    record = {"question": "Point to it.", "label": "dog", "points": [{"x": 100, "y": 50}]}
    path = write(tmp_path, record)
    near, far = tag((555, 500)), tag((560, 500))  # 11 and 12 pixels to the right
    assert scores(path, near) == {"point": 1}
    assert scores(path, far) == {"point": 0}
    assert scores(path, far, radius=12.5) == {"point": 1}
    assert scores(write(tmp_path, {**record, "radius": 12.5}), far, radius=1) == {"point": 1}
    report = evaluate(scripted(near), path, batch_size=1)
    assert "5% of the diagonal" in report.about["radius"]


def test_boxes_go_before_the_points_of_a_record(tmp_path: Path) -> None:
    record = {
        "question": "Point to it.",
        "label": "dog",
        "points": [{"x": 20, "y": 50}],
        "boxes": [[0, 0, 100, 100]],
    }
    assert scores(write(tmp_path, record), tag((400, 900))) == {"point": 1}


def test_points_of_several_labels_and_pictures(tmp_path: Path) -> None:
    points = [
        {"x": 20, "y": 50, "label": "dog"},
        {"x": 180, "y": 50, "label": "cat", "image": 2},
    ]
    record = {"image": None, "images": ["white.png"] * 2, "question": "Where?", "points": points}
    path = write(tmp_path, record)
    dog, cat = tag((100, 500), label="Dog"), tag((900, 500), image=2, label="cat")
    assert scores(path, f"{dog} {cat}") == {"point": 1}
    assert scores(path, tag((100, 500), label="cat")) == {"point": 0}
    assert scores(path, f"{dog} {tag((900, 500), label='cat')}") == {"point": 0.5}


def test_points_of_a_video_have_a_time(tmp_path: Path) -> None:
    video = {"frames": ["white.png"] * 2, "times": [0, 1]}
    points = [{"x": 20, "y": 50, "time": 1}]
    record = {"image": None, "video": video, "question": "When?", "points": points, "label": "dog"}
    (question,) = find_questions([open_source(write(tmp_path, record))]).asked
    right, early = (f'<points coords="{t} 1 100 500">dog</points>' for t in ("1.0", "0.0"))
    assert (question.task, question.shown.video_size) == ("point", (200, 100))
    assert judge(question, right).score == 1
    assert judge(question, early).score == 0


def test_texts_choices_and_ten_answers(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"question": "Colour?", "answer": "Dark red", "task": "colour"},
        {"question": "Which?", "choices": ["red", "blue"], "answer": "B", "task": "which"},
        {"question": "Which?", "choices": ["red", "blue"], "answer": "red", "task": "which"},
        {"question": "What?", "answers": ["cat"] * 2 + ["dog"] * 8, "task": "vqa"},
        {"question": "Name?", "answers": ["Tom", "Thomas"], "task": "name"},
    )
    found = scores(path, "dark  red.", "It is blue.", "(B)", "cat", "thomas")
    assert found == {"colour": 1, "which": 0.5, "vqa": pytest.approx(2 / 3), "name": 1}
    found = scores(path, "dark rod", "B", "A", "", "", scorer={"colour": "anls"})
    assert found["colour"] == pytest.approx(7 / 8)


def test_truths_as_other_programs_write_them(tmp_path: Path) -> None:
    """A number that is no text, people's answers in objects, a scorer beside the question, one
    sign or two for a letter with an accent, and places as pairs."""
    people = [{"answer": text, "answer_id": n} for n, text in enumerate(["red"] * 2 + ["blue"] * 8)]
    path = write(
        tmp_path,
        {"question": "How many dogs?", "answer": 3, "task": "dogs"},
        {"question": "Which colour?", "answers": people, "task": "colour"},
        {"question": "How high?", "answer": "100", "scorer": "relaxed", "task": "height"},
        {"question": "Qui?", "answer": "Ren\u00e9", "task": "name"},
        {"question": "Where?", "points": [[20, 50]], "radius": 2, "task": "place"},
    )
    answers = ("three", "red", "104", "Rene\u0301.", tag((105, 500), (120, 500)))
    # two of the three people that are enough; within 5 %; one point 1 pixel off, and one 4
    expected = {"dogs": 1, "colour": 2 / 3, "height": 1, "name": 1, "place": 2 / 3}
    report = evaluate(scripted(*answers), path, batch_size=1)
    assert report.scores == pytest.approx(expected)
    assert [row.scorer for row in report.rows] == ["count", "vqa", "relaxed", "exact", "points"]


def test_captions_are_scored_by_the_categories_of_their_task(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"caption": "A dog and a cat.", "categories": ["dog", "cat"]},
        {"caption": "A hot dog.", "categories": ["hot dog"]},
        {"caption": "A field."},
    )
    report = evaluate(scripted("Two dogs.", "A dog, and two hot dogs."), path, batch_size=1)
    # one of two; the right one, and a dog that is not there
    assert report.flat() == {"caption": pytest.approx((2 / 3 + 2 / 3) / 2)}
    assert report.unscored == {"caption": 1}


def test_truth_goes_before_the_conversation(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"question": "Is it?", "truth": {"answer": "Yes"}, "task": "is"},
        {"question": "How old?", "truth": {"answer": 12}, "task": "old"},
        {"question": "How many?", "answer": "4", "truth": {"count": 5}, "task": "n"},
        {
            "messages": [
                {"role": "user", "content": "Is it?"},
                {"role": "assistant", "content": "Yes."},
                {"role": "user", "content": "Where?"},
            ],
            "boxes": [[0, 0, 99, 99]],
        },
    )
    found = scores(path, "yes", "12", "5", tag((100, 100)))
    assert {name: found[name] for name in ("is", "old", "n", "point")} == dict.fromkeys(
        ("is", "old", "n", "point"), 1
    )


def test_emoji_scenes_by_their_files(tmp_path: Path) -> None:
    """Their records say what each question wants; a true answer gets everything."""
    path = write_scenes(tmp_path / "scenes", 2, split="test")
    source = open_source(path)
    branches = [branch for i in range(2) for branch in source[i].branches]
    truths = [branch.truth["answer"] for branch in branches if branch.task != "unknown"]
    report = evaluate(scripted(*truths), path, batch_size=1)
    assert set(report.scores.values()) == {1.0}
    scorers = {row.task: row.scorer for row in report.rows}
    assert scorers["presence"] == scorers["at"] == "exact"
    assert scorers["count"] == scorers["number"] == "count"
    assert (scorers["point"], scorers["points"]) == ("points", "points")
    assert scorers["caption"] == "categories"
    assert report.unscored == {"unknown": 2}


def test_one_scorer_for_a_task_where_its_answers_look_different(tmp_path: Path) -> None:
    """A number is a count, unless the task has words too; "none" is whatever the others are."""
    path = write(
        tmp_path,
        {"question": "What?", "answer": "4", "task": "qa"},
        {"question": "What?", "answer": "red", "task": "qa"},
        {"question": "Where?", "points": [], "task": "find", "label": "dog"},
        {"question": "Where?", "points": [{"x": 1, "y": 1}], "task": "find", "label": "dog"},
        {"question": "Dogs?", "points": [], "label": "dog", "task": "n"},
        {"question": "Dogs?", "answer": "2", "task": "n"},
    )
    report = evaluate(scripted(*["red"] * 6), path, batch_size=1)
    assert {row.task: row.scorer for row in report.rows} == {
        "qa": "exact",
        "find": "points",
        "n": "count",
    }
    assert report.scores == {"qa": 0.5, "find": 0, "n": 0}


# ---- what stands beside the scores ----


def test_baselines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        *({"question": "Is it?", "answer": a, "task": "is"} for a in ("Yes.", "Yes.", "No.")),
        *({"question": "How many?", "answer": a} for a in ("0", "2")),
        {"question": "Point to it.", "boxes": [[0, 0, 5, 5]]},
        {"question": "Point to it.", "boxes": []},
    )
    report = evaluate(scripted(*["Yes."] * 7), path, batch_size=1)
    found = {row.task: row.baselines for row in report.rows}
    assert found["is"] == {"most frequent answer": pytest.approx(2 / 3)}
    assert found["count"] == {"most frequent answer": 0.5, "none": 0.5}
    assert found["point"]["none"] == 0.5
    assert (
        not evaluate(scripted(*["No."] * 7), path, batch_size=1, baselines=False).rows[0].baselines
    )


def test_another_model_is_asked_the_same(tmp_path: Path) -> None:
    path = write(tmp_path, *({"question": "Is it?", "answer": a} for a in ("Yes.", "No.")))
    report = evaluate(
        scripted("Yes.", "No."), path, batch_size=1, baselines=scripted("Yes.", "Yes.")
    )
    assert report.scores == {"text": 1}
    assert report.rows[0].baselines["untrained model"] == 0.5


def test_blindness_is_the_share_of_pairs_with_one_answer(tmp_path: Path) -> None:
    """Three questions about one picture: of the pairs whose truths differ, half get one answer."""
    path = write(tmp_path, *({"question": q, "answer": a} for q, a in ("aY", "bN", "cY")))
    report = evaluate(scripted("Y", "Y.", "N"), path, batch_size=1)
    assert (report.rows[0].blind, report.rows[0].pairs) == (0.5, 2)


def test_pairs_across_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10), "red").save(tmp_path / "red.png")
    lines = [
        {"question": "Colour?", "answer": "white", "pair": 7},
        {"question": "Colour?", "answer": "red", "image": "red.png", "pair": 7},
    ]
    (row,) = evaluate(scripted("red", "red"), write(tmp_path, *lines), batch_size=1).rows
    assert (row.blind, row.pairs, row.pictures) == (1, 1, 2)


def test_intervals_resample_pictures(tmp_path: Path) -> None:
    """Four answers about one picture are one draw: the interval has no width."""
    path = write(tmp_path, *({"question": "?", "answer": a} for a in "abcd"))
    (row,) = evaluate(scripted("a", "b", "x", "y"), path, batch_size=1).rows
    assert row.interval == (0.5, 0.5)


# ---- the model ----


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    return write_scenes(tmp_path / "scenes", 2, split="test")


def test_a_batch_answers_like_one_by_one(scenes: Path) -> None:
    pipeline = Pipeline.from_pretrained("tiny")
    one, many = (
        evaluate(Pipeline(pipeline.model, pipeline.processor), scenes, batch_size=n) for n in (1, 8)
    )
    assert one.to_dict() == many.to_dict()
    assert one.scores["presence"] == 1  # a model that answers, not one that is silent


def test_a_live_model_stays_as_it_is(tmp_path: Path) -> None:
    """In a training loop nothing may change: no mode of a part, no random state."""
    path = write(tmp_path, {"question": "Is it?", "answer": "Yes."})
    model = small_model()
    pipeline = Pipeline(model, small_processor())
    model.train()
    model.vision_encoder.eval()
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    evaluate(pipeline, path)
    assert [module.training for module in model.modules()] == modes
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(states[0], after[0]) and states[1:] == after[1:]


def test_limit_takes_the_first_records(tmp_path: Path) -> None:
    path = write(tmp_path, *({"question": "?", "answer": a} for a in "abcd"))
    other = write(tmp_path, {"question": "?", "answer": "e"}, name="other.jsonl")
    report = evaluate(scripted("a", "b", "e"), [path, SourceConfig(str(other))], limit=2)
    assert (report.scores, report.about["questions"]) == ({"text": 1}, 3)


# ---- what cannot be ----


def test_bad_records_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"question": "Is it?", "answer": "Yes."},
        {"question": "Is it?", "answer": "Yes.", "image": "gone.png"},
        {"question": "Is it?"},
        {"question": "Where?", "boxes": [[5, 5, 1, 1]]},
    )
    with pytest.warns(UserWarning, match="1 record was left out") as warned:
        report = evaluate(scripted("Yes."), path)
    assert report.left_out == {"missing picture": 1, "no answer": 1, "bad truth": 1}
    assert len(warned) == 3 and report.scores == {"text": 1}


def test_a_record_is_left_out_whole(tmp_path: Path) -> None:
    branches = [{"question": "Is it?", "answer": "No."}, {"question": "Where?", "boxes": 3}]
    path = write(tmp_path, {"question": "Is it?", "answer": "Yes."}, {"branches": branches})
    with pytest.warns(UserWarning, match="bad truth.*found boxes 3, expected a list"):
        report = evaluate(scripted("Yes."), path)
    assert (report.left_out, report.about["questions"]) == ({"bad truth": 1}, 1)


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (
            [{"question": "Is it?", "answer": "Yes.", "boxs": [[0, 0, 9, 9]]}],
            r"not read, of 1 record: boxs \(1\)",
        ),
        (
            [
                {"question": "Where?", "boxes": [[0.1, 0.1, 0.4, 0.9]]},
                {"question": "Where is it?", "boxes": []},
            ],
            "within the first pixel.*--points-scale unit",
        ),
        (
            [
                {"question": "Where?", "boxes": [[150, 10, 250, 90]]},
                {"question": "Where is it?", "boxes": [[5, 5, 9, 9], [201, 10, 250, 90]]},
            ],
            "1 of 2 questions have true places outside of their picture.*my, record 1",
        ),
        (
            [
                {"question": "Where?", "masks": [{"size": [100, 200], "counts": [0, 9, 19991]}]},
                {"question": "Where is it?", "masks": [{"size": [200, 100], "counts": [20000]}]},
            ],
            "1 of 2 questions have true places.*masks of another size.*my, record 1",
        ),
        (
            [{"question": "Is it?", "answer": "Yes."}, {"question": "Is it?", "answer": "No."}],
            "1 question is asked more than once",
        ),
    ],
)
def test_what_is_hardly_meant_is_one_warning(
    tmp_path: Path, records: list[Record], said: str
) -> None:
    with pytest.warns(UserWarning, match=said) as warned:
        evaluate(scripted(*["Yes."] * len(records)), write(tmp_path, *records), batch_size=1)
    assert len(warned) == 1


def test_pixels_of_small_places_and_of_the_edge_are_nothing_to_warn_of(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"question": "Where is one?", "boxes": [[0, 0, 1, 1]]},
        {"question": "Where are two?", "boxes": [[0, 0, 1, 1], [190, 90, 210, 101]]},
        {"question": "Where is none?", "boxes": []},
        {"question": "Where is it?", "points": [[200, 100]], "radius": 9},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(scripted(*["There are none."] * 4), path, batch_size=1)


@pytest.mark.parametrize(
    ("records", "scorer", "said"),
    [
        ([{"question": "Is it?"}], None, "none of 1 records can be asked about.*has no answer"),
        ([{"caption": "A dog."}], None, "give 'categories'"),
        ([{"question": "Is it?", "answer": "Yes."}], "points", "points does not fit.*no points"),
        ([{"question": "Is it?", "answer": "Yes."}], "count", "count does not fit.*whole number"),
        ([{"question": "Where?", "boxes": []}], "vqa", "vqa does not fit.*expected 'answers'"),
        ([{"question": "Is it?", "answer": "Yes."}], "choice", "does not fit.*list of 2 to 26"),
        ([{"question": "Is it?", "answer": "Yes."}], "categories", "does not fit.*list of names"),
        (
            [{"question": "Where?", "points": [{"x": 1, "y": 1}]}],
            "anls",
            "anls does not fit.*is points",
        ),
        ([{"question": "Is it?", "answer": "Yes."}], "f2", "no scorer 'f2': choose from points"),
        (
            [{"question": "Which?", "choices": ["a", "b"], "answer": "c"}],
            None,
            "none of the choices",
        ),
    ],
)
def test_what_cannot_be_scored_is_said(
    tmp_path: Path, records: list[Record], scorer: str | None, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        evaluate(scripted("Yes."), write(tmp_path, *records), scorer=scorer)


def test_points_are_counted_where_a_number_is_asked_for(tmp_path: Path) -> None:
    """The places of the first thing and of a wrong one: two points, of which one hits."""
    two = [[20, 50], [180, 50]]
    path = write(
        tmp_path,
        {"question": "How many dogs are there?", "points": two, "count": 2},
        {"question": "Point to the 2 dogs.", "points": two, "count": 2},
    )
    said = tag((100, 500), (500, 500))
    found = scores(path, said, said)
    assert (found["count"], found["point"]) == (1, 1 / 2)


def test_records_are_no_source() -> None:
    records: Any = [{"question": "Is it?", "answer": "Yes."}]
    with pytest.raises(TypeError, match=r"found \{.*Is it.*expected a path or a source"):
        evaluate(scripted("Yes."), records)


def test_no_data(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="holds no records"):
        evaluate(scripted(), tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match="there is no data"):
        evaluate(scripted(), [])
