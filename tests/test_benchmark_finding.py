"""The benchmark of the recipe's ideas: runs differ in one thing, and it runs; not what it finds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.finding import SHORT, VARIANTS, Budget, measure, plan_of, table
from nanomolmo2.things.find_model import CROPS
from nanomolmo2.things.scenes import draw_scene, train_rng
from nanomolmo2.things.train import SMALL


def differing(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    """Names of the settings that two plans do not share, of their scenes too."""
    found = set()
    for name, value in a.items():
        if isinstance(value, dict):
            found |= differing(value, b[name])
        elif value != b[name]:
            found.add(name)
    return found


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("no-look-alikes", {"alike", "cousins"}),
        ("drawings-only", {"made"}),
        ("made-only", {"made"}),
        ("no-contrast", {"contrast"}),
        ("no-crops", {"max_crops"}),
        ("written", {"contrast", "finder", "keep", "kinds", "llm", "llm_matrix"}),
    ],
)
def test_runs_differ_in_what_they_say(name: str, settings: set[str]) -> None:
    baseline, other = (asdict(plan_of(VARIANTS[x], Budget(), "")) for x in ("baseline", name))
    assert differing(baseline, other) == settings


def test_the_baseline_is_the_recipe_but_for_its_steps() -> None:
    baseline = VARIANTS["baseline"]
    found = differing(asdict(plan_of(baseline, Budget(steps=7), "")), asdict(SMALL))
    assert found == {"steps", "scored"}
    assert baseline.max_crops == CROPS.max_crops != VARIANTS["no-crops"].max_crops


def test_without_look_alikes_there_are_none() -> None:
    source = plan_of(VARIANTS["no-look-alikes"], Budget(), "").source
    for number in range(8):
        assert not any(kind.alike for kind in draw_scene(train_rng(0, number), source.scene).kinds)


@pytest.mark.slow
def test_runs_are_trained_asked_and_kept(tmp_path: Path) -> None:
    names = ["baseline", "no-crops", "written"]
    results = measure(tmp_path, names, SHORT, workers=0)
    assert list(results) == names
    assert all(0 <= result["sets"]["few"]["f1"] <= 1 for result in results.values())
    assert not (tmp_path / "no-contrast").exists()
    lines = table(results).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        *("run", "", "few: point F1", "few: exact")
    ]
    assert len(lines) == 5
    assert measure(tmp_path, names, SHORT, workers=0) == results  # nothing is done again
