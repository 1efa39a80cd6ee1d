"""Training on 2 and 4 processes (Gloo, CPU) against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanomolmo2.training import distributed
from nanomolmo2.training.distributed import (
    STATE_FILE,
    World,
    load_sharded,
    read_state,
    save_sharded,
)
from tests.training.ranks import CASES, STEPS, Run, resume, save, train

ROOT = Path(__file__).parents[2]
EXACT = [name for name, case in CASES.items() if case.dtype == torch.float32]


def start(ranks: int, folder: Path) -> dict:
    """Run all cases under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", "-m", "tests.training.ranks", str(folder)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / f"ranks-{ranks}.pt", weights_only=True)


class Outcomes(dict[int, dict]):
    """Results by number of ranks, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, ranks: int) -> dict:
        if ranks == 1:
            self[1] = {name: train(CASES[name], World()) for name in EXACT}
            save(self.folder / "saved-on-1", World())
        else:
            assert self[ranks // 2]  # has saved what these ranks resume
            self[ranks] = start(ranks, self.folder)
        return self[ranks]

    def resumed(self, saved: int, loaded: int) -> dict:
        """What came out of a checkpoint of ``saved`` ranks on ``loaded``."""
        assert self[saved]
        name = f"saved-on-{saved}"
        return resume(self.folder / name, World()) if loaded == 1 else self[loaded][name]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return Outcomes(tmp_path_factory.mktemp("ranks"))


FOUR = pytest.param(4, marks=pytest.mark.slow)


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, FOUR])
@pytest.mark.parametrize("name", EXACT)
def test_several_processes_equal_one(outcomes, name, ranks):
    """Losses, norms, gradients and weights; packs differ in length, pictures and label weight.

    Some have no picture and some no label: a rank that skipped a part would leave the others
    waiting for it, and a mean of means would show.
    """
    one, several = outcomes[1][name], outcomes[ranks][name]
    for found, expected in zip(several["steps"], one["steps"], strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert_same(several["gradients"], one["gradients"])
    assert_same(several["weights"], one["weights"])


@pytest.mark.parametrize("ranks", [2, FOUR])
def test_every_rank_holds_its_part(outcomes, ranks):
    assert outcomes[ranks]["all"]["held"] == pytest.approx(1 / ranks, rel=0.05)
    assert outcomes[ranks]["frozen vision"]["held"] > 1 / ranks + 0.05  # whole on every rank


def test_bfloat16_keeps_norms_and_sums_in_float32(outcomes):
    two = outcomes[2]["bfloat16"]
    assert two["dtypes"] == {"norms": ["torch.float32"], "matrices": ["torch.bfloat16"]}
    assert all(weight.dtype == torch.float32 for weight in two["weights"].values())
    exact = outcomes[1]["all"]["steps"]
    for found, expected in zip(two["steps"], exact, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=5e-3)
        assert found["loss"] != expected["loss"]


@pytest.mark.slow
def test_2_and_4_ranks_round_the_same_products_and_sum_them_in_float32(outcomes):
    assert_same(outcomes[4]["bfloat16"]["weights"], outcomes[2]["bfloat16"]["weights"])


@pytest.mark.parametrize(
    "saved, loaded",
    [
        *((1, 1), (1, 2), (2, 1), (2, 2)),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((1, 4), (2, 4), (4, 1), (4, 4))),
    ],
)
def test_a_checkpoint_loads_on_another_number_of_ranks(outcomes, saved, loaded):
    """The step behind it is the step of a run that was never stopped."""
    run = Run(CASES["all"], World())
    steps = [run.step(step) for step in range(STEPS + 1)]
    found = outcomes.resumed(saved, loaded)
    assert found["state"] == {"step": STEPS, "data": {"slots": [1, 2]}}
    assert found["steps"][0] == pytest.approx(steps[-1], rel=1e-5, abs=1e-5)
    assert_same(found["weights"], run.model.state_dict())


def test_random_numbers_go_on_where_they_stopped(tmp_path):
    run = Run(CASES["all"], World())
    save_sharded(tmp_path / "a", run.model, run.optimizers, {})
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_sharded(tmp_path / "a", run.model, run.optimizers)
    assert torch.equal(torch.rand(3), expected)


def test_a_checkpoint_that_fails_leaves_nothing(tmp_path, monkeypatch):
    run = Run(CASES["all"], World())
    save_sharded(tmp_path / "a", run.model, run.optimizers, {"step": 1})
    with pytest.raises(ValueError, match="already exists"):
        save_sharded(tmp_path / "a", run.model, run.optimizers, {"step": 2})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(distributed.dcp, "save", full)
        with pytest.raises(ValueError, match=r"No space left.*is the disk full"):
            save_sharded(tmp_path / "b", run.model, run.optimizers, {"step": 2})
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_sharded(tmp_path / "c", run.model, run.optimizers, {"step": torch.ones(1)})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert load_sharded(tmp_path / "a", run.model, run.optimizers) == {"step": 1}


def test_what_a_killed_run_left_is_written_over(tmp_path):
    run = Run(CASES["all"], World())
    left = tmp_path / ".tmp-a" / "__0_0.distcp"
    left.parent.mkdir()
    left.write_bytes(b"half a file")
    save_sharded(tmp_path / "a", run.model, run.optimizers, {"step": 1})
    assert load_sharded(tmp_path / "a", run.model, run.optimizers) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def halved(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    half = len(content) // 2
    return content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]


@pytest.mark.parametrize(
    "file, damage",
    [
        (".metadata", halved),
        (STATE_FILE, halved),
        ("__0_0.distcp", halved),
        ("__0_0.distcp", flipped),
        ("__0_0.distcp", None),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_error(tmp_path, file, damage):
    run = Run(CASES["all"], World())
    save_sharded(tmp_path / "a", run.model, run.optimizers, {"step": 1})
    path = tmp_path / "a" / file
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="no readable training checkpoint"):
        load_sharded(tmp_path / "a", run.model, run.optimizers)


def test_every_flipped_bit_of_the_state_is_found(tmp_path):
    """The step and the place in the data decide what comes next; the index, which file is read."""
    run = Run(CASES["all"], World())
    state = {"step": 1, "data": {"slots": [1, 2]}}
    save_sharded(tmp_path / "a", run.model, run.optimizers, state)
    path = tmp_path / "a" / STATE_FILE
    whole, expected = path.read_bytes(), read_state(tmp_path / "a")
    assert expected["state"] == state
    for place in range(8 * len(whole)):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        try:
            assert read_state(tmp_path / "a") == expected
        except ValueError:
            continue
        assert content.decode().split() == whole.decode().split()  # white space between values
    path.write_bytes(whole)
    index = tmp_path / "a" / ".metadata"
    content = index.read_bytes()
    for place in range(0, 8 * len(content), 8 * len(content) // 50):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        index.write_bytes(changed)
        with pytest.raises(ValueError, match=r"changed since it was written: \.metadata"):
            load_sharded(tmp_path / "a", run.model, run.optimizers)


@pytest.mark.parametrize("changes", [{"state": {"step": 2}}, {"ranks": 2}, {"sha256": {}}])
def test_a_state_that_was_edited_is_refused(tmp_path, changes):
    run = Run(CASES["all"], World())
    save_sharded(tmp_path / "a", run.model, run.optimizers, {"step": 1})
    path = tmp_path / "a" / STATE_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match="not as they were written"):
        load_sharded(tmp_path / "a", run.model, run.optimizers)


def test_a_state_of_before_the_digest_is_read(tmp_path):
    run = Run(CASES["all"], World())
    save_sharded(tmp_path / "a", run.model, run.optimizers, {"step": 1})
    path = tmp_path / "a" / STATE_FILE
    contents = json.loads(path.read_text())
    del contents["digest"]
    path.write_text(json.dumps(contents))
    assert load_sharded(tmp_path / "a", run.model, run.optimizers) == {"step": 1}


def test_another_models_checkpoint_is_refused(tmp_path):
    run = Run(CASES["all"], World())
    run.step(0)
    save_sharded(tmp_path / "a", run.model, run.optimizers, {"step": 1})
    other = Run(CASES["checkpointing"], World())  # has a head of its own
    with pytest.raises(ValueError, match=r"another model or optimiser.*lm_head"):
        load_sharded(tmp_path / "a", other.model, other.optimizers)
    frozen = Run(CASES["all"], World())
    some = {"adamw": torch.optim.AdamW(frozen.model.llm.parameters())}
    with pytest.raises(ValueError, match=r"optimizer/adamw/connector"):
        load_sharded(tmp_path / "a", frozen.model, some)
