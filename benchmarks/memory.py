"""Peak memory of training steps beside what `nanomolmo2 plan` predicts for them.

    python -m benchmarks.memory [CASE...]

Each case is a process of its own that takes two steps of two passes; its peak is the kernel's
(VmHWM) beyond what the process held before the model was built. Prints a table.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from benchmarks.harness import forget_peak, resident
from nanomolmo2.accelerate import defaults
from nanomolmo2.data.sources import SourceConfig
from nanomolmo2.models import ConnectorConfig, LLMConfig, NanoMolmo2, NanoMolmo2Config, VisionConfig
from nanomolmo2.training.distributed import World, shard, sum_over_ranks
from nanomolmo2.training.frozen import prepare
from nanomolmo2.training.lora import LoraConfig
from nanomolmo2.training.optim import OptimConfig, Optimizers, components
from nanomolmo2.training.plan import Setup, predict
from nanomolmo2.training.recipe import Recipe

ALL = ("vision", "connector", "llm", "embeddings")


def case(
    width: int,
    layers: int,
    vocabulary: int,
    tokens: int,
    *,
    rows: int = 1,
    crops: int = 2,
    ranks: int = 1,
    train: tuple[str, ...] = ALL,
    **recipe: object,
) -> Setup:
    """A model of these sizes with a vision encoder of half the width and depth."""
    config = NanoMolmo2Config(
        vision_config=VisionConfig(
            image_size=224,
            hidden_size=width // 2,
            intermediate_size=2 * width,
            num_hidden_layers=layers // 2,
            num_attention_heads=4,
        ),
        connector_config=ConnectorConfig(
            vision_dim=width // 2,
            llm_dim=width,
            connector_type="pooling",
            num_attention_heads=4,
            intermediate_size=3 * width,
        ),
        llm_config=LLMConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 128,
            head_dim=64,
        ),
        image_token_id=vocabulary - 1,
        freeze_vision=False,
    )
    rates = OptimConfig(matrix_lr=0.0)
    return Setup(
        Recipe(
            name="memory",
            model="",
            data=(SourceConfig("emoji"),),
            steps=2,
            batch_size=2 * rows * ranks,
            micro_batch_size=rows,
            sequence_length=tokens,
            max_crops=crops,
            train=train,
            optimisers=dict.fromkeys(train, rates),
            **recipe,  # type: ignore[arg-type]
        ),
        config,
        ranks,
    )


CASES = {
    "wide": case(768, 6, 8192, 512),
    "deep": case(384, 16, 8192, 1024, rows=2),
    "long": case(256, 4, 4096, 4096, crops=8),
    "large vocabulary": case(256, 4, 100_000, 1024),
    "many crops": case(384, 8, 4096, 2048, crops=24),
    "checkpointing": case(384, 16, 8192, 1024, rows=2, gradient_checkpointing=True),
    "frozen vision": case(384, 8, 8192, 1024, crops=8, train=("connector", "llm")),
    "LoRA": case(512, 8, 8192, 1024, train=("connector", "lora"), lora=LoraConfig()),
    "bfloat16": case(512, 8, 32_768, 512, dtype="bfloat16"),
    "2 ranks": case(512, 8, 32_768, 512, ranks=2),
    "2 ranks, checkpointing": case(768, 8, 16_384, 1024, ranks=2, gradient_checkpointing=True),
}

# What learns, at three sizes: all in bfloat16.
SIZES = {
    "small": (512, 12, 32_768, 1024),
    "medium": (768, 12, 32_768, 1024),
    "large": (1024, 16, 32_768, 1024),
}
for size, numbers in SIZES.items():
    beside: dict[str, object] = {"dtype": "bfloat16", "lora": LoraConfig()}
    kinds: dict[str, dict[str, object]] = {
        "full": {"train": ALL, "dtype": "bfloat16"},
        "frozen": {"train": ("connector",), "dtype": "bfloat16"},
        "LoRA": {"train": ("connector", "lora"), **beside},
        "QLoRA": {"train": ("connector", "lora"), "frozen_weights": "nf4", **beside},
    }
    for kind, options in kinds.items():
        CASES[f"{kind}, {size}"] = case(*numbers, **options)  # type: ignore[arg-type]


def measure(setup: Setup) -> float:
    """Peak of this rank in bytes."""
    with World.from_env("cpu") as world:
        return steps(setup, world)


def steps(setup: Setup, world: World) -> float:
    """Bytes that memory grew by at most: the process's, or the GPU's tensors'."""
    recipe, config = setup.recipe, setup.model
    torch.set_num_threads(1)
    warm_up(setup, world)
    before = reset_peak(world.device)
    model = prepare(defaults(fresh(setup)), recipe)
    shard(
        model,
        world,
        dtype=setup.dtype,
        gradient_checkpointing=recipe.gradient_checkpointing,
    )
    if recipe.frozen_weights:
        reset_peak(world.device)  # before, the layers were whole: on a GPU's host
    optimizers = Optimizers(components(model, recipe.train, recipe.optimisers))
    B, T = setup.rows, recipe.sequence_length
    pictures = B * recipe.max_crops
    side = config.vision_config.image_size
    for step in range(recipe.steps):
        optimizers.set_rates(step, recipe.steps)
        for _ in range(2):
            ids = torch.randint(0, config.image_token_id, (B, T), device=world.device)
            ids[:, : recipe.max_crops * config.num_visual_tokens] = config.image_token_id
            images = torch.randn(pictures, 3, side, side, device=world.device)
            loss = model.loss(
                ids,
                images,  # which a run holds to the end of backward
                labels=ids,
                subsegment_ids=torch.zeros_like(ids),
                reduction="sum",
            )
            total = torch.tensor(2.0 * B * T, device=world.device)
            (loss / sum_over_ranks(total)).backward()
            del loss, images
        optimizers.clip(1.0)
        optimizers.step()
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() - before
    return resident("VmHWM") - before


