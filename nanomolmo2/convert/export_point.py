"""A model of ours to a folder in the released layout of MolmoPoint."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanomolmo2.convert.agreement import check_agreement
from nanomolmo2.convert.export import (
    NO_FINDER,
    NO_PROCESSOR,
    check_floating,
    generation_config,
    ids_of_tokens,
    remarks_of,
    state_without_finder,
    stored_dtype,
)
from nanomolmo2.convert.folder import write_json, write_weights, written_aside
from nanomolmo2.convert.model_card import MARK, write_card
from nanomolmo2.convert.molmo2 import GENERATION_NAME
from nanomolmo2.convert.molmo_point import OWN_CONFIG_NAME, molmo_point_tensors
from nanomolmo2.convert.molmo_point_config import (
    MODEL_TYPE,
    SPECIAL_IDS,
    molmo_point_config_to_reference,
)
from nanomolmo2.convert.parts import CONFIG_NAME
from nanomolmo2.models import NanoMolmo2

if TYPE_CHECKING:
    from nanomolmo2.processor import Processor

# Rows that AI2's code gives the additional part of a head of its own, whatever the config says.
RELEASED_ADDITIONAL = 128
# The version that this code was written for.
TRANSFORMERS = {"transformers_version": "4.57.1"}
# Where AI2's Python files, which belong beside config.json, have the classes.
_AUTO_MAP = {
    "AutoConfig": "configuration_molmo_point.MolmoPointConfig",
    "AutoModelForImageTextToText": "modeling_molmo_point.MolmoPointForConditionalGeneration",
}


def export_molmo_point(
    model: NanoMolmo2,
    out_dir: str | Path,
    processor: Processor | None = None,
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a folder in the layout of the released MolmoPoint checkpoints.

    :func:`nanomolmo2.load` reads it back bit for bit; it was tried with no other program. A tied
    head is left out, as there. What the format can not say, such as a rule of pointing that is not
    ``released``, stands in ``nanomolmo2_config.json``, which only we read. Files are written aside
    and moved in when all are complete; other files in the folder stay. What other programs would do
    differently is a warning, and said in the model card. A finder has no place there: it is left
    out.

    Args:
        model: with a ``point_config``.
        out_dir: created if needed.
        processor: that belongs to the model; without it only the model itself is written.
        max_shard_size: weights above it are split, with an index; bytes, or text such as "5GB".
    Raises: ValueError for a model that the format can not express, naming the alternatives; for a
        quantised model; for a processor of another model; for a path that is a file.
    """
    check_floating(model)
    config = replace(model.config, finder_dim=None)
    tensors = molmo_point_tensors(state_without_finder(model), config)
    if processor is not None:
        check_agreement(model.config, processor)
    notes = _notes(model, processor)
    with written_aside(out_dir, MODEL_TYPE) as aside:
        write_json(aside / CONFIG_NAME, _config(model, processor))
        generation = generation_config(model, processor) | TRANSFORMERS
        write_json(aside / GENERATION_NAME, generation)
        if processor is not None:
            from nanomolmo2.convert.molmo_point_processor import write_molmo_point_processor

            write_molmo_point_processor(processor, aside, model.config)
        config.save(aside / OWN_CONFIG_NAME)  # also where it says no more: none of old stays
        write_card(aside, out_dir, _card(model, notes))
        write_weights(tensors, aside, max_shard_size)
    for note in notes:
        warnings.warn(note, stacklevel=2)


def _config(model: NanoMolmo2, processor: Processor | None) -> dict[str, Any]:
    values = molmo_point_config_to_reference(model.config)
    values |= {"dtype": stored_dtype(model), "auto_map": _AUTO_MAP, **TRANSFORMERS}
    if processor is not None:
        values |= ids_of_tokens(processor, SPECIAL_IDS)
        video = processor.config.video
        values["use_frame_special_tokens"] = video is None or video.use_frame_special_tokens
    point = model.config.point_config
    assert point is not None
    values["image_non_indexable_patch_id"] = point.image_non_indexable_patch_id
    return values


def _notes(model: NanoMolmo2, processor: Processor | None) -> list[str]:
    """What other programs will do differently, a sentence each."""
    config, notes = model.config, []
    point, llm = config.point_config, config.llm_config
    assert point is not None
    if processor is None:
        notes.append(NO_PROCESSOR)
    elif settings := _unsaid(processor):
        notes.append(
            f"MolmoPoint's processor files can not say that {settings}: nanomolmo2 reads its own "
            f"nanomolmo2_processor.json, other programs prepare the same picture differently"
        )
    if config.finder_dim is not None:
        notes.append(f"MolmoPoint has {NO_FINDER}; of a list it selects one point after the other")
    if point.rule != "released":
        notes.append(
            f"the model points by the rule {point.rule!r}, which MolmoPoint's format can not say: "
            f"nanomolmo2 reads it in its own {OWN_CONFIG_NAME}, AI2's code would use the rule of "
            f"the released models"
        )
    if not llm.tie_word_embeddings and llm.additional_vocab_size != RELEASED_ADDITIONAL:
        notes.append(
            f"the model has {llm.additional_vocab_size} additional tokens: AI2's code gives a head "
            f"of its own {RELEASED_ADDITIONAL} rows for them, whatever the config says, and would "
            f"not load it"
        )
    if not config.bidirectional_image_attention:
        notes.append(
            f"the model was not made for image tokens that see each other: nanomolmo2 reads this "
            f"in its own {OWN_CONFIG_NAME}, AI2's code lets them see each other"
        )
    return notes


def _unsaid(processor: Processor) -> str | None:
    from nanomolmo2.convert.molmo2_processor import what_official_files_cannot_say

    return what_official_files_cannot_say(processor)


def _card(model: NanoMolmo2, notes: Sequence[str]) -> str:
    config = model.config
    count = sum(p.numel() for p in model.parameters())
    remarks = remarks_of(notes)
    return f"""{MARK}license: apache-2.0
library_name: nanomolmo2
pipeline_tag: image-text-to-text
---

# MolmoPoint checkpoint written by NanoMolmo2

A vision-language model of {count:,} parameters that points by selecting visual tokens, in the
layout of the released MolmoPoint checkpoints: {config.llm_config.num_hidden_layers} decoder layers
of width {config.llm_config.hidden_size}, vision blocks {list(config.connector.vit_layers or ())} of
{config.vision_config.num_hidden_layers}.

## Use

```python
import nanomolmo2

model, processor = nanomolmo2.load("path/to/this/folder")
```

No other program was tried. AI2's own code takes its classes from Python files beside `config.json`
(`configuration_molmo_point.py`, `modeling_molmo_point.py` and those that they import, from one of
the released checkpoints), which are not part of this folder.

{remarks}## Licence

Apache-2.0 for these files, unless whoever trained them says otherwise. Weights that started from
SigLIP 2 (google/siglip2-so400m-patch14-384) or Qwen3 derive from models that are Apache-2.0
themselves.
"""
