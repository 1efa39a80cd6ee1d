"""MolmoPoint checkpoints: a folder to a model, and a model to the tensors of such a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from torch import Tensor

from nanomolmo2.convert.config_checks import in_file
from nanomolmo2.convert.molmo2 import read_reference
from nanomolmo2.convert.molmo_point_config import (
    check_point_expressible,
    molmo_point_config_from_reference,
    molmo_point_config_to_reference,
)
from nanomolmo2.convert.parts import CONFIG_NAME, build_on_meta, check_depth
from nanomolmo2.convert.state_dict import from_rows, to_rows
from nanomolmo2.convert.tables import MOLMO_POINT, MOLMO_POINT_TRAINING
from nanomolmo2.convert.tensor_files import Readable, StoredTensor, open_safetensors
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.models.language_model import LLMConfig
from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config

OWN_CONFIG_NAME = "nanomolmo2_config.json"

# (base rows, additional rows) of the embedding, and of the head, which tied models lack: released
# names, then those of the training code.
_EMBEDDINGS = (
    ("model.transformer.wte.embedding", "model.transformer.wte.new_embedding"),
    ("transformer.wte.embedding", "transformer.wte.new_embedding"),
)
_HEADS = (
    ("lm_head.output_embeddings", "lm_head.new_output_embeddings"),
    ("transformer.ff_out.weight", "transformer.ff_out.new_weight"),
)


def open_molmo_point(directory: str | Path) -> tuple[NanoMolmo2, Mapping[str, Readable]]:
    """Open a MolmoPoint checkpoint: the model on the meta device, and its tensors, not read yet.

    The released names are read, and those of AI2's training code.

    Raises: ValueError for a config that is not built here, or tensors that do not fit it.
    """
    directory = Path(directory)
    config = molmo_point_config(directory)
    llm = config.llm_config
    # Checkpoints of an older time have a list of connectors, of one.
    tensors = {
        name.replace("connectors.0.", "connector.", 1): tensor
        for name, tensor in open_safetensors(directory).items()
    }
    for part in (config.vision_config, llm):
        # A config may count blocks that are not stored, but then those before them are.
        check_depth(part, len(tensors), str(directory))
    if llm.tie_word_embeddings:
        tensors = _without_tied_head(directory, tensors)
    _check_additional(directory, tensors, llm)
    model = cast(NanoMolmo2, build_on_meta(NanoMolmo2, config, directory / CONFIG_NAME))
    found = from_rows(
        tensors,
        MOLMO_POINT_TRAINING if _EMBEDDINGS[1][0] in tensors else MOLMO_POINT,
        expected=model.state_dict(),
        heights=_heights(llm),
        source=str(directory),
    )
    return model, found


def molmo_point_config(directory: Path) -> NanoMolmo2Config:
    """The config of a folder: what `OWN_CONFIG_NAME` says, where one of ours wrote it, and else
    `released`.

    Raises: ValueError naming the file, also where the two files are of different models.
    """
    config = read_reference(directory, molmo_point_config_from_reference)
    path = directory / OWN_CONFIG_NAME
    if not path.exists():
        return config
    own = NanoMolmo2Config.load(path)
    with in_file(path):
        expected = molmo_point_config_to_reference(own)
        found = molmo_point_config_to_reference(config)
        for name in expected:
            if found[name] != expected[name]:
                raise ValueError(
                    f"it is of another model than {CONFIG_NAME}, where {name} differs: copy both "
                    f"again, or remove it to read the checkpoint by the rule of the released models"
                )
    return own


def molmo_point_tensors(
    state_dict: Mapping[str, Tensor], config: NanoMolmo2Config
) -> dict[str, tuple[Tensor, ...]]:
    """The tensors of the released layout, each as the views that lie on top of each other in it.

    Raises: ValueError for a model that the format can not express.
    """
    check_point_expressible(config)
    return to_rows(state_dict, MOLMO_POINT, heights=_heights(config.llm_config))


def _heights(llm: LLMConfig) -> dict[str, int]:
    """Rows of the two parts of embedding and head."""
    return {
        name: rows
        for pair in (*_EMBEDDINGS, *_HEADS)
        for name, rows in zip(pair, (llm.vocab_size, llm.additional_vocab_size), strict=True)
    }


def _check_additional(directory: Path, tensors: Mapping[str, StoredTensor], llm: LLMConfig) -> None:
    """Classes of points count on from the rows of the embedding, so one row too many moves all.

    Raises: ValueError naming both numbers.
    """
    for _, name in (*_EMBEDDINGS, *_HEADS):
        rows = tensors[name].shape[0] if name in tensors and tensors[name].shape else None
        if rows not in (None, llm.additional_vocab_size):
            raise ValueError(
                f"the tensors of {directory} do not fit the model: {name} has {rows} rows, but "
                f"additional_vocab_size is {llm.additional_vocab_size}, and the classes of points "
                f"are numbered behind them: correct text_config.additional_vocab_size in "
                f"{CONFIG_NAME}, or use the weights that belong to it"
            )


def _without_tied_head(
    directory: Path, tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Drop the copies of the embedding that a file of a tied model may hold as its head."""
    kept = dict(tensors)
    for heads, embeddings in zip(_HEADS, _EMBEDDINGS, strict=True):
        for head, embedding in zip(heads, embeddings, strict=True):
            copy = kept.pop(head, None)
            if copy is not None and embedding in kept and not copy.equals(kept[embedding]):
                raise ValueError(
                    f"{directory / CONFIG_NAME} says tie_word_embeddings, but {head} is not a copy "
                    f"of {embedding}: set text_config.tie_word_embeddings to false if the head was "
                    f"trained on its own"
                )
    return kept
