"""Where a run writes: nothing else lies there, it can be written, and nobody else trains there."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from nanomolmo2.cli import main
from nanomolmo2.cli.train import Train
from nanomolmo2.recipes import finetune, smoke
from nanomolmo2.training import loop, run_folder, trainer
from nanomolmo2.training.lora import save_lora
from nanomolmo2.training.recipe import Recipe
from nanomolmo2.training.run_folder import (
    LOCK_FILE,
    check_contents,
    check_outside,
    check_space,
    claimed,
)
from nanomolmo2.training.trainer import build, train_recipe
from tests.training.recipes import toy
from tests.training.test_loop import Toy, train

ROOT = Path(__file__).parents[2]


@pytest.fixture
def said() -> list[str]:
    return []


def claim(folder: Path, said: list[str] | None = None, **options) -> None:
    with claimed(folder, info=(said if said is not None else []).append, **options):
        assert folder.is_dir()


# ---- what a run may be written among ----


def make(folder: Path, *files: str) -> Path:
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("kept")
    return folder


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("config.json", "model.safetensors"), r"holds a model \(config.json, model.safetensors\)"),
        (("my.jsonl", "images/a.png"), r"holds other things \(images, my.jsonl\) and no training"),
        (("a", "b", "c", "d"), r"holds other things \(a, b, c, ...\)"),
        (("mine/model/config.json",), r"holds other things \(mine\)"),
        (("model/config.json",), r"holds other things \(model\)"),
    ],
)
@pytest.mark.parametrize("resume", [False, True, "required"])
def test_a_folder_of_other_things_is_refused(tmp_path: Path, files, message, resume) -> None:
    folder = make(tmp_path / "there", *files)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        claim(folder, resume=resume)
    with pytest.raises(ValueError, match=message):
        claim(tmp_path / "there" / ".." / "there", resume=resume)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ValueError, match=message):
        claim(tmp_path / "link", resume=resume)
    (tmp_path / "link").unlink()
    assert sorted(tmp_path.rglob("*")) == before
    assert all((folder / name).read_text() == "kept" for name in files)


def test_a_file_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "file")
    with pytest.raises(ValueError, match="is a file: name a folder for the run"):
        claim(tmp_path / "file")
    with pytest.raises(OSError, match=r"file/run cannot be written \(Not a directory\)"):
        claim(tmp_path / "file" / "run")


@pytest.mark.parametrize("files", [(), (".gitignore",), ("recipe.json",), (LOCK_FILE,)])
def test_a_new_run_begins_where_nothing_is_lost(tmp_path: Path, files: tuple[str, ...]) -> None:
    """A lock that a power cut left behind, or the recipe of a run that was ended at its start."""
    claim(make(tmp_path, *files))


def test_the_model_to_start_from_is_not_overwritten(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "recipe.json", "model/config.json")
    with pytest.raises(ValueError, match=r"run/model would be written over .*run/model"):
        claim(run, inputs=[run / "model"], resume=True)
    (tmp_path / "link").symlink_to(run / "model")
    with pytest.raises(ValueError, match="would be written over"):
        claim(run, inputs=[tmp_path / "link"], resume=True)
    claim(run, inputs=["tiny", make(tmp_path / "model", "config.json")], resume=True)
    claim(tmp_path / "other", inputs=[run / "model"])


def test_a_run_does_not_become_its_own_data(tmp_path: Path) -> None:
    data = make(tmp_path / "data", "my.jsonl")
    for out in (data / "run", data / "runs" / "a", data):
        with pytest.raises(ValueError, match="whose files are the data"):
            check_outside(out, [data])
    check_outside(data / "run", [data / "my.jsonl", "emoji", "hub:name"])
    check_outside(tmp_path / "run", [data])


def test_a_run_that_goes_on_may_have_things_beside_it(tmp_path: Path, said) -> None:
    """Curves, notes, features: what people put there later."""
    train(tmp_path / "run", stop_after=2)
    make(tmp_path / "run", "curves.png", "notes.txt", "features/a")
    claim(tmp_path / "run", said, resume=True)
    assert said == []
    check_contents(tmp_path / "run")


# ---- nothing to resume ----


@pytest.mark.parametrize(
    ("folder", "why"),
    [("typo", "there is no such folder"), ("empty", "it is empty"), ("began", "no checkpoint")],
)
def test_nothing_to_resume_is_said(tmp_path: Path, capsys, folder: str, why: str) -> None:
    (tmp_path / "empty").mkdir()
    make(tmp_path / "began", "recipe.json", "log.jsonl")
    with pytest.raises(ValueError, match=f"nothing to resume in .*{folder} .*{why}"):
        claim(tmp_path / folder, resume="required")
    assert not (tmp_path / "typo").exists() and os.listdir(tmp_path / "empty") == []
    said: list[str] = []
    claim(tmp_path / folder, said, resume=True)
    (line,) = said
    assert f"nothing to resume in {tmp_path / folder}" in line and why in line
    assert "starting anew; --require-checkpoint" in line


def test_it_is_said_once_and_by_the_loop_too(tmp_path: Path, capsys) -> None:
    train(tmp_path / "run", resume=True, quiet=False, stop_after=1)
    assert capsys.readouterr().err.count("nothing to resume") == 1
    train(tmp_path / "run", resume="required", quiet=False)
    assert "nothing to resume" not in capsys.readouterr().err


def test_the_command_says_it_and_can_insist(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    toy(smoke()).save("toy.json")
    once = ["--max-steps", "1", "--workers", "0"]
    assert main(["train", "toy.json", "--out", "typo", "--require-checkpoint", *once]) == 1
    assert "there is nothing to resume in typo (there is no such folder)" in capsys.readouterr().err
    assert main(["train", "--out", "typo", "--resume", *once]) == 1
    assert "nothing to resume in typo, which has no recipe.json" in capsys.readouterr().err
    assert not Path("typo").exists()
    assert main(["train", "toy.json", "--out", "typo", "--resume", *once]) == 0
    assert "nothing to resume in typo (there is no such folder)" in capsys.readouterr().err
    assert main(["train", "--out", "typo", "--require-checkpoint", *once]) == 0
    assert "nothing to resume" not in capsys.readouterr().err


# ---- one process ----


def test_two_trainings_in_one_folder(tmp_path: Path) -> None:
    """They would write each other's checkpoints, and two seeds into one log."""
    code = (
        "import sys; from pathlib import Path\n"
        "from nanomolmo2.training.run_folder import claimed\n"
        "with claimed(Path(sys.argv[1])):\n"
        "    print('mine', flush=True); sys.stdin.read()\n"
    )
    run = tmp_path / "run"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    assert other.stdout is not None and other.stdout.readline() == "mine\n"
    for resume in (False, True):
        with pytest.raises(ValueError, match=f"run is in use: process {other.pid} trains in it"):
            claim(run, resume=resume)
    assert os.listdir(run) == [LOCK_FILE]
    other.send_signal(signal.SIGKILL)
    other.communicate(timeout=60)
    train(run, stop_after=1)  # freed by its death
    assert LOCK_FILE not in os.listdir(run)


