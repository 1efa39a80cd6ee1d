"""What is written can be read by whom the umask lets: by the group, the server, everyone."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanomolmo2.convert import export_molmo2
from nanomolmo2.convert.pretrained import load
from nanomolmo2.convert.tensor_files import write_cache
from nanomolmo2.convert.tensor_writer import save_tensors


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def check_modes(folder: Path, umask: int) -> None:
    found = {path: path.stat().st_mode & 0o777 for path in folder.rglob("*")}
    assert found
    for path, mode in found.items():
        assert oct(mode) == oct((0o777 if path.is_dir() else 0o666) & ~umask), path


def test_tensors_and_what_is_said_of_them(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "a.safetensors"
    strided = torch.arange(6).view(2, 3).T
    for _ in range(2):  # the second time over the first
        save_tensors({"x": strided}, path, {"format": "pt"})
        assert torch.equal(load_file(path)["x"], strided)
    check_modes(tmp_path, umask)


def test_folders_of_models(tmp_path: Path, umask: int) -> None:
    model, processor = load("tiny")
    model.save_pretrained(tmp_path / "own", processor=processor)
    model.save_pretrained(tmp_path / "sharded", processor=processor, max_shard_size="5MB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_molmo2(model, tmp_path / "exported", processor)
    model.quantize("int8").save_pretrained(tmp_path / "int8", processor=processor)
    check_modes(tmp_path, umask)


def test_converted_files(tmp_path: Path, umask: int) -> None:
    write_cache(
        tmp_path / "a.pt", component="llm", config={}, source={}, state_dict={"x": torch.ones(2)}
    )
    check_modes(tmp_path, umask)
