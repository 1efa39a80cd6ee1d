"""The benchmark of two ways of pointing: both learn the same, and it runs; not what it finds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import pointing
from benchmarks.pointing import cell, chart, check_plan, learn, make_way, on_things, table
from benchmarks.pointing_train import SHORT, Plan, Pool, Run
from nanomolmo2.batch import NO_MORE_POINTS
from nanomolmo2.emoji.exam import make_exam
from nanomolmo2.emoji.scenes import test_scene as render_test_scene
from nanomolmo2.processor import Point, format_points


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pointing")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return learn(folder, SHORT, ["text", "grounding"])


@pytest.mark.slow
def test_the_runs_of_both_ways_are_found(results: dict[str, Any]) -> None:
    assert list(results["runs"]) == ["text-0", "grounding-0"]
    for scores in results["runs"].values():
        assert [found["answers"] for found in scores] == [8, 16]
        assert all(0 <= found[name] <= 1 for found in scores for name in ("point_f1", "on_things"))
    for found in results["seconds"].values():
        assert {name: len(values) for name, values in found.items()} == {
            "seconds": 1,
            "tokens": 1,
            "points": 1,
        }


@pytest.mark.slow
def test_what_points_is_all_that_the_ways_do_not_share(results: dict[str, Any]) -> None:
    """113,737: queries and keys of rows, slots and cells, norm, end, and what is read back."""
    count = results["parameters"]
    assert count["grounding"] - count["text"] == 113_737


@pytest.mark.slow
def test_both_ways_get_the_same_questions_about_the_same_scenes(folder: Path, results: Any) -> None:
    pool = Pool(folder, 2 * SHORT.scenes, print)
    text, grounding = (Run(folder, make_way(name), 0, SHORT) for name in ("text", "grounding"))
    for step in range(2):
        numbers, asked = text.questions(step, pool)
        others = grounding.questions(step, pool)
        assert numbers == others[0] and min(numbers) >= SHORT.scenes
        for of_text, of_grounding in zip(asked, others[1], strict=True):
            assert [b.messages[0] for b in of_text] == [b.messages[0] for b in of_grounding]
            assert [b.truth["points"] for b in of_text] == [b.truth["points"] for b in of_grounding]
    assert pool.batch(text.way.processor, numbers, asked).point_targets is None
    targets = grounding.batch(pool, 1).point_targets
    assert targets is not None
    expected = [branch.truth["count"] for branches in asked for branch in branches]
    assert int((targets[:, 0] == NO_MORE_POINTS).sum()) == sum(count > 0 for count in expected)
    assert int((targets[:, 0] != NO_MORE_POINTS).sum()) == sum(expected)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    folder: Path, results: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("start.pt", "scenes-16.npy", "scenes-16.json"):
        (tmp_path / name).symlink_to(folder / name)
    pool = Pool(tmp_path, 2 * SHORT.scenes, print)
    way = make_way("grounding")
    stopped = Run(tmp_path, way, 0, replace(SHORT, answers=(8,)))
    stopped.train(pool, print)
    resumed = Run(tmp_path, way, 0, SHORT)
    resumed.train(pool, print)
    whole = torch.load(Run(folder, way, 0, SHORT).weights_path(16))
    found = torch.load(resumed.weights_path(16))
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_runs_of_two_plans_are_not_mixed(tmp_path: Path) -> None:
    check_plan(tmp_path / "plan.json", SHORT)
    check_plan(tmp_path / "plan.json", SHORT)
    with pytest.raises(ValueError, match="holds runs of another plan: name another folder"):
        check_plan(tmp_path / "plan.json", Plan())


def test_a_point_counts_that_lies_on_another_thing_than_was_asked_for() -> None:
    exam = make_exam("seen", 3, tasks=("point",))
    objects = render_test_scene(2, "seen").objects
    there = (a for a in exam.asked if a.branch.truth["count"] and not a.probe)
    (asked,) = (a for a in there if a.example == 2)
    other = next(o for o in objects if o.category != asked.branch.truth["noun"])
    free = next(
        Point(x + 0.5, 0.5)
        for x in range(192)
        if not any(o.box[0] <= x + 0.5 <= o.box[2] and o.box[1] <= 0.5 for o in objects)
    )
    asked.answer = format_points([Point(*other.center), free], "thing", [(192, 192)])
    assert on_things(exam) == 0.5
    asked.answer = "There are none."
    assert on_things(exam) == 0


def test_the_table_has_the_mean_and_the_range_of_the_seeds(tmp_path: Path) -> None:
    assert cell([0.5, 0.25, 0.75]) == "0.500 (0.250 to 0.750)" and cell([]) == "-"
    results = {
        "plan": {"answers": [8, 16]},
        "runs": {
            "text-0": [{"answers": 8, "point_f1": 0.125}, {"answers": 16, "point_f1": 0.5}],
            "text-1": [{"answers": 8, "point_f1": 0.375}],
            "grounding-0": [{"answers": 8, "point_f1": 1.0}],
        },
        "seconds": {
            "text": {"seconds": [0.25, 0.5], "tokens": [10.0, 20.0], "points": [1.0, 2.0]},
            "grounding": {"seconds": [0.125], "tokens": [12.0], "points": [1.0]},
        },
    }
    lines = table(results).splitlines()
    assert "| 8 answers | 0.250 (0.125 to 0.375) | 1.000 (1.000 to 1.000) |" in lines
    assert "| 16 answers | 0.500 (0.500 to 0.500) | - |" in lines
    assert "| seconds | 0.375 | 0.125 |" in lines and "| tokens | 15.0 | 12.0 |" in lines
    chart(results, tmp_path / "pointing.png")
    with Image.open(tmp_path / "pointing.png") as image:
        image.load()
        assert image.width == 1560


@pytest.mark.slow
def test_the_page_gets_what_was_found(
    folder: Path, results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["pointing", "--plan", "short", "--out", str(folder), "--docs", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(pointing.torch, "set_num_threads", lambda number: None)
    assert pointing.main() == 0
    assert json.loads((tmp_path / "pointing-short.json").read_text()) == json.loads(
        json.dumps(results)
    )
    assert (tmp_path / "images" / "pointing-short.png").exists()