def fresh(setup: Setup) -> NanoMolmo2:
    """A model as it is read from a checkpoint in the recipe's dtype."""
    usual = torch.get_default_dtype()
    try:
        torch.set_default_dtype(setup.dtype)
        return NanoMolmo2(setup.model)
    finally:
        torch.set_default_dtype(usual)


def reset_peak(device: torch.device) -> float:
    """Bytes that are taken now."""
    if device.type != "cuda":
        return forget_peak()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def warm_up(setup: Setup, world: World) -> None:
    """What the libraries allocate at first use is not the model's."""
    layer = torch.nn.Linear(64, 64)
    if setup.is_sharded:
        policy = MixedPrecisionPolicy(setup.dtype, torch.float32)
        fully_shard(layer, mesh=world.mesh(), mp_policy=policy)
    layer(torch.randn(64, 64)).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()


def measured(name: str) -> float:
    """Peak of the rank that needed most, from processes of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={CASES[name].ranks}", "-m", "benchmarks.memory", "--alone", name]
    if CASES[name].ranks == 1:
        command = [sys.executable, "-m", "benchmarks.memory", "--alone", name]
    # Freed memory goes back at once; glibc would keep what is below its moving threshold.
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        command, env={**os.environ, **settings}, check=True, capture_output=True, text=True
    )
    return max(map(float, done.stdout.split()))


def main() -> None:
    names = sys.argv[1:]
    if names[:1] == ["--alone"]:
        print(measure(CASES[names[1]]), flush=True)
        return
    print("| case | measured, MB | predicted, MB | error |\n|---|---|---|---|")
    for name in names or CASES:
        found, expected = measured(name) / 1e6, predict(CASES[name]).total / 1e6
        error = f"{expected / found - 1:+.1%}"
        print(f"| {name} | {found:,.0f} | {expected:,.0f} | {error} |", flush=True)


if __name__ == "__main__":
    main()
