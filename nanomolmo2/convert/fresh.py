"""A model that does not exist yet: pretrained parts by name, and a connector to be trained.

    fresh_config(connector, vision, llm) -> NanoMolmo2Config
    fresh_processor(config, llm)         -> Processor

Only the small files of the parts are read here, and of those on the hub only they are fetched.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import cast

from nanomolmo2.config import Config
from nanomolmo2.convert.config_checks import check_fields, in_file
from nanomolmo2.convert.folder import QUANTIZATION
from nanomolmo2.convert.parts import CONFIG_NAME, LLM, VISION, Part, read_config
from nanomolmo2.convert.pretrained import RELEASED, TOKENIZER_NAME, find_directory, load_config
from nanomolmo2.convert.quantization import MODEL_TYPE, own_type
from nanomolmo2.convert.tensor_files import CacheFile
from nanomolmo2.models import ConnectorConfig, LLMConfig, NanoMolmo2Config, VisionConfig
from nanomolmo2.models.presets import PRESETS, molmo2_config
from nanomolmo2.processor import (
    MultiCrop,
    Processor,
    ProcessorConfig,
    Tokenizer,
    VideoConfig,
)
from nanomolmo2.processor.tokenizer import molmo2_tokenizer

CONNECTORS = ("linear", "mlp", "resampler", "pooling")


def fresh_config(
    connector: str = "linear", vision: str = VISION.repository, llm: str = LLM.repository
) -> NanoMolmo2Config:
    """Sizes of a model of two pretrained parts and a connector of some kind.

    ``pooling`` is the design of Molmo2 around them: crops, the outputs of two vision blocks, tokens
    of its own behind the decoder's vocabulary. The others are the base design.

    Args:
        connector: one of `CONNECTORS`.
        vision, llm: names on the hub, folders (a SigLIP or Qwen3 checkpoint, or a whole model whose
            part is taken) or converted files.
    Raises: ValueError for another connector, and names that are no such part; OSError without
        network.
    """
    if connector not in CONNECTORS:
        raise ValueError(
            f"there is no connector {connector!r}: choose one of {', '.join(CONNECTORS)}"
        )
    eyes, decoder = cast(VisionConfig, _config(VISION, vision)), cast(LLMConfig, _config(LLM, llm))
    if connector == "pooling":
        decoder = dataclasses.replace(decoder, additional_vocab_size=128)
        # Crops are cut into whole patches.
        side = eyes.patches_per_side * eyes.patch_size
        config = molmo2_config(decoder, dataclasses.replace(eyes, image_size=side))
    else:
        width = decoder.hidden_size
        joint = ConnectorConfig(
            vision_dim=eyes.hidden_size,
            llm_dim=width,
            connector_type=connector,  # type: ignore[arg-type]
            hidden_dim=2 * width,
            num_attention_heads=math.gcd(width, 16),
        )
        # The ids are of the tokenizer: those of Qwen3 need not be in a smaller vocabulary.
        config = NanoMolmo2Config(eyes, joint, decoder, image_token_id=0)
    try:
        ids = fresh_processor(config, llm)
    except OSError:
        if llm != LLM.repository:
            raise
        known = PRESETS["nanomolmo2-pooling" if connector == "pooling" else "nanomolmo2"]
        return dataclasses.replace(  # a run can be planned before anything is downloaded
            config,
            image_token_id=known.image_token_id,
            eos_token_id=known.eos_token_id,
            pad_token_id=known.pad_token_id,
        )
    return dataclasses.replace(
        config,
        image_token_id=ids.image_token_id,
        eos_token_id=ids.stop_token_ids,
        pad_token_id=ids.pad_token_id,
        freeze_vision=config.freeze_vision,
    )


def fresh_processor(config: NanoMolmo2Config, llm: str = LLM.repository) -> Processor:
    """The processor for such a model: the tokenizer of its decoder, pictures as its encoder reads
    them.

    Raises: ValueError for a decoder without a tokenizer, or whose tokenizer lacks the tokens of a
        picture and of a chat; OSError without network.
    """
    vision, path = config.vision_config, _tokenizer_file(llm)
    if config.connector.connector_type != "pooling":
        settings = ProcessorConfig(
            image_size=vision.image_size, image_tokens=config.num_visual_tokens
        )
        return Processor(settings, Tokenizer.from_file(path))
    side = vision.patches_per_side
    crops = MultiCrop(
        image_size=side * vision.patch_size,
        patch_size=vision.patch_size,
        overlap_margins=(round(side * 4 / 27),) * 2,  # as much of a crop as in Molmo2
        pooling_size=config.connector.pooling_size,
    )
    settings = ProcessorConfig.molmo2(multicrop=crops, video=VideoConfig())
    rows = config.llm_config.vocab_size
    return Processor(settings, molmo2_tokenizer(path, vocab_size=rows))


def _config(part: Part, name: str) -> Config:
    """The configuration of a part, its weights not read."""
    if Path(name).is_file():
        cache = CacheFile(name)
        if cache.component != part.component:
            raise ValueError(f"{name} holds a part of another kind ({cache.component})")
        return type(part.config).from_dict(cache.config)
    try:
        directory = find_directory(name, None, (CONFIG_NAME,))
    except OSError:
        if name != part.repository:
            raise
        return part.config  # its sizes are known, and its weights may be in the cache
    values = read_config(directory)
    model_type = values.get("model_type")
    if model_type in [MODEL_TYPE, *RELEASED]:
        whole = load_config(directory)
        return whole.vision_config if part.component == VISION.component else whole.llm_config
    with in_file(directory / CONFIG_NAME):
        if model_type == own_type(part):
            return type(part.config).load(
                directory / CONFIG_NAME, ignore=("model_type", QUANTIZATION)
            )
        check_fields(values)
        return part.config_from_reference(values)


def _tokenizer_file(llm: str) -> Path:
    if Path(llm).is_file():  # a converted file, of the one decoder that is converted
        llm = LLM.repository
    directory = find_directory(llm, None, (TOKENIZER_NAME,))
    if not (directory / TOKENIZER_NAME).is_file():
        raise ValueError(
            f"{llm} has no {TOKENIZER_NAME}, which the model needs to read and write: put the one "
            f"of the language model there"
        )
    return directory / TOKENIZER_NAME
