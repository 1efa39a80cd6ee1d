"""What is saved is one model or the other, no mixture, and never in place of something else."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from nanomolmo2.convert import folder as folder_module
from nanomolmo2.convert.export import export_molmo2
from nanomolmo2.convert.folder import written_aside
from nanomolmo2.convert.leftovers import locked_folder
from nanomolmo2.convert.pretrained import load, load_nanomolmo2, save_pretrained
from nanomolmo2.convert.tensor_files import write_cache
from nanomolmo2.models import LanguageModel, NanoMolmo2
from tests.convert.checkpoints import LLM, edit_json, make_nanomolmo2
from tests.convert.test_pretrained import assert_same_bits
from tests.small_model import small_model, small_processor

SMALL = "50KB"  # shards


def changed_model() -> NanoMolmo2:
    model = make_nanomolmo2()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return model


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


class Killed(BaseException):
    """In place of a signal: what the code does on errors must not help it."""


@pytest.mark.parametrize("shards", [SMALL, "5GB"])
def test_a_save_that_is_killed_between_its_files_is_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: str
) -> None:
    """Whichever file is the last one; and the next save is whole."""
    path, old, new = tmp_path / "model", make_nanomolmo2(), changed_model()
    rename, moved = os.replace, 0
    for last in range(50):
        old.save_pretrained(path, max_shard_size=SMALL)
        assert hidden(tmp_path) == hidden(path) == []
        moved = 0

        def kill(source: Any, target: Any, last: int = last) -> None:
            nonlocal moved
            if Path(target).parent == path:
                moved += 1
                if moved > last:
                    raise Killed
            rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", kill)
            try:
                new.save_pretrained(path, max_shard_size=shards)
            except Killed:
                pass
            else:
                break
        for read in (load_nanomolmo2, load, LanguageModel.from_pretrained):
            with pytest.raises(ValueError, match=r"holds files of two models.*save it again") as e:
                read(path)
        (aside,) = hidden(tmp_path)
        assert str(tmp_path / aside) in str(e.value)
        assert_same_bits(load_nanomolmo2(tmp_path / aside), new)  # nothing is lost
    assert last > (5 if shards == SMALL else 2)
    assert_same_bits(load_nanomolmo2(path), new)
    assert hidden(tmp_path) == hidden(path) == []


KILLED = """
import os, signal, sys
from nanomolmo2.convert import folder
from tests.convert.test_folders import changed_model

def write(*_):
    os.kill(os.getpid(), signal.SIGKILL)

