"""Named sizes: the base design, the Molmo2 design, MolmoPoint, and the bundled model."""

from __future__ import annotations

from dataclasses import replace

from nanomolmo2.models.connector import ConnectorConfig
from nanomolmo2.models.language_model import LLMConfig
from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config
from nanomolmo2.models.point_config import PointConfig
from nanomolmo2.models.vision_encoder import VisionConfig

# Offsets from vocab_size of the tokens that are read but never written.
IMAGE_START, IMAGE_END, IMAGE_PATCH, IMAGE_COL, LOW_RES_START = 0, 1, 2, 3, 4
IMAGE_LOW, FRAME_START, FRAME_END = 6, 7, 8
FINDER_DIM = 64  # of the tiny models that find
POINT_PATCH, POINT_SUBPATCH, POINT_LOCATION = 11, 12, 13  # MolmoPoint writes these three
IMAGE_SPECIAL = (
    *(IMAGE_START, IMAGE_END, IMAGE_COL, LOW_RES_START, IMAGE_LOW),
    *(FRAME_START, FRAME_END),
)


def molmo2_config(
    llm_config: LLMConfig, vision_config: VisionConfig | None = None
) -> NanoMolmo2Config:
    """The Molmo2 design around a Qwen3 decoder, and by default SigLIP 2 So400m/14.

    SigLIP 2 without its last two blocks, the outputs of blocks 24 and 18 joined (of an encoder that
    has not 27 blocks those at the same share of the depth), attention pooling
    over up to 2 x 2 (pictures) or 3 x 3 (frames) patches, 128 tokens of its own behind the
    decoder's vocabulary, and image tokens that see each other.

    Source: Molmo2, olmo/model_configs.py; config.json of allenai/Molmo2-4B.
    """
    base = llm_config.vocab_size
    vision_config = vision_config or VisionConfig(image_size=378)
    behind = [round(n * vision_config.num_hidden_layers / 27) for n in (2, 8)]
    return NanoMolmo2Config(
        vision_config=vision_config,
        connector_config=ConnectorConfig(
            vision_dim=vision_config.hidden_size,
            llm_dim=llm_config.hidden_size,
            connector_type="pooling",
            num_attention_heads=vision_config.num_attention_heads,
            intermediate_size=llm_config.intermediate_size,
            vit_layers=tuple(dict.fromkeys(-1 - n for n in behind)),
        ),
        llm_config=llm_config,
        image_token_id=base + IMAGE_PATCH,
        freeze_vision=False,
        eos_token_id=151645,
        bidirectional_image_attention=True,
        image_special_token_ids=tuple(base + offset for offset in IMAGE_SPECIAL),
    )


def molmo_point_config(molmo2: NanoMolmo2Config) -> NanoMolmo2Config:
    """MolmoPoint around the parts of a Molmo2 configuration, with the released rule.

    The pooling connector loses its output projection, the head gains rows for the additional
    tokens, overviews have tokens of their own.

    Source: config.json of allenai/MolmoPoint-GUI-8B, olmo/model_configs.py.
    """
    base = molmo2.llm_config.vocab_size
    return replace(
        molmo2,
        connector_config=replace(molmo2.connector, attention_pooling_out_layer=False),
        llm_config=replace(molmo2.llm_config, predict_additional_vocab=True),
        point_config=PointConfig(
            patch_token_id=base + POINT_PATCH,
            subpatch_token_id=base + POINT_SUBPATCH,
            location_token_id=base + POINT_LOCATION,
            image_non_indexable_patch_id=base + IMAGE_LOW,
        ),
    )


def _tiny_point() -> NanoMolmo2Config:
    """`tiny`'s sizes; its one view has no overview, so every visual token can be selected."""
    tiny = molmo_point_config(_tiny())
    assert tiny.point_config is not None
    patch, subpatch, location = tiny.point_config.marker_ids
    points = PointConfig.consistent(
        patch_token_id=patch,
        subpatch_token_id=subpatch,
        location_token_id=location,
        patch_embed_dim=64,
    )
    return replace(tiny, point_config=points)


def _tiny_find() -> NanoMolmo2Config:
    """`tiny`'s sizes with more words, more positions, crops, and points that select.

    Its connector keeps the output projection, and so all weights of `tiny`.
    """
    tiny = _tiny(vocabulary=928, first_special=895)
    base = tiny.llm_config.vocab_size
    points = PointConfig.consistent(
        patch_token_id=base + POINT_PATCH,
        subpatch_token_id=base + POINT_SUBPATCH,
        location_token_id=base + POINT_LOCATION,
        image_non_indexable_patch_id=base + IMAGE_LOW,
        patch_embed_dim=64,
    )
    llm = replace(tiny.llm_config, predict_additional_vocab=True, max_position_embeddings=4096)
    special = tuple(base + offset for offset in IMAGE_SPECIAL)
    return replace(
        tiny,
        llm_config=llm,
        image_special_token_ids=special,
        point_config=points,
        finder_dim=FINDER_DIM,
    )


def _tiny(vocabulary: int = 736, first_special: int = 706) -> NanoMolmo2Config:
    return NanoMolmo2Config(
        vision_config=VisionConfig(
            image_size=192,
            patch_size=16,
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=3,
        ),
        connector_config=ConnectorConfig(
            vision_dim=192,
            llm_dim=256,
            connector_type="pooling",
            num_attention_heads=3,
            intermediate_size=512,
            vit_layers=(-1,),
        ),
        llm_config=LLMConfig(
            vocab_size=vocabulary,
            additional_vocab_size=16,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=2048,
        ),
        image_token_id=vocabulary + IMAGE_PATCH,
        freeze_vision=False,
        eos_token_id=(first_special + 2, first_special),
        pad_token_id=first_special,
        bidirectional_image_attention=True,
        image_special_token_ids=tuple(
            vocabulary + offset for offset in (IMAGE_START, IMAGE_END, IMAGE_COL, LOW_RES_START)
        ),
    )


_QWEN3_4B = LLMConfig(
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    max_position_embeddings=36864,
    rope_theta=5_000_000.0,
    tie_word_embeddings=False,
    additional_vocab_size=128,
)
_QWEN3_8B = LLMConfig(
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    max_position_embeddings=36864,
    tie_word_embeddings=False,
    additional_vocab_size=128,
)

PRESETS: dict[str, NanoMolmo2Config] = {
    "nanomolmo2": NanoMolmo2Config(),
    "nanomolmo2-pooling": molmo2_config(LLMConfig(additional_vocab_size=128)),
    "molmo2-4b": molmo2_config(_QWEN3_4B),
    "molmo2-8b": molmo2_config(_QWEN3_8B),
    "molmo-point-8b": molmo_point_config(
        molmo2_config(replace(_QWEN3_8B, max_position_embeddings=37376))
    ),
    "molmo-point-vid-4b": molmo_point_config(
        molmo2_config(replace(_QWEN3_4B, max_position_embeddings=37376, tie_word_embeddings=True))
    ),
    "tiny": replace(_tiny(), finder_dim=FINDER_DIM),
    "tiny-point": _tiny_point(),
    "tiny-find": _tiny_find(),
}


def preset(name: str) -> NanoMolmo2Config:
    """The configuration of a name in `PRESETS`. Raises: ValueError naming those there are."""
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
