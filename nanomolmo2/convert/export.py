"""A model of ours to a folder in Molmo2's released layout, which other programs serve."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nanomolmo2.accelerate.quantization import is_quantized
from nanomolmo2.convert.agreement import check_agreement
from nanomolmo2.convert.folder import write_json, write_weights, written_aside
from nanomolmo2.convert.model_card import MARK, write_card
from nanomolmo2.convert.molmo2 import GENERATION_NAME, molmo2_tensors
from nanomolmo2.convert.molmo2_config import (
    FRAME_MARKS,
    MODEL_TYPE,
    SPECIAL_IDS,
    molmo2_config_to_reference,
)
from nanomolmo2.convert.parts import CONFIG_NAME
from nanomolmo2.convert.remote_code import auto_map, write_remote_code
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config
from nanomolmo2.models.presets import IMAGE_COL, IMAGE_END, IMAGE_START, LOW_RES_START

if TYPE_CHECKING:
    from nanomolmo2.processor import Processor

# The first that has Molmo2. Without a version, others take the tokenizer for one of an older time
# and warn of a mistake that those had.
TRANSFORMERS_VERSION = "5.23.0"
NO_FINDER = "no part that finds by example: it is left out, and the exported model cannot"
NO_PROCESSOR = (
    "no processor was given, so the folder has no tokenizer and no processor files: other programs "
    "need them to answer"
)


def export_molmo2(
    model: NanoMolmo2,
    out_dir: str | Path,
    processor: Processor | None = None,
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a folder in the layout of the released Molmo2 checkpoints.

    transformers, vLLM and :func:`nanomolmo2.load` read it; docs/serving.md says what was run. Files
    are written aside and moved in when all are complete; other files in the folder stay. What other
    programs will do differently is a warning, and said in the model card.

    Args:
        model: with the ``pooling`` connector, named vision layers and rows behind the vocabulary.
        out_dir: created if needed.
        processor: that belongs to the model; without it only the model itself is written.
        max_shard_size: weights above it are split, with an index; bytes, or text such as "5GB".
    Raises: ValueError for a model that the format can not express, naming the alternatives; for a
        quantised model; for a processor of another model; for a path that is a file.
    Source: Molmo2, olmo/hf_model/convert_molmo2_to_hf.py (which files, and what is in them).
    """
    check_floating(model)
    tensors = molmo2_tensors(state_without_finder(model), model.config)
    if processor is not None:
        check_agreement(model.config, processor)
    notes = _notes(model, processor)
    with written_aside(out_dir, MODEL_TYPE) as aside:
        write_json(aside / CONFIG_NAME, _config(model, processor))
        write_json(aside / GENERATION_NAME, generation_config(model, processor))
        if processor is not None:
            from nanomolmo2.convert.molmo2_processor import write_molmo2_processor

            write_molmo2_processor(processor, aside, model.config)
        write_remote_code(aside)
        write_card(aside, out_dir, _card(model, notes))
        write_weights(tensors, aside, max_shard_size)
    for note in notes:
        warnings.warn(note, stacklevel=2)


def state_without_finder(model: NanoMolmo2) -> dict[str, Tensor]:
    """Its weights, but for those of a finder, for which no official format has a place."""
    return {name: x for name, x in model.state_dict().items() if not name.startswith("finder.")}


def check_floating(model: NanoMolmo2) -> None:
    """Raises: ValueError for a quantised model."""
    if is_quantized(model):
        raise ValueError(
            "the model is quantised, expected floating point weights: other programs do not read "
            "our int8 and float16 layers, so export the model before it is quantised"
        )


def _config(model: NanoMolmo2, processor: Processor | None) -> dict[str, Any]:
    values = molmo2_config_to_reference(model.config)
    values["dtype"] = stored_dtype(model)
    values["transformers_version"] = TRANSFORMERS_VERSION
    values["auto_map"] = auto_map("AutoConfig", "AutoModelForImageTextToText")
    if processor is not None:
        values |= ids_of_tokens(processor, SPECIAL_IDS)
        video = processor.config.video
        marked = video is not None and video.use_frame_special_tokens
        values["use_frame_special_tokens"] = marked
        if not marked:
            values |= {frame: values[image] for frame, image in FRAME_MARKS.items()}
    return values


def ids_of_tokens(processor: Processor, offsets: Mapping[str, int]) -> dict[str, int]:
    """The ids of Molmo2's tokens that a processor has, by the names of their fields.

    offsets: of each field's token behind the base vocabulary.
    """
    from nanomolmo2.processor.tokenizer import MOLMO2_TOKENS

    known = processor.tokenizer.special_ids
    tokens = {name: MOLMO2_TOKENS[offset] for name, offset in offsets.items()}
    return {name: known[token] for name, token in tokens.items() if token in known}


