"""The search for a learning rate: what it suggests, and that it leaves nothing else behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nanomolmo2.cli import main
from nanomolmo2.recipes import smoke
from nanomolmo2.training.distributed import World
from nanomolmo2.training.find_lr import find_lr, has_diverged, smooth_losses, suggest
from tests.training.recipes import toy
from tests.training.test_split import write

RATES = [float(rate) for rate in np.geomspace(1e-7, 1, 80)]


def curve(fall: float, least: float, noise: float = 0.0) -> list[float]:
    """A loss that falls from 5 to 1 around one rate and rises above another."""
    logs = np.log10(RATES)
    losses = 1 + 4 / (1 + np.exp(4 * (logs - np.log10(fall))))
    losses += 20 * np.maximum(0, logs - np.log10(least)) ** 2
    return [float(x) for x in losses + noise * np.random.default_rng(0).normal(size=80)]


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize(("fall", "least"), [(1e-4, 1e-1), (1e-5, 1e-2)])
def test_the_rate_where_the_loss_falls_fastest(fall: float, least: float, noise: float) -> None:
    found = suggest(RATES, curve(fall, least, noise))
    assert found is not None and fall / 3 < found < fall * 3


def test_no_more_than_a_tenth_of_the_least() -> None:
    """It falls fastest just before it explodes."""
    found = suggest(RATES, curve(5e-3, 1e-2))
    assert found is not None and found < 5e-3


def test_a_loss_that_never_falls_suggests_nothing() -> None:
    assert suggest(RATES, [3.0] * 80) is None
    assert suggest(RATES, list(np.linspace(3, 9, 80))) is None
    assert suggest(RATES[:2], [3.0, 1.0]) is None


def test_smoothed_losses_are_weighted_means() -> None:
    assert smooth_losses([5.0]) == pytest.approx([5.0])
    assert smooth_losses([1.0, 2.0]) == pytest.approx([1.0, (0.8 * 1 + 2) / 1.8])


def test_what_has_diverged() -> None:
    assert has_diverged(float("nan"), [2.0]) and has_diverged(float("inf"), [2.0])
    assert not has_diverged(6.0, [2.0, 6.0])
    assert has_diverged(60.0, [2.0, 60.0])


def test_a_search_keeps_the_proportions_of_the_rates_and_writes_two_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    recipe = toy(smoke())
    rates = replace(recipe.optimisers["llm"], matrix_lr=0.0)
    halves = {part: replace(rates, lr=1e-3 if part == "llm" else 5e-4) for part in recipe.train}
    recipe = replace(recipe, optimisers=halves)
    found = find_lr(recipe, tmp_path / "search", steps=12, world=World(), quiet=True)
    assert found.rates[0] == 1e-7 and len(found.losses) == len(found.rates) <= 12
    assert found.suggested is not None and 1e-7 < found.suggested <= 0.1
    assert found.parts["llm"] == pytest.approx(found.suggested)
    assert found.parts["connector"] == pytest.approx(found.suggested / 2)
    assert {path.name for path in (tmp_path / "search").iterdir()} == {
        "find_lr.json",
        "find_lr.png",
    }
    stored = json.loads((tmp_path / "search" / "find_lr.json").read_text())
    assert stored["suggested"] == found.suggested and stored["losses"] == found.losses
    assert Image.open(tmp_path / "search" / "find_lr.png").width > 500


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="it holds other things, such as thesis"):
        find_lr(toy(smoke()), tmp_path, steps=4, world=World(), quiet=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_the_command_suggests_a_rate_and_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nanomolmo2.training.find_lr.STEPS", 4)
    data = write(tmp_path / "my.jsonl", range(6))
    toy(smoke(), data=(data,)).save("toy.json")
    search = ["train", "toy.json", "--find-lr", "--out", "runs/one"]
    assert main([*search, "--device", "meta"]) == 2
    assert main([*search, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(("train with --lr ", "no rate made the loss fall"))
    assert [path.name for path in Path("runs").iterdir()] == ["one-find-lr"]
