"""A file or folder is complete or not there."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from pathlib import Path

import pytest

from nanomolmo2.checks import (
    check_replaceable,
    named_errors,
    refuse_overwriting,
    sha256_of,
    written,
)
from nanomolmo2.files import atomic_path, open_regular, read_regular


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_new_file_appears_at_the_end_only(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent  # a rename never crosses file systems
        assert temporary.suffix == ".txt"  # writers choose the format by it
    assert path.read_text() == "new"
    assert names(path.parent) == ["file.txt"]


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("disk full")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_an_interrupt_leaves_nothing_half_written(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "file.txt") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_file_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file.txt"]


def write_folder(folder: Path, content: str, *files: str) -> None:
    folder.mkdir()
    for name in files:
        (folder / name).write_text(content)


def test_a_folder_replaces_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write_folder(path, "old", "weights", "stale")
    with atomic_path(path) as temporary:
        write_folder(temporary, "new", "weights", "config")
        assert names(path) == ["stale", "weights"]
    assert names(path) == ["config", "weights"]
    assert (path / "weights").read_text() == "new"
    assert names(tmp_path) == ["model"]


def test_an_error_leaves_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write_folder(path, "old", "weights")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        write_folder(temporary, "new", "weights", "config")
        raise RuntimeError("disk full")
    assert names(path) == ["weights"]
    assert (path / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_a_rename_that_fails_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    write_folder(path, "old", "weights")
    rename = os.replace

    def fail_on_the_new(source: Path, target: Path) -> None:
        if ".tmp-" in Path(source).name:
            raise OSError("disk gone")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fail_on_the_new)
    with pytest.raises(OSError, match="disk gone"), atomic_path(path) as temporary:
        write_folder(temporary, "new", "weights")
    assert (path / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_an_error_of_the_disk_names_the_file(tmp_path: Path) -> None:
    """Not the temporary one, and not none at all, as where the disk is full."""
    path = tmp_path / "file.txt"
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match=r"No space .*: '.*/file\.txt'"), atomic_path(path) as aside:
        aside.write_text("half")
        raise full
    with pytest.raises(FileNotFoundError, match=r": '.*/file\.txt'"), atomic_path(path):
        pass  # nothing was written
    with pytest.raises(FileNotFoundError, match="other"), atomic_path(path):
        (tmp_path / "other").read_text()
    assert names(tmp_path) == []


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with atomic_path(path) as first, atomic_path(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the outer one ends last
    assert names(tmp_path) == ["file.txt"]


def test_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("kind", ["folder", "device", "pipe", "link to a device", "of the kernel"])
def test_only_regular_files_are_opened(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)  # nobody writes: a plain open would wait for ever
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "of the kernel":
        path = Path("/proc/self/status")
    else:
        path.symlink_to("/dev/zero")
    for read in (open_regular, sha256_of, lambda path: read_regular(path, 10)):
        with pytest.raises(ValueError, match="expected a regular file"):
            read(path)


def test_a_file_is_read_up_to_a_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1234")
    assert read_regular(tmp_path / "a", 4) == b"1234"
    with pytest.raises(ValueError, match="4 bytes, expected at most 3"):
        read_regular(tmp_path / "a", 3)
    with pytest.raises(ValueError, match="no name of a file"):
        read_regular(f"{tmp_path}/a\0b", 3)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "b", 3)


def test_an_input_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    own = tmp_path / "data" / "own.png"
    own.write_bytes(b"pixels")
    (tmp_path / "soft.png").symlink_to(own)
    os.link(own, tmp_path / "hard.png")
    spelled = Path(f"{tmp_path}/data/../data/own.png")
    for out in (own, spelled, tmp_path / "soft.png", tmp_path / "hard.png", own.parent):
        with pytest.raises(ValueError, match=r"own\.png.*which is read"):
            refuse_overwriting(out, [tmp_path / "other.png", own])
    refuse_overwriting(tmp_path / "new.png", [own])
    refuse_overwriting(own.parent / "new.png", [own.parent])  # beside an input


# ---- outputs ----


def test_only_a_folder_of_known_files_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    known = ("*.safetensors", "config.json")
    check_replaceable(folder, known)  # new
    folder.mkdir()
    check_replaceable(folder, known)  # empty
    (folder / "config.json").touch()
    (folder / "a.safetensors").touch()
    check_replaceable(folder, known)
    for other in ("photo.jpg", "config.json.bak", ".hidden"):
        (folder / other).touch()
        with pytest.raises(ValueError, match=f"holds other things, such as {re.escape(other)}"):
            check_replaceable(folder, known)
        (folder / other).unlink()
    (folder / "b.safetensors").mkdir()  # a folder may hold anything
    with pytest.raises(ValueError, match="holds other things"):
        check_replaceable(folder, known)
    with pytest.raises(ValueError, match="is a file"):
        check_replaceable(folder / "config.json", known)


def test_an_error_names_the_output(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    path.write_text("old")
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),  # names no file
        OSError("encoder error -2 when writing image file"),  # nor a reason
        OSError(errno.EIO, "I/O error", str(tmp_path / ".12345678.tmp-out.bin")),
    ):
        expected = r"out\.bin could not be written .*is the disk full"
        with pytest.raises(OSError, match=expected), written(path):
            raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["out.bin"]


def test_errors_of_other_files_stay(tmp_path: Path) -> None:
    for error in (
        FileNotFoundError(errno.ENOENT, "No such file", "in.png"),
        FileNotFoundError("there is no file in.png"),
        ValueError("wrong"),
    ):
        with pytest.raises(type(error)) as found, named_errors(tmp_path / "out.bin"):
            raise error
        assert found.value is error
