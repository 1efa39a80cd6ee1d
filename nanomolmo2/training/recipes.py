"""The recipes that come with the package: functions that return a `Recipe`, to read and to vary.

    smoke       a very small model on emoji scenes, seconds: shows that everything works
    base        SigLIP 2 and Qwen3-0.6B-Base: frozen vision, a fresh connector and the decoder learn
    stage1-3    the three stages of Molmo2-4B
    finetune    a trained model on a person's own data

`tiny` is made by tiny.py, whose stages are of other kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from nanomolmo2.data.emoji.questions import BranchMix
from nanomolmo2.data.emoji.source import EmojiConfig
from nanomolmo2.data.sources import SourceConfig
from nanomolmo2.models import ConnectorConfig, LLMConfig, VisionConfig, preset
from nanomolmo2.training.lora import LoraConfig
from nanomolmo2.training.optim import OptimConfig
from nanomolmo2.training.recipe import Recipe


def adamw(lr: float, warmup_steps: int) -> OptimConfig:
    """AdamW alone, as Molmo2 has it: betas 0.9 and 0.95, cosine to a tenth, no weight decay."""
    return OptimConfig(lr=lr, matrix_lr=0.0, warmup_steps=warmup_steps)


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
    return Recipe(
        name="smoke",
        model="tiny",
        architecture=replace(
            tiny, vision_config=vision, connector_config=connector, llm_config=llm
        ),
        data=(
            SourceConfig(
                "emoji",
                emoji=EmojiConfig(
                    length=100_000,
                    mix=BranchMix(presence=4, count=1, number=1, point=1, caption=1, spatial=0),
                ),
            ),
        ),
        steps=24,
        batch_size=4,
        micro_batch_size=2,
        sequence_length=512,
        max_crops=8,
        pool=8,
        train=("vision", "connector", "llm", "embeddings"),
        optimisers=dict.fromkeys(("vision", "connector", "llm", "embeddings"), rates),
        save_every=8,
    )


def base() -> Recipe:
    """The base design: SigLIP 2 stays frozen, a fresh connector and Qwen3-0.6B-Base learn."""
    return Recipe(
        name="base",
        model="base",
        data=PRETRAINING,
        steps=20_000,
        batch_size=64,
        micro_batch_size=4,
        sequence_length=2560,
        max_crops=3,  # pictures, of 729 tokens each
        train=("connector", "llm"),
        optimisers={"connector": adamw(2e-4, 200), "llm": adamw(2e-5, 2000)},
        dtype="bfloat16",
        gradient_checkpointing=True,
        save_every=500,
    )


# PixMo's pictures lie behind addresses: download them first, see docs/data.md, "Other formats".
PRETRAINING = (
    SourceConfig(
        "data/pixmo-cap", format="pixmo_cap", rate=0.6, prompts="styles", pictures="data/pixmo"
    ),
    SourceConfig(
        "data/pixmo-points", format="pixmo_points", prompts="styles", pictures="data/pixmo"
    ),
    SourceConfig("data/cosyn-point", format="cosyn_point", prompts="styles"),
    SourceConfig("data/tulu.jsonl", rate=0.1),
)
INSTRUCTION = (
    SourceConfig("data/instruction", name="instruction", rate=0.8, separate_turns=True),
    SourceConfig("data/pixmo-points", format="pixmo_points", rate=0.1, pictures="data/pixmo"),
    SourceConfig("data/tulu.jsonl", rate=0.1),
)
Z_LOSS = 1e-4


def stage1() -> Recipe:
    """Molmo2-4B, pre-training on captions and points.

    The base rows of the embedding stay; the 128 new rows learn with the connector.

    Source: Molmo2, launch_scripts/pretrain.py.
    """
    return Recipe(
        name="stage1",
        model="allenai/Molmo2-4B",
        architecture=preset("molmo2-4b"),
        vision="google/siglip2-so400m-patch14-384",
        llm="Qwen/Qwen3-4B-Instruct-2507",
        data=PRETRAINING,
        steps=32_000,
        batch_size=128,
        micro_batch_size=4,
        sequence_length=2560,
        max_crops=16,
        train=("vision", "connector", "llm"),
        optimisers={
            "vision": adamw(6e-6, 2000),
            "connector": adamw(2e-4, 200),
            "llm": adamw(2e-5, 2000),
        },
        residual_dropout=0.1,
        dropout_at_targets=True,
        z_loss=Z_LOSS,
        dtype="bfloat16",
        gradient_checkpointing=True,
        save_every=1000,
    )


def stage2() -> Recipe:
    """Molmo2-4B, instruction tuning on what stage 1 left in runs/stage1.

    Source: Molmo2, launch_scripts/sft.py.
    """
    return Recipe(
        name="stage2",
        model="runs/stage1/model",
        data=INSTRUCTION,
        steps=30_000,
        batch_size=128,
        micro_batch_size=2,
        sequence_length=16_384,
        max_crops=128,
        crop_weight=30.0,
        train=("vision", "connector", "llm"),
        optimisers={
            "vision": adamw(5e-6, 200),
            "connector": adamw(5e-6, 200),
            "llm": adamw(1e-5, 200),
        },
        residual_dropout=0.1,
        loss_weighting="molmo2",
        z_loss=Z_LOSS,
        dtype="bfloat16",
        gradient_checkpointing=True,
        save_every=500,
    )


def stage3() -> Recipe:
    """Molmo2-4B, long context: stage 2 in rows of 36,864 tokens."""
    return replace(
        stage2(),
        name="stage3",
        model="runs/stage2/model",
        steps=2_000,
        micro_batch_size=1,
        sequence_length=36_864,
        max_crops=384,
    )


def finetune(
    data: Sequence[str] = ("my.jsonl",),
    model: str = "tiny",
    *,
    steps: int = 40,
    lora: bool = False,
) -> Recipe:
    """A trained model on own data: the connector and the decoder learn, or LoRA matrices of it.

    Args:
        data: files of records, see docs/data.md.
        model: a folder, ``tiny``, ``base`` or a name on the hub.
        steps: 40 steps of 2 rows are enough to see that it learns.
    """
    small = model == "tiny"
    rate = 5e-4 if small else 1e-5
    rates = adamw(rate, min(10, steps))
    parts = ("connector", "lora") if lora else ("connector", "llm")
    optimisers = dict.fromkeys(parts, rates)
    if lora:  # its matrices start at zero and take larger steps
        optimisers["lora"] = adamw(max(rate, 2e-4), min(10, steps))
    return Recipe(
        name="finetune",
        model=model,
        data=tuple(SourceConfig(path) for path in data),
        steps=steps,
        batch_size=2,
        micro_batch_size=1,
        sequence_length=512 if small else 4096,
        max_crops=8 if small else 64,
        pool=8,
        train=parts,
        optimisers=optimisers,
        lora=LoraConfig() if lora else None,
        dtype="float32" if small else "bfloat16",
        gradient_checkpointing=not small,
        save_every=100,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "smoke": smoke,
    "base": base,
    "stage1": stage1,
    "stage2": stage2,
    "stage3": stage3,
    "finetune": finetune,
}


def recipe(name: str) -> Recipe:
    """The recipe of a name in `RECIPES`, or of a JSON file.

    Raises: ValueError naming those there are.
    """
    if name in RECIPES:
        return RECIPES[name]()
    if name.endswith(".json"):
        return Recipe.load(name)
    raise ValueError(
        f"there is no recipe {name!r}: choose one of {', '.join(('tiny', *RECIPES))}, or give a "
        f".json file, such as the recipe.json of another run"
    )