def test_a_second_thread_is_refused_and_the_same_may_go_on(tmp_path: Path) -> None:
    problems: list[str] = []

    def other() -> None:
        try:
            claim(tmp_path / "run")
        except ValueError as error:
            problems.append(str(error))

    with claimed(tmp_path / "run"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert f"process {os.getpid()} trains in it" in problems[0]
        train(tmp_path / "run")
        with pytest.raises(ValueError, match="already holds a run"):
            loop.run(Toy(), [], tmp_path / "run")
        assert LOCK_FILE in os.listdir(tmp_path / "run")


def test_a_worker_that_outlives_its_parent_keeps_no_lock(tmp_path: Path) -> None:
    """A fork has the lock's file too; the system frees it when the last one closes it."""
    with claimed(tmp_path / "run"):
        child = os.fork()
        if not child:
            held = any(number is not None for _, number in run_folder._held.values())
            os._exit(int(held))
        assert os.waitpid(child, 0)[1] == 0
        assert run_folder._held


def test_a_disk_without_locks_is_noted(tmp_path: Path, said, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    claim(tmp_path / "run", said)
    (line,) = said
    assert "cannot be locked (No locks available): see that no other training writes" in line


def test_a_lock_that_another_one_removed_is_taken_anew(tmp_path: Path, monkeypatch) -> None:
    """The run before ends between our opening of the file and our lock."""
    real, calls = fcntl.flock, []

    def late(number: int, how: int) -> None:
        if not calls:
            (tmp_path / LOCK_FILE).unlink()
        calls.append(number)
        real(number, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with claimed(tmp_path):
        assert len(calls) == 2
        assert (tmp_path / LOCK_FILE).read_text().split()[0] == str(os.getpid())


# ---- places that cannot be written ----


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_place_that_cannot_be_written_is_found_at_the_start(
    tmp_path: Path, monkeypatch, number: int
) -> None:
    train(tmp_path / "run", stop_after=2)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def refuse(*_: object, **__: object):
        raise OSError(number, os.strerror(number))

    for name in ("open", "pwrite"):
        with monkeypatch.context() as patch:
            patch.setattr(run_folder.os, name, refuse)
            with pytest.raises(OSError, match=r"run/run.lock cannot be written \(") as raised:
                train(tmp_path / "run", resume=True)
        assert os.strerror(number) in str(raised.value)
        assert ("free some space" in str(raised.value)) == (number == errno.ENOSPC)
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.tempfile, "TemporaryFile", refuse)
        with pytest.raises(OSError, match=r"run cannot be written"):
            train(tmp_path / "run", resume=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("name", ["", "checkpoints", "log.jsonl"])
def test_a_part_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    train(tmp_path / "run", stop_after=2)
    path = tmp_path / "run" / name
    mode = path.stat().st_mode
    path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        with pytest.raises(OSError, match=r"cannot be written \(Permission denied\)"):
            train(tmp_path / "run", resume=True)
    finally:
        path.chmod(mode)


def test_a_log_that_is_a_pipe_keeps_nobody_waiting(tmp_path: Path) -> None:
    train(tmp_path / "run", stop_after=2)
    (tmp_path / "run" / "log.jsonl").unlink()
    os.mkfifo(tmp_path / "run" / "log.jsonl")
    with pytest.raises(ValueError, match=r"log\.jsonl is a device or a pipe"):
        train(tmp_path / "run", resume=True)


def test_folders_of_the_kernel_take_nothing() -> None:
    for folder in ("/proc/run", "/sys/run", "/dev/null/run"):
        with pytest.raises(OSError, match=f"{folder} cannot be written"):
            claim(Path(folder))


def test_a_disk_without_room_for_a_checkpoint(tmp_path: Path, monkeypatch) -> None:
    """Found before the first step, not at the first checkpoint, which may be hours later."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: usage(9e9, 9e9, 100))
    with pytest.raises(OSError, match="has 0 MB left, and a checkpoint of this run takes"):
        train(tmp_path / "run")
    assert not (tmp_path / "run" / "log.jsonl").exists()
    check_space(tmp_path, 100)


def test_what_was_made_for_nothing_goes_again(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), claimed(tmp_path / "a" / "b"):
        raise RuntimeError("the model cannot be loaded")
    assert os.listdir(tmp_path) == []
    (tmp_path / "mine").mkdir()
    claim(tmp_path / "mine")
    assert os.listdir(tmp_path) == ["mine"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_all_of_a_run_can_be_read_by_whom_the_umask_lets(tmp_path: Path, mask: int) -> None:
    """Features and LoRA's matrices were readable by their owner alone, beside files for all."""
    before = os.umask(mask)
    try:
        recipe = toy(
            finetune(["emoji"], "tiny", lora=True), steps=1, feature_cache=str(tmp_path / "cache")
        )
        assert train_recipe(recipe, tmp_path / "run", workers=0, quiet=True)
        model, _ = build(recipe)
        save_lora(model.llm, tmp_path / "adapter")
    finally:
        os.umask(before)
    found = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    names = {path.name for path in found}
    assert {"adapter_model.safetensors", "checkpoint.pt", "log.jsonl", "config.json"} <= names
    assert any(path.is_relative_to(tmp_path / "cache") and path.is_file() for path in found)
    for path, mode in found.items():
        assert oct(mode) == oct((0o777 if path.is_dir() else 0o666) & ~mask), path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seed", str(2**70)), f"--seed must be below 2**63, found {2**70}"),
        (("--seed", "-1"), "--seed must be 0 or more, found -1"),
        (("--seed", str(2**32)), f"--seed must be 0 to 4294967295, found {2**32}"),
        (("--max-bad-share", "1"), "--max-bad-share must be 0 to below 1"),
        (("--max-bad-share", "-0.1"), "--max-bad-share must be 0 to below 1"),
        (("--max-bad-share", "nan"), "--max-bad-share must be 0 to below 1"),
        (("--max-crops", "0"), "--max-crops must be 1 or more"),
        (("--sequence-length", "0"), "--sequence-length must be 1 or more"),
    ],
)
@pytest.mark.parametrize("name", ["smoke", "tiny"])
def test_numbers_out_of_range_are_one_sentence(
    tmp_path: Path, capsys, monkeypatch, name: str, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", name, *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_options_become_fields_of_the_recipe(tmp_path: Path, monkeypatch, capsys) -> None:
    """The share of bad examples may change on resume: it decides no number of a step."""
    monkeypatch.chdir(tmp_path)
    toy(smoke()).save("toy.json")
    given = ["train", "toy.json", "--out", "run", "--workers", "0", "--seed", str(2**32 - 1)]
    given += ["--max-crops", "5", "--sequence-length", "300"]
    assert main([*given, "--max-bad-share", "0.2", "--max-steps", "1"]) == 0
    made = Recipe.load("run/recipe.json")
    assert (made.seed, made.max_crops, made.sequence_length) == (2**32 - 1, 5, 300)
    assert made.max_bad_fraction == 0.2
    again = ["train", "--out", "run", "--resume", "--workers", "0", "--max-steps", "2"]
    assert main([*again, "--max-bad-share", "0.9"]) == 0
    assert main([*again, "--max-crops", "6"]) == 1
    assert "max_crops differ" in capsys.readouterr().err


def test_data_are_read_in_training_as_in_the_audit(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--pictures", "photos", "--points-scale", "percent")
    own = Train(data=("a.jsonl", "b.jsonl"), pictures=Path("photos"), points_scale="percent")
    for name in ("finetune", "base"):
        sources = own.recipe_in(tmp_path, name).data
        assert [source.path for source in sources] == ["a.jsonl", "b.jsonl"]
        assert {source.image_folder for source in sources} == {"photos"}
        assert {source.points_scale for source in sources} == {"percent"}
    for given in (options[:2], options[2:]):
        assert main(["train", "smoke", *given]) == 2
        assert "are of --data: give that too" in capsys.readouterr().err


def test_a_run_resumed_with_its_data_keeps_its_length(tmp_path: Path) -> None:
    """Warm-up follows from the steps: with those of the default the run was another one."""
    begun = finetune(["a.jsonl"], "tiny", steps=6)
    begun.save(tmp_path / "recipe.json")
    resumed = Train(data=("a.jsonl",), out=tmp_path, resume=True)
    assert resumed.recipe_in(tmp_path) == begun
    assert Train(data=("a.jsonl",), out=tmp_path).recipe_in(tmp_path).steps == 40


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
def test_a_recipe_has_a_seed_that_all_generators_know(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed is {seed}, expected 0 to 4294967295"):
        replace(smoke(), seed=seed)


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_a_recipe_has_a_share_of_bad_examples(share: float) -> None:
    with pytest.raises(ValueError, match=r"max_bad_fraction is .* from 0 to below 1"):
        replace(smoke(), max_bad_fraction=share)


def test_the_result_of_a_run_may_name_the_run(tmp_path: Path, monkeypatch, capsys) -> None:
    """Asked to go on with the model in its own folder, a run goes on; a new one is refused."""
    monkeypatch.chdir(tmp_path)
    toy(smoke(), steps=1).save("toy.json")
    run = ["train", "--out", "run", "--workers", "0"]
    assert main([*run, "toy.json"]) == 0
    longer = [*run, "toy.json", "--model", "./run/model", "--resume", "--max-steps", "2"]
    assert main(longer) == 0
    capsys.readouterr()
    before = sorted(Path("run").rglob("*"))
    assert main([*run, "toy.json", "--model", "run/model"]) == 1
    assert "run/model would be written over run/model, which is read" in capsys.readouterr().err
    assert sorted(Path("run").rglob("*")) == before


def test_ctrl_c_at_the_start_leaves_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    toy(smoke()).save("toy.json")
    for name in ("build", "RecipeStage", "shard"):
        with monkeypatch.context() as patch:
            patch.setattr(trainer, name, interrupted)
            assert main(["train", "toy.json", "--out", "runs/mine"]) == 130
        said = capsys.readouterr().err
        assert "interrupted" in said and "Traceback" not in said
        assert os.listdir(tmp_path) == ["toy.json"]


def test_the_commands_refuse_in_one_sentence(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = {"question": "Is it red?", "answer": "Yes."}
    make(tmp_path / "data").mkdir()
    (tmp_path / "data" / "my.jsonl").write_text(json.dumps(line))
    make(tmp_path / "model", "config.json")
    for arguments, message in (
        (["--data", "data/my.jsonl", "--out", "data"], "holds other things (my.jsonl)"),
        (["--data", "data", "--out", "data/run"], "whose files are the data"),
        (["--data", "data/my.jsonl", "--out", "model"], "holds a model (config.json)"),
        (["tiny", "--scale", "smoke", "--out", "model"], "holds a model (config.json)"),
        (["smoke", "--out", "./data/../model"], "holds a model (config.json)"),
    ):
        assert main(["train", *arguments]) == 1
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    assert sorted(str(path) for path in Path().rglob("*")) == [
        "data",
        "data/my.jsonl",
        "model",
        "model/config.json",
    ]