folder.write_json = write  # the index, behind all shards
changed_model().save_pretrained(sys.argv[1], max_shard_size="50KB")
"""


def test_what_a_killed_process_left_goes_with_the_next_save(tmp_path: Path) -> None:
    path, old = tmp_path / "model", make_nanomolmo2()
    old.save_pretrained(path, max_shard_size=SMALL)
    command = [sys.executable, "-c", KILLED, str(path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = hidden(tmp_path)
    assert left.endswith(".tmp-model")
    assert_same_bits(load_nanomolmo2(path), old)
    with locked_folder(tmp_path / ".01234567.tmp-model"):  # of a process that lives
        (tmp_path / ".mine.tmp-model").mkdir()  # a name that no save makes
        old.save_pretrained(path)
        assert hidden(tmp_path) == [".01234567.tmp-model", ".mine.tmp-model"]


def test_what_a_killed_download_left_goes_with_the_next_one(tmp_path: Path) -> None:
    left = tmp_path / ".89abcdef.tmp-x.pt"
    left.write_bytes(b"half")
    llm = LanguageModel(LLM)
    write_cache(
        tmp_path / "x.pt",
        component="llm",
        config=LLM.to_dict(),
        source={},
        state_dict=llm.state_dict(),
    )
    assert hidden(tmp_path) == []
    assert_same_bits(LanguageModel.from_pretrained(tmp_path / "x.pt"), llm)


def test_shards_of_two_saves_of_one_size(tmp_path: Path) -> None:
    """Names, shapes and files are the same: only the id tells them apart."""
    make_nanomolmo2().save_pretrained(tmp_path / "a", max_shard_size=SMALL)
    changed_model().save_pretrained(tmp_path / "b", max_shard_size=SMALL)
    for file in ("model-00002-of-*", "model.safetensors.index.json"):
        (mine,), (other,) = (list((tmp_path / f).glob(file)) for f in "ab")
        kept = mine.read_bytes()
        mine.write_bytes(other.read_bytes())
        with pytest.raises(ValueError, match=r"not of the same save.*shards are of different"):
            load_nanomolmo2(tmp_path / "a")
        mine.write_bytes(kept)
        load_nanomolmo2(tmp_path / "a")
    # Shards of before there were ids beside those of a save with one.
    index = tmp_path / "a" / "model.safetensors.index.json"
    edit_json(index, metadata={"total_size": 1})
    with pytest.raises(ValueError, match="not of the same save"):
        load_nanomolmo2(tmp_path / "a")


def test_a_file_that_is_replaced_while_it_is_read(tmp_path: Path) -> None:
    from nanomolmo2.convert.tensor_files import open_safetensors

    make_nanomolmo2().save_pretrained(tmp_path)
    tensors = open_safetensors(tmp_path)
    changed_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors was replaced while it was read"):
        tensors["llm.norm.weight"].read()


# ---- places ----


def photos(path: Path) -> None:
    (path / "holiday.jpg").write_bytes(b"pixels")


def checkout(path: Path) -> None:
    (path / ".git").mkdir()
    (path / "README.md").write_text("a program")


def data(path: Path) -> None:
    (path / "train.jsonl").write_text("{}\n")
    (path / "config.json").write_text("{}")


def decoder(path: Path) -> None:
    save_pretrained(LanguageModel(LLM), path)


def plain(path: Path) -> None:
    make_nanomolmo2().save_pretrained(path)


def our_format(path: Path) -> None:
    small_model().save_pretrained(path, processor=small_processor())


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.is_file()}


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (photos, r"holds other things, such as 'holiday\.jpg', and no model: name a new"),
        (checkout, r"holds other things, such as '\.git'"),
        (data, r"holds other things, such as 'train\.jsonl'"),
        (decoder, "holds a model of another kind, qwen3, .* by one that is nanomolmo2"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_place_that_holds_something_else(there: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    there(path)
    before = contents(path)
    with pytest.raises(ValueError, match=message):
        make_nanomolmo2().save_pretrained(path)
    assert contents(path) == before
    assert not hidden(tmp_path)


def test_weights_are_not_replaced_by_quantised_ones_or_another_layout(tmp_path: Path) -> None:
    """``quantize m m`` and ``export m m`` destroyed what they were made from."""
    our_format(tmp_path)
    before = contents(tmp_path)
    model, processor = load(tmp_path)
    with pytest.raises(ValueError, match=r"another kind, nanomolmo2, .* that is molmo2"):
        export_molmo2(model, tmp_path, processor)
    with pytest.raises(ValueError, match=r"another kind, nanomolmo2, .* that is quantised nano"):
        model.quantize("int8").save_pretrained(tmp_path, processor=processor)
    assert contents(tmp_path) == before
    link = tmp_path.with_name("link")
    link.symlink_to(tmp_path)
    with pytest.raises(ValueError, match="another kind"):
        model.save_pretrained(link)


def test_an_earlier_save_and_an_empty_folder_are_places(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    model = make_nanomolmo2()
    for name in ("empty", "new"):
        for _ in range(2):
            model.save_pretrained(tmp_path / name)
    model.quantize("int8")
    for _ in range(2):
        model.save_pretrained(tmp_path / "quantised")
    plain(tmp_path / "quantised")  # which may be made again
    (tmp_path / "new" / "config.json").write_text("{ damaged")
    plain(tmp_path / "new")
    assert_same_bits(load_nanomolmo2(tmp_path / "new"), make_nanomolmo2())


# ---- a full disk, other people's words, rights ----


def no_room(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_room_in_rust(*_: Any, **__: Any) -> None:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("nanomolmo2.convert.tensor_writer.save_file", no_room_in_rust),
        ("pathlib.Path.write_text", no_room),
        ("pathlib.Path.chmod", no_room),
    ],
)
@pytest.mark.parametrize("kind", ["save", "export"])
def test_a_full_disk(
    place: str, error: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor, path = small_model(), small_processor(), tmp_path / "model"

    def write() -> None:
        if kind == "save":
            model.save_pretrained(path, processor=processor)
        else:
            with pytest.warns(UserWarning):
                export_molmo2(model, path, processor)

    write()
    before = contents(path)
    with monkeypatch.context() as patch:
        patch.setattr(place, error)
        with pytest.raises(OSError, match=r"could not write .*/model \(.*No space.*disk full") as e:
            if kind == "save":
                write()
            else:
                export_molmo2(model, path, processor)
    assert ".tmp-" not in str(e.value)
    assert contents(path) == before
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("kind", ["save", "export"])
def test_a_readme_in_another_encoding_stays(kind: str, tmp_path: Path) -> None:
    words = "Modèle à moi".encode("latin-1")
    (tmp_path / "README.md").write_bytes(words)
    if kind == "save":
        make_nanomolmo2().save_pretrained(tmp_path)
    else:
        with pytest.warns(UserWarning):
            export_molmo2(small_model(), tmp_path, small_processor())
    assert (tmp_path / "README.md").read_bytes() == words
    load_nanomolmo2(tmp_path)


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_rights_follow_the_umask(umask: int, tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "a", processor=small_processor(), max_shard_size=SMALL)
    with pytest.warns(UserWarning):
        export_molmo2(small_model(), tmp_path / "b", small_processor(), max_shard_size=SMALL)
    write_cache(
        tmp_path / "c" / "x.pt",
        component="llm",
        config={},
        source={},
        state_dict={"x": torch.ones(2)},
    )
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 12
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path
    for name in "abc":
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o777 & ~umask


def test_a_failure_while_files_are_moved_keeps_the_new_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    plain(path)
    monkeypatch.setattr(folder_module, "_put", no_room)
    with pytest.raises(OSError, match="No space"):
        changed_model().save_pretrained(path)
    (aside,) = hidden(tmp_path)
    assert_same_bits(load_nanomolmo2(tmp_path / aside), changed_model())
    with pytest.raises(ValueError, match="holds files of two models"):
        load_nanomolmo2(path)


def test_the_mark_names_no_other_place(tmp_path: Path) -> None:
    """It is a file of a stranger's folder like others."""
    plain(tmp_path / "model")
    (tmp_path / "model" / ".unfinished-save").write_text("../../etc")
    with pytest.raises(ValueError, match=r"if .*/etc is there") as caught:
        load_nanomolmo2(tmp_path / "model")
    assert str(tmp_path / "etc") in str(caught.value)
    with written_aside(tmp_path / "model", "nanomolmo2") as aside:
        (aside / "config.json").write_text(json.dumps({"model_type": "nanomolmo2"}))
    assert hidden(tmp_path / "model") == []
