"""The processor files of MolmoPoint folders <-> Processor.

They are Molmo2's, with tokens of their own for overviews and a tokenizer that ends with the names
of point classes, which only decoding needs: `read_backend` leaves them out, here they are written.
"""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import AddedToken

from nanomolmo2.convert.molmo2_processor import read_molmo2_processor, write_molmo2_processor
from nanomolmo2.convert.molmo_point import molmo_point_config
from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config
from nanomolmo2.processor.config import PointTokens
from nanomolmo2.processor.processor import TOKENIZER_FILE, Processor
from nanomolmo2.processor.tokenizer import Tokenizer

# Names of classes in the released tokenizers; 384 frames need 31,123.
NUM_CLASSES = 31_200


def read_molmo_point_processor(directory: str | Path) -> Processor:
    """Read the processor of a MolmoPoint folder, ours or an official one.

    Which tokens are markers and which are an overview's, ``config.json`` says.

    Raises: FileNotFoundError; ValueError for settings that are not built here, and a tokenizer
        without these tokens.
    """
    directory = Path(directory)
    return read_molmo2_processor(
        directory, lambda tokenizer: _point_tokens(molmo_point_config(directory), tokenizer)
    )


def write_molmo_point_processor(
    processor: Processor, directory: Path, config: NanoMolmo2Config
) -> None:
    """Write the official files, as near as they can say it, and our own settings."""
    write_molmo2_processor(processor, directory, config)
    backend = tokenizers.Tokenizer.from_str(processor.tokenizer.backend.to_str())
    used, first = processor.tokenizer.vocab_size, config.llm_config.num_embeddings
    fillers = [f"<|unused_{id}|>" for id in range(used, first)]
    backend.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in fillers])
    names = [f"<POINT_{number}>" for number in range(NUM_CLASSES)]
    backend.add_tokens([AddedToken(name, normalized=False) for name in names])
    text = backend.to_str(pretty=True)
    (directory / TOKENIZER_FILE).write_text(text, encoding="utf-8")


def _point_tokens(config: NanoMolmo2Config, tokenizer: Tokenizer) -> PointTokens:
    point = config.point_config
    assert point is not None
    names = {id: name for name, id in tokenizer.special_ids.items()}
    ids = [*point.marker_ids, point.image_non_indexable_patch_id]
    if missing := [id for id in ids if id is not None and id not in names]:
        raise ValueError(
            f"the tokenizer has no special token with the id {missing[0]}, which config.json says "
            f"is a marker of points or an overview's token: use the tokenizer.json that belongs to "
            f"the model"
        )
    patch, subpatch, location = (names[id] for id in point.marker_ids)
    overview = point.image_non_indexable_patch_id
    return PointTokens(
        patch_token=patch,
        subpatch_token=subpatch,
        location_token=location,
        overview_token=None if overview is None else names[overview],
        num_embeddings=config.llm_config.num_embeddings,
        points_in_prompt=point.points_in_prompt,
    )
