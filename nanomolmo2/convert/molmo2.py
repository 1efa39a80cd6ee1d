"""Official Molmo2 checkpoints: a folder to a model, and a model to the tensors of such a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from nanomolmo2.config import describe, read_json_object
from nanomolmo2.convert.config_checks import check_fields, in_file
from nanomolmo2.convert.molmo2_config import (
    check_expressible,
    molmo2_config_from_reference,
)
from nanomolmo2.convert.parts import CONFIG_NAME, build_on_meta, check_depth, read_config
from nanomolmo2.convert.state_dict import from_rows, to_rows
from nanomolmo2.convert.tables import MOLMO2_LEGACY, MOLMO2_NATIVE
from nanomolmo2.convert.tensor_files import Readable, StoredTensor, open_safetensors
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.models.language_model import LLMConfig
from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config

GENERATION_NAME = "generation_config.json"
PREPROCESSOR_NAME = "preprocessor_config.json"
OFFICIAL_PROCESSOR_NAME = "processor_config.json"

_BASE = "model.transformer.wte.embedding"
_NEW = "model.transformer.wte.new_embedding"


def open_molmo2(directory: str | Path) -> tuple[NanoMolmo2, Mapping[str, Readable]]:
    """Open an official checkpoint: the model on the meta device, and its tensors, not read yet.

    The released names and those of transformers are read, the released ones also with the embedding
    cut in two halves, as transformers' ``save_pretrained`` writes them.

    Raises: ValueError for a config that is not built here, or tensors that do not fit it.
    """
    directory = Path(directory)
    config = read_reference(directory, molmo2_config_from_reference)
    tensors = open_safetensors(directory)
    for part in (config.vision_config, config.llm_config):
        # A config may count blocks that are not stored, but then those before them are.
        check_depth(part, len(tensors), str(directory))
    model = cast(NanoMolmo2, build_on_meta(NanoMolmo2, config, directory / CONFIG_NAME))
    legacy = any(name.startswith(("model.transformer.", "model.vision_")) for name in tensors)
    legacy = legacy and not any(name.startswith("model.vision_tower.") for name in tensors)
    found = from_rows(
        tensors,
        MOLMO2_LEGACY if legacy else MOLMO2_NATIVE,
        expected=model.state_dict(),
        heights=_embedding_heights(tensors, config.llm_config, directory),
        source=str(directory),
    )
    return model, found


def read_reference(directory: Path, read: Callable[..., NanoMolmo2Config]) -> NanoMolmo2Config:
    """The config of an official folder, by what reads its ``config.json``.

    Raises: ValueError naming the file.
    """
    values = read_config(directory)
    generation = read_if_there(directory / GENERATION_NAME)
    with in_file(directory / GENERATION_NAME):
        check_fields(generation)
    with in_file(directory / CONFIG_NAME):
        check_fields(values)
        return read(values, generation=generation, pooling_size=pooling_size_of(directory))


def molmo2_tensors(
    state_dict: Mapping[str, Tensor], config: NanoMolmo2Config
) -> dict[str, tuple[Tensor, ...]]:
    """The tensors of the released layout, each as the views that lie on top of each other in it.

    Raises: ValueError for a model that the format can not express.
    """
    check_expressible(config)
    llm = config.llm_config
    heights = {_BASE: llm.vocab_size, _NEW: llm.additional_vocab_size}
    stacked = to_rows(state_dict, MOLMO2_LEGACY, heights=heights)
    # A tied head is written out: no server ties it to the first rows of the embedding.
    stacked.setdefault("lm_head.weight", stacked[_BASE])
    return stacked


def _embedding_heights(
    tensors: Mapping[str, StoredTensor], llm: LLMConfig, directory: Path
) -> dict[str, int]:
    """Rows of the two parts of the embedding: base and new ones, or one half each."""
    heights = {_BASE: llm.vocab_size, _NEW: llm.additional_vocab_size}
    if _BASE not in tensors or _NEW not in tensors:
        return heights
    first, second = (tensors[name].shape[:1] for name in (_BASE, _NEW))
    if first != second or first == (llm.vocab_size,):
        return heights
    # The halves in order are the whole embedding, so they are joined as they are.
    if 2 * first[0] != llm.num_embeddings:
        raise ValueError(
            f"{directory}: the embedding is split into two halves of {first[0]} rows, as "
            f"transformers' save_pretrained does, but together they should have "
            f"{llm.num_embeddings} (vocab_size {llm.vocab_size} + additional_vocab_size "
            f"{llm.additional_vocab_size}): save it again with save_original_format=False"
        )
    return dict.fromkeys(heights, first[0])


def pooling_size_of(directory: Path) -> int:
    """Side of an image's windows, from the processor's files; 2 where they do not say."""
    for name in (OFFICIAL_PROCESSOR_NAME, PREPROCESSOR_NAME):
        values = read_if_there(directory / name)
        for place in (values.get("image_processor"), values):
            size = place.get("pooling_size") if isinstance(place, Mapping) else None
            if size is None:
                continue
            sides = size if isinstance(size, list) else [size, size]
            if len(sides) != 2 or sides[0] != sides[1] or type(sides[0]) is not int:
                raise ValueError(
                    f"pooling_size in {name} is {describe(size)}, but only squares are built"
                )
            return int(sides[0])
    return 2


def read_if_there(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one without the file."""
    return read_json_object(path) if path.exists() else {}
