"""A very small model on emoji scenes, seconds: shows that everything works."""

from __future__ import annotations

from dataclasses import replace

from nanomolmo2.data.sources import SourceConfig
from nanomolmo2.models import ConnectorConfig, LLMConfig, VisionConfig, preset
from nanomolmo2.training.optim import OptimConfig
from nanomolmo2.training.recipe import Recipe


def smoke() -> Recipe:
    """Two layers and width 64 on emoji scenes, with tiny's processor."""
    tiny = preset("tiny")
    width = 64
    vision = VisionConfig(
        image_size=192,
        patch_size=16,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
    )
    connector = ConnectorConfig(
        vision_dim=48,
        llm_dim=width,
        connector_type="pooling",
        num_attention_heads=3,
        intermediate_size=128,
        vit_layers=(-1,),
    )
    llm = LLMConfig(
        vocab_size=tiny.llm_config.vocab_size,
        additional_vocab_size=tiny.llm_config.additional_vocab_size,
        hidden_size=width,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
    )
    # A constant rate: the length of the run changes nothing of its steps.
    rates = OptimConfig(lr=3e-3, matrix_lr=0.0, warmup_steps=4, final_ratio=1.0)
    mix = {"presence": 4, "count": 1, "number": 1, "point": 1, "caption": 1, "spatial": 0}
    return Recipe(
        name="smoke",
        model="tiny",
        architecture=replace(
            tiny,
            vision_config=vision,
            connector_config=connector,
            llm_config=llm,
            finder_dim=None,
        ),
        data=(
            SourceConfig(
                "emoji",
                options={"length": 100_000, "mix": mix},
            ),
        ),
        steps=24,
        batch_size=4,
        micro_batch_size=2,
        sequence_length=512,
        max_crops=8,
        packing_buffer=8,
        train=("vision", "connector", "llm", "embeddings"),
        optimisers=dict.fromkeys(("vision", "connector", "llm", "embeddings"), rates),
        save_every=8,
    )
