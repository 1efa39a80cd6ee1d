"""A checkpoint folder: written aside, in several weight files if large, then moved in."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from nanomolmo2.checks import FULL_DISK
from nanomolmo2.config import Config, read_json_object
from nanomolmo2.convert.leftovers import locked_folder, remove_leftovers
from nanomolmo2.convert.parts import CONFIG_NAME, UNFINISHED, Part
from nanomolmo2.convert.state_dict import to_reference
from nanomolmo2.convert.tensor_files import INDEX_NAME, SAVE_ID, WEIGHTS_NAME
from nanomolmo2.convert.tensor_writer import save_tensors
from nanomolmo2.files import read_regular

QUANTIZATION = "quantization"  # the key of a config that says how weights are quantised

# Files that belong to a model, so that a folder of them alone may be written into.
_WEIGHTS = (WEIGHTS_NAME, INDEX_NAME, "model-*-of-*.safetensors")
_MODEL_FILES = (
    *(CONFIG_NAME, UNFINISHED, *_WEIGHTS, "README.md", "LICENSE*", "NOTICE", ".gitattributes"),
    *("generation_config.json", "chat_template.*", "*processor_config.json", "*processor.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "*molmo2.py", "*molmo_point.py", "nanomolmo2_config.json"),
)
# Errors of a disk that has no room or takes no files: none of them names a file.
NO_ROOM = (*FULL_DISK, errno.EROFS)


@contextlib.contextmanager
def written_aside(directory: str | Path, kind: str) -> Iterator[Path]:
    """Give a folder to write to, whose files are moved into ``directory`` when all are complete.

    Other files of a model's folder stay, except weights of an earlier save that are left over. A
    process that is killed while it writes leaves the folder as it was; one that is killed while the
    files are moved leaves a mark in it, by which no mixture is loaded, and the whole new model
    beside it.

    Args:
        directory: new, empty, or an earlier save.
        kind: of the model, as `kind_of` has it.
    Raises: ValueError for a path that is a file, a folder of other things, and a model of another
        kind; OSError naming the folder if the disk is full.
    """
    directory = Path(directory).resolve()
    if directory.exists():
        _check_place(directory, kind)
    mark = directory / UNFINISHED
    keep = Path(read_regular(mark, 300).decode()).name if mark.exists() else ""
    remove_leftovers(directory, keep)
    aside = directory.with_name(f".{uuid.uuid4().hex[:8]}.tmp-{directory.name}")
    with locked_folder(aside):
        try:
            yield aside
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, SafetensorError) or getattr(error, "errno", None) in NO_ROOM:
                reason = getattr(error, "strerror", None) or error
                raise OSError(
                    f"could not write {directory} ({reason}): is the disk full? Nothing there was "
                    f"changed"
                ) from None
            raise
        _move_into(aside, directory)
        shutil.rmtree(aside, ignore_errors=True)
    remove_leftovers(directory)


def kind_of(config: Mapping[str, Any]) -> str:
    """Of a model by its config: ``qwen3``, ``nanomolmo2``, ``quantised nanomolmo2``, ..."""
    quantised = "quantised " if config.get(QUANTIZATION) is not None else ""
    return f"{quantised}{config.get('model_type')}"


def _check_place(directory: Path, kind: str) -> None:
    """Raises: ValueError where a save would be mixed with other things, or would replace a model
    that it can not be made from again.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} is a file: name a folder to save the model in")
    try:
        found: str | None = kind_of(read_json_object(directory / CONFIG_NAME))
    except (OSError, ValueError):
        found = None  # no config, or a damaged one, which a new save repairs
    if found not in (None, "None", kind, f"quantised {kind}"):
        raise ValueError(
            f"{directory} holds a model of another kind, {found:.60}, which would be replaced by "
            f"one that is {kind}: name another folder"
        )
    names = sorted(path.name for path in directory.iterdir())
    others = [n for n in names if not any(fnmatch(n, pattern) for pattern in _MODEL_FILES)]
    if found in (None, "None") and others:
        raise ValueError(
            f"{directory} holds other things, such as {others[0][:80]!r}, and no model: name a new "
            f"or an empty folder"
        )


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

    pieces = {n: (t,) if isinstance(t, Tensor) else tuple(t) for n, t in tensors.items()}
    plan = {name: _stacked([p.detach().to("meta") for p in t]) for name, t in pieces.items()}
    pattern = WEIGHTS_NAME.replace(".", "{suffix}.")
    split = split_torch_state_dict_into_shards(
        plan, max_shard_size=max_shard_size, filename_pattern=pattern
    )
    # By the id files of two saves are told apart. One file alone has none: it stays the same bits.
    save = {SAVE_ID: uuid.uuid4().hex} if split.is_sharded else {}
    for file, names in split.filename_to_tensors.items():
        shard = {name: _joined(pieces[name]) for name in names}
        save_tensors(shard, directory / file, {"format": "pt", **save})
    if split.is_sharded:
        index = {"metadata": split.metadata | save, "weight_map": split.tensor_to_filename}
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
    return on_cpu[0].contiguous() if whole else _stacked(on_cpu)


def _stacked(pieces: Sequence[Tensor]) -> Tensor:
    """A copy of all; a single number cannot be put on top of others."""
    return pieces[0].clone() if len(pieces) == 1 else torch.cat(list(pieces))


def _move_into(aside: Path, directory: Path) -> None:
    """Put complete files where they belong; weights of an earlier save that are left over go."""
    if not directory.exists():
        os.replace(aside, directory)
        return
    names = sorted(path.name for path in aside.iterdir())
    mark = directory / UNFINISHED
    mark.write_text(aside.name, encoding="utf-8")
    for name in sorted(names, key=lambda n: n == CONFIG_NAME):
        _put(aside / name, directory / name)
    for pattern in _WEIGHTS:
        for old in directory.glob(pattern):
            if old.name not in names:
                old.unlink()
    mark.unlink()


def _put(source: Path, target: Path) -> None:
    """Give a file a second name, in place of what has it; ``source`` stays, for a process that is
    killed before the last file.
    """
    second = source.with_name(f".{source.name}")
    try:
        os.link(source, second)
    except OSError:  # drives without links
        second = source
    os.replace(second, target)
