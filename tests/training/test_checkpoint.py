from __future__ import annotations

import errno
import json
import os
import random
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nanomolmo2.checks import with_digest
from nanomolmo2.training import checkpoint as module
from nanomolmo2.training.checkpoint import (
    ABOUT,
    FILE,
    Checkpoints,
    Position,
    random_state,
    set_random_state,
)
from nanomolmo2.training.optim import OptimConfig, Optimizers


class Run:
    """A small model whose weights say which step was saved."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.said: list[str] = []
        self.checkpoints = Checkpoints(folder, keep, self.said.append)
        self.model = nn.Linear(64, 64)
        self.optimizers = Optimizers({"all": (self.model, OptimConfig(matrix_lr=0.0))})

    def save(self, step: int, score: float | None = None) -> None:
        with torch.no_grad():
            self.model.weight.fill_(step)
        position = Position(0, step, step, {"drawn": [step]}, score=score)
        self.checkpoints.save(position, self.model, self.optimizers)

    def resume(self) -> int | None:
        position = self.checkpoints.newest()
        if position is None:
            return None
        self.checkpoints.restore(position, self.model, self.optimizers)
        assert position.data == {"drawn": [position.step]}
        assert bool((self.model.weight == position.step).all())
        return position.step

    @property
    def folders(self) -> list[str]:
        return sorted(os.listdir(self.checkpoints.folder))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(tmp_path)
    for step in (1, 2):
        made.save(step)
    return made


def test_the_newest_comes_back(run: Run) -> None:
    assert run.resume() == 2
    assert run.said == []


def test_there_may_be_none(tmp_path: Path) -> None:
    assert Run(tmp_path).resume() is None


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """One bit, in the middle of the weights: nothing but a checksum can tell."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (FILE, cut),
        (FILE, flip),
        (FILE, Path.unlink),
        (FILE, lambda path: path.write_bytes(b"")),
        (ABOUT, cut),
        (ABOUT, Path.unlink),
        (ABOUT, lambda path: path.write_text("[]")),
        (ABOUT, lambda path: path.write_text("{}")),
    ],
)
def test_a_damaged_one_falls_back_to_the_one_before_and_says_so(run: Run, file, damage) -> None:
    damage(run.checkpoints.folder / "000000002" / file)
    assert run.resume() == 1
    (said,) = run.said
    assert "000000002 is damaged" in said and "going on from the one before it" in said
    assert any(name.startswith("000000002") and "damaged" in name for name in run.folders)
    run.save(2)  # its place is free again
    assert run.resume() == 2


def test_every_flipped_bit_of_the_position_is_found(run: Run) -> None:
    """A step, a place in the data or a checksum that is another one is silently another run."""
    path = run.checkpoints.folder / "000000002" / ABOUT
    whole, (expected, _) = path.read_bytes(), module._read_about(path.parent)
    accepted = []
    for place in range(8 * len(whole)):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        try:
            position, _ = module._read_about(path.parent)
        except Exception:  # as in Checkpoints.newest
            continue
        accepted.append(content.decode())
        assert position == expected
    # What may differ is white space between values, which says nothing.
    assert all(text.split() == whole.decode().split() for text in accepted)


@pytest.mark.parametrize(
    "change",
    [
        {"step": 1},
        {"done": 3},
        {"data": {"drawn": [3]}},
        {"score": 0.5},
        {"sha256": {}},
        {"digest": "0" * 64},
        {"digset": 1},
        {"log": {"sums": {"loss": 1.0}, "counts": {"loss": 1}}},
    ],
)
def test_a_position_that_was_edited_is_not_used(run: Run, change: dict) -> None:
    path = run.checkpoints.folder / "000000002" / ABOUT
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert run.resume() == 1
    assert "000000002 is damaged" in run.said[0]


def test_a_digest_cannot_be_left_out(run: Run) -> None:
    path = run.checkpoints.folder / "000000002" / ABOUT
    about = json.loads(path.read_text())
    del about["digest"]
    path.write_text(json.dumps(about))
    assert run.resume() == 1
    assert "its digest is missing" in run.said[0]


