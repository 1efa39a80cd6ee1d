"""What a run remembers: when it diverges, which step is the best, and what is said at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanomolmo2.training.watch import Divergence, History, Watch, advice, summary


def history(*losses: float, best: str = "val_loss", patience: int = 0, **scores: list[float]):
    """One that was measured before the first step and every 10 steps, training losses 10, 9, ..."""
    made = History(best, patience)
    for k, loss in enumerate(losses):
        if k:
            made.add_loss(11.0 - k)
        found = {f"val_{name}": values[k] for name, values in scores.items()}
        made.add(10 * k, {"val_loss": loss, **found})
    return made


# ---- divergence ----


@pytest.mark.parametrize(
    ("losses", "steps", "when"),
    [
        ([2.0, *[31.0] * 9], 100, 4),  # above 10 x 2 + 10 three times
        ([2.0, 31.0, 31.0, 29.0, 31.0, 31.0], 100, None),
        ([2.0, *[6.5] * 30], 100, 21),  # above 2 x 2 + 2 twenty times
        ([2.0, *[6.5] * 30], 24, 7),  # a quarter of a short run
        ([2.0, *[6.5] * 30], 5, 5),  # at least four
        ([0.0, *[1.9] * 50], 100, None),
        ([11.0, *[23.0, 25.0] * 50], 400, None),  # noise
        ([2.0, 1.0, 0.5, 40.0, 1.0, 40.0, 1.0], 100, None),
    ],
)
def test_a_loss_that_explodes_is_noticed_and_noise_is_not(
    losses: list[float], steps: int, when: int | None
) -> None:
    guard = Divergence(steps)
    found = [bool(guard.add(loss)) for loss in losses]
    assert (found.index(True) + 1 if any(found) else None) == when


def test_what_diverges_is_said_in_numbers() -> None:
    guard = Divergence(100)
    said = [guard.add(loss) for loss in (2.0, 40.0, 50.0, 60.0)]
    assert said[-1] == (
        "the loss diverges: it was 2 at the first step, and above 30 in each of the last 3"
    )


def test_a_resumed_guard_decides_as_one_that_was_never_stopped() -> None:
    losses = [2.0, *[6.5] * 30]
    whole = Divergence(100)
    found = [bool(whole.add(loss)) for loss in losses]
    for stop in (1, 7, 20):
        first, second = Watch(100), Watch(100)
        before = [bool(first.add_loss(loss)) for loss in losses[:stop]]
        assert second.load(json.loads(json.dumps(first.state()))) == ""
        assert before + [bool(second.add_loss(loss)) for loss in losses[stop:]] == found


# ---- the best ----


def test_the_best_is_the_least_loss_or_the_highest_score() -> None:
    made = history(5.0, 3.0, 2.0, 4.0)
    assert made.best is not None and made.best.step == 20
    assert [one.loss for one in made.measured] == [None, 10.0, 9.0, 8.0]
    made = history(5.0, 3.0, 2.0, 4.0, best="count", count=[0.9, 0.1, 0.2, 0.5])
    assert made.best is not None and made.best.step == 30  # 0.9 was before the first step
    made = history(5.0, 3.0, 2.0, 4.0, best="last")
    assert made.best is not None and made.best.step == 30


def test_of_equal_scores_the_lesser_loss_is_the_best() -> None:
    made = history(5.0, 4.0, 2.0, 3.0, best="count", count=[0.0, 0.0, 0.0, 0.0])
    assert made.best is not None and made.best.step == 20
    near = made.cost({"val_loss": 9.0, "val_count": 0.0001})
    assert near < made.cost({"val_loss": 0.0, "val_count": 0.0})  # a score counts more


def test_the_first_of_equal_measurements_is_the_best() -> None:
    made = history(5.0, 2.0, 2.0)
    assert made.best is not None and made.best.step == 10 and not made.is_best


def test_a_task_that_is_not_scored_is_named_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"highest 'tracks', but .* have count: choose \(--best\)"):
        history(5.0, best="tracks", count=[0.5])


@pytest.mark.parametrize(
    ("losses", "patience", "over"),
    [
        ((5.0, 3.0, 3.5, 3.2), 2, True),
        ((5.0, 3.0, 3.5, 2.9), 2, False),
        ((5.0, 3.0, 3.5), 2, False),
        ((1.0, 3.0, 2.0), 1, False),  # before the first step does not count
        ((5.0, 3.0, 3.5, 3.2, 4.0), 0, False),
    ],
)
def test_patience(losses: tuple[float, ...], patience: int, over: bool) -> None:
    assert history(*losses, patience=patience).is_over is over


def test_a_history_comes_back_unless_it_is_of_other_data() -> None:
    made = history(5.0, 3.0, 4.0)
    made.add_loss(7.0)
    made.add_loss(8.0)
    state = json.loads(json.dumps(made.state()))
    again = History()
    assert again.load(state) and again.measured == made.measured
    again.add(30, {"val_loss": 2.0})
    assert again.measured[-1].loss == 7.5
    other = Watch(100, History(of="other files"))
    assert "is looked for anew" in other.load(
        {"divergence": Watch(9).divergence.state(), "history": state}
    )
    assert other.history is not None and other.history.measured == []


# ---- words ----


def test_overfitting_is_told_with_its_numbers() -> None:
    said = summary(history(5.0, 3.0, 2.0, 2.5, 3.5), 40)
    assert said[0] == (
        "the model is that of step 20 of 40, the best: val_loss 2, 5 before the first step, 3.5 at "
        "the end"
    )
    assert said[1].startswith(
        "it overfits: after step 20 the validation loss rose from 2 to 3.5 while the training loss "
        "fell from 9 to 7: more pictures help most, else fewer steps (--steps 20)"
    )
    assert said[1].endswith("--patience 3 stops by itself")


def test_stopping_early_is_told() -> None:
    said = summary(history(5.0, 2.0, 2.5, 3.5, patience=2), 80)
    assert said[1] == "stopped early, at step 30 of 80: 2 measurements without a better val_loss"
    assert "it overfits" in said[2] and "--patience" not in said[2]


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ((5.0, 4.0, 3.0), "still falling at the end (from 4 to 3): train longer (--steps 40)"),
        ((5.0, 6.0, 5.5), "never below that of the start (5): lower the rate (--lr, --find-lr"),
        ((5.0, 3.0, 2.995), ""),
        ((5.0, 3.0, 2.0, 2.01), ""),
    ],
)
def test_what_the_curves_advise(losses: tuple[float, ...], words: str) -> None:
    said = advice(history(*losses).measured)
    assert len(said) == bool(words)
    assert not words or words in said[0]


def test_what_was_measured_is_written(tmp_path: Path) -> None:
    made = history(5.0, 3.0, 4.0)
    made.save(tmp_path / "best.json", 20, ["words"])
    found = json.loads((tmp_path / "best.json").read_text())
    assert (found["chosen_by"], found["step"], found["steps"], found["value"]) == (
        *("val_loss", 10, 20),
        3.0,
    )
    assert found["measurements"][2] == {"step": 20, "val_loss": 4.0, "loss": 9.0}