def stored_dtype(model: NanoMolmo2) -> str:
    """The dtype of the weights, by torch's name."""
    return str(model.llm.embed_tokens.weight.dtype).removeprefix("torch.")


def generation_config(model: NanoMolmo2, processor: Processor | None) -> dict[str, Any]:
    """The likeliest token each time; a prompt begins with the token that ends an answer.

    transformers is told by ``do_sample``, vLLM, which does not read that, by ``temperature``.
    """
    eos = list(model.config.eos_token_ids)
    bos = eos[0] if eos else None
    if processor is not None:
        from nanomolmo2.convert.molmo2_processor import BOS

        eos = eos or list(processor.stop_token_ids)
        bos = processor.tokenizer.special_id(BOS)
    return {
        "bos_token_id": bos,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": model.config.pad_token_id,
        "do_sample": False,
        "temperature": 0.0,
        "transformers_version": TRANSFORMERS_VERSION,
    }


def _notes(model: NanoMolmo2, processor: Processor | None) -> list[str]:
    """What other programs will do differently, a sentence each."""
    notes = []
    if processor is None:
        notes.append(NO_PROCESSOR)
    else:
        from nanomolmo2.convert.molmo2_processor import (
            changed_layout,
            what_official_files_cannot_say,
        )

        if difference := what_official_files_cannot_say(processor):
            layout = changed_layout(processor.config, model.config)
            notes.append(
                f"Molmo2's processor files can not say that {difference}: nanomolmo2 reads its own "
                f"nanomolmo2_processor.json, other programs prepare the same picture differently"
                + (f"; {layout}" if layout else "")
            )
    if model.config.finder_dim is not None:
        notes.append(f"Molmo2 has {NO_FINDER}")
    row = model.llm.embed_tokens.weight[model.config.image_token_id]
    if largest := float(row.detach().abs().max()):
        notes.append(
            f"the embedding of the image token is not zero (up to {largest:.3g}): programs that "
            f"put visual tokens in its place, such as vLLM, instead of adding them answer "
            f"differently"
        )
    if not model.config.bidirectional_image_attention:
        notes.append(
            "the model was not made for image tokens that see each other: vLLM reads this in "
            "config.json (is_mm_prefix_lm), but transformers lets them see each other unless "
            "mm_token_type_ids are left out of its inputs"
        )
    elif not _masks_like_molmo2(model.config):
        notes.append(
            "the model was not made for image tokens that see each other, together with the start, "
            "end and column tokens, but other programs use a Molmo2 checkpoint so"
        )
    return notes


def remarks_of(notes: Sequence[str]) -> str:
    """What a model card says of them, a section; nothing without any."""
    remarks = "".join(f"- {note[0].upper()}{note[1:]}.\n" for note in notes)
    return f"## Remarks\n\n{remarks}\n" if notes else ""


def _masks_like_molmo2(config: NanoMolmo2Config) -> bool:
    """Whether the tokens that every image has see each other in both directions."""
    always = (IMAGE_START, IMAGE_END, IMAGE_COL, LOW_RES_START)
    ids = {config.llm_config.vocab_size + offset for offset in always}
    return ids <= {*config.image_special_token_ids}


def _card(model: NanoMolmo2, notes: Sequence[str]) -> str:
    config = model.config
    count = sum(p.numel() for p in model.parameters())
    remarks = remarks_of(notes)
    dtype = stored_dtype(model)
    return f"""{MARK}license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# Molmo2 checkpoint written by NanoMolmo2

A vision-language model of {count:,} parameters in the layout of the released Molmo2 checkpoints:
{config.llm_config.num_hidden_layers} decoder layers of width {config.llm_config.hidden_size},
vision blocks {list(config.connector.vit_layers or ())} of {config.vision_config.num_hidden_layers}.

## Use

```python
import nanomolmo2

model, processor = nanomolmo2.load("path/to/this/folder")
```

```python
from transformers import Molmo2ForConditionalGeneration  # 5.23 or newer

model = Molmo2ForConditionalGeneration.from_pretrained("path/to/this/folder")
```

```
vllm serve path/to/this/folder --trust-remote-code --dtype {dtype}
```

The Python files are for programs that take their classes from a checkpoint, as vLLM does with
`--trust-remote-code`; transformers has classes of its own.

{remarks}## Licence

Apache-2.0 for these files, unless whoever trained them says otherwise. Weights that started from
SigLIP 2 (google/siglip2-so400m-patch14-384) or Qwen3 derive from models that are Apache-2.0
themselves.
"""