def without_digest(run: Run, **changes: object) -> None:
    """As versions before the digest wrote it."""
    path = run.checkpoints.folder / "000000002" / ABOUT
    about = {**json.loads(path.read_text()), **changes}
    del about["digest"], about["sources"]
    path.write_text(json.dumps(about, indent=1))


def test_a_checkpoint_of_before_the_digest_is_read(run: Run) -> None:
    without_digest(run)
    assert run.resume() == 2
    assert run.said == []


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "2"},
        {"step": True},
        {"step": -2},
        {"step": 3},
        {"done": 2.0},
        {"stage": None},
        {"score": "low"},
        {"log": [1]},
        {"log": {"sums": {"loss": "1"}}},
        {"sha256": {}},
        {"sha256": ["checkpoint.pt"]},
        {"sha256": {"checkpoint.pt": "0"}},
        {"sha256": {"../../checkpoint.pt": "0"}},
    ],
)
def test_types_are_checked_without_a_digest_too(run: Run, changes: dict) -> None:
    without_digest(run, **changes)
    assert run.resume() == 1


def test_a_damaged_one_is_never_the_best(run: Run) -> None:
    """The best one stays for ever: one whose score is no longer its own would push others out."""
    run.save(3, score=1.0)
    path = run.checkpoints.folder / "000000003" / ABOUT
    path.write_text(path.read_text().replace('"score": 1.0', '"score": "x"'))
    assert run.checkpoints.best() is None
    run.save(4, score=2.0)
    assert run.checkpoints.best() == "000000004"


def test_if_all_are_damaged_nothing_is_overwritten(run: Run) -> None:
    for step in (1, 2):
        cut(run.checkpoints.folder / f"00000000{step}" / FILE)
    with pytest.raises(ValueError, match=r"000000001 is damaged .* no other checkpoint is left"):
        run.resume()
    assert "000000001" in run.folders


def test_a_checkpoint_runs_no_code(run: Run, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    folder = run.checkpoints.folder / "000000002"
    torch.save(Payload(), folder / FILE)
    about = json.loads((folder / ABOUT).read_text())
    about["sha256"][FILE] = module.sha256_of(folder / FILE)
    del about["digest"]
    (folder / ABOUT).write_text(json.dumps(with_digest(about)))
    with pytest.raises(Exception, match="weights_only"):
        run.resume()
    assert not (tmp_path / "ran").exists()


def test_the_last_ones_and_the_best_stay(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=2)
    for step, score in enumerate((5.0, 1.0, 3.0, 2.0, 4.0), start=1):
        run.save(step, score)
    assert run.folders == ["000000002", "000000004", "000000005"]
    assert run.checkpoints.best() == "000000002"


def test_leftovers_of_a_killed_process_go(run: Run) -> None:
    (run.checkpoints.folder / ".1a2b3c4d.tmp-000000003").mkdir()
    assert run.resume() == 2
    assert run.folders == ["000000001", "000000002"]


def test_a_full_disk_leaves_what_was_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in run.checkpoints.folder.rglob("*.*")}

    def full(value: object, stream: object) -> None:
        stream.write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.torch, "save", full)
    with pytest.raises(
        OSError,
        match=r"step 3 could .*No space left on device\); the one of step 2 is intact: free",
    ):
        run.save(3)
    assert {path: path.read_bytes() for path in run.checkpoints.folder.rglob("*.*")} == before
    assert run.folders == ["000000001", "000000002"]


def test_torchs_own_writer_meets_a_full_disk(run: Run) -> None:
    """The real thing: the system refuses bytes in the middle of the file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written .* step 2 is intact"):
            run.save(3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.folders == ["000000001", "000000002"]
    assert run.resume() == 2


def test_random_states_come_back() -> None:
    def draw() -> tuple[float, ...]:
        return random.random(), float(np.random.normal()), float(torch.rand(()))

    draw()  # one of numpy's pair of normal numbers waits now
    state = random_state()
    first = draw()
    set_random_state(state)
    assert draw() == first
