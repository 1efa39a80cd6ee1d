"""A checkpoint folder: written aside, in several weight files if large, then moved in."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanomolmo2.config import Config
from nanomolmo2.convert.parts import CONFIG_NAME, Part
from nanomolmo2.convert.state_dict import to_reference
from nanomolmo2.convert.tensor_files import INDEX_NAME, WEIGHTS_NAME


@contextlib.contextmanager
def written_aside(directory: str | Path) -> Iterator[Path]:
    """Give a folder to write to, whose files are moved into ``directory`` when all are complete.

    Other files in ``directory`` stay, except weights of an earlier save that are left over.

    Raises: ValueError for a path that is a file.
    """
    directory = Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file: name a folder to save the model in")
    aside = directory.with_name(f".{uuid.uuid4().hex[:8]}.tmp-{directory.name}")
    aside.mkdir(parents=True)
    try:
        yield aside
        _move_into(aside, directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_weights(
    tensors: Mapping[str, Tensor | Sequence[Tensor]], directory: Path, max_shard_size: int | str
) -> None:
    """Write safetensors beside the config, with an index where there are several files.

    Args:
        tensors: by name; of several, those that lie on top of each other in it. They are put
            together file by file, so no second copy of the model is made.
        max_shard_size: bytes, or text such as "5GB".
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    pieces = {n: (t,) if isinstance(t, Tensor) else tuple(t) for n, t in tensors.items()}
    plan = {name: torch.cat([p.detach().to("meta") for p in t]) for name, t in pieces.items()}
    pattern = WEIGHTS_NAME.replace(".", "{suffix}.")
    split = split_torch_state_dict_into_shards(
        plan, max_shard_size=max_shard_size, filename_pattern=pattern
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: _joined(pieces[name]) for name in names}
        save_file(shard, directory / file, metadata={"format": "pt"})
        # safetensors makes files that only their owner can read.
        shutil.copymode(directory / CONFIG_NAME, directory / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(directory / INDEX_NAME, index)


def write_part(
    part: Part, config: Config, state_dict: Mapping[str, Tensor], directory: Path
) -> None:
    """Write a pretrained part in the format of its reference, which transformers reads too."""
    write_json(directory / CONFIG_NAME, part.config_to_reference(config))
    write_weights(to_reference(state_dict, part.table), directory, "5GB")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write one object, indented."""
    text = json.dumps(values, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    on_cpu = [piece.detach().cpu() for piece in pieces]
    # Rows of one tensor under several names must not share memory in a file.
    whole = len(on_cpu) == 1 and on_cpu[0].untyped_storage().nbytes() == on_cpu[0].nbytes
    return on_cpu[0].contiguous() if whole else torch.cat(on_cpu)


def _move_into(aside: Path, directory: Path) -> None:
    """Put complete files where they belong; weights of an earlier save that are left over go."""
    if not directory.exists():
        os.replace(aside, directory)
        return
    names = sorted(p.name for p in aside.iterdir())
    for name in sorted(names, key=lambda n: n == CONFIG_NAME):
        os.replace(aside / name, directory / name)
    for pattern in (WEIGHTS_NAME, INDEX_NAME, "model-*-of-*.safetensors"):
        for old in directory.glob(pattern):
            if old.name not in names:
                old.unlink()
