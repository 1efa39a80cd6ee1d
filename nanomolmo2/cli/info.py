"""``nanomolmo2 info``: what a model consists of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from nanomolmo2.cli.loading import load_module, precision, where
from nanomolmo2.cli.options import MODEL_HELP, CacheDir, Debug, DeviceName, Precision, StoredDType
from nanomolmo2.cli.output import say

if TYPE_CHECKING:
    from nanomolmo2.models import NanoMolmo2Config


@dataclass(frozen=True)
class Info:
    """Show a model: its parts, parameters, memory and configuration."""

    model: Annotated[
        Positional[str],
        arg(
            metavar="MODEL",
            help=MODEL_HELP + "; also a SigLIP or Qwen3 folder, a .pt file that `nanomolmo2 "
            "download` made, or the sizes alone of nanomolmo2, nanomolmo2-pooling, molmo2-4b, "
            "molmo2-8b, molmo-point-8b, molmo-point-vid-4b, tiny-point or tiny-find, which "
            "loads nothing",
        ),
    ]
    device: DeviceName = None
    dtype: StoredDType = None
    quantize: Precision = None
    cache_dir: CacheDir = Path("checkpoints")
    debug: Debug = False

    def run(self) -> None:
        from nanomolmo2.accelerate.quantization import count_weights
        from nanomolmo2.models import NanoMolmo2

        model: Any = load_module(
            self.model, self.cache_dir, **precision(self.dtype, self.quantize, self.device)
        )
        tensors = list(model.state_dict().values())
        count = count_weights(model)
        if isinstance(model, NanoMolmo2):
            model.parameter_summary()
            config = model.config
            side = config.vision_config.image_size
            say(
                f"\npicture: {side} x {side} pixels, {config.num_visual_tokens} visual tokens"
                f"\ncontext: {config.llm_config.max_position_embeddings:,} tokens"
                f"{points_text(config)}{words_text(self.model)}"
            )
        else:
            say(f"{type(model).__name__}: {count:,} parameters\n")
        stored = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))
        no_weights = any(t.is_meta for t in tensors)
        say(f"memory of the weights ({'sizes only' if no_weights else f'stored as {stored}'}):")
        for dtype, size in (("float32", 4), ("bfloat16, float16", 2), ("int8", 1)):
            say(f"  {dtype:<18} {count * size / 1e6:>10,.1f} MB")
        if not no_weights:
            say(f"  {'as loaded':<18} {sum(t.nbytes for t in tensors) / 1e6:>10,.1f} MB")
            say(where(model))
        say("configuration:")
        say(json.dumps(model.config.to_dict(), indent=2))


def words_text(model: str) -> str:
    """The words that a model was taught, a line; nothing where there are none."""
    from nanomolmo2.generation.words import words_of

    words = words_of(model)
    if words is None or not words.words:
        return ""
    said = ", ".join(f"{word.name}, taught {word.known_by}" for word in words.words.values())
    return f"\nwords: {said}"


def points_text(config: NanoMolmo2Config) -> str:
    """How a model points, a line; of one that writes coordinates nothing."""
    point = config.point_config
    if point is None:
        return ""
    overview = "" if point.image_non_indexable_patch_id is None else " but those of an overview"
    return (
        f"\npoints: selects visual tokens{overview}, by the rule {point.rule!r}; keys of "
        f"{point.patch_embed_dim} numbers; classes from {config.llm_config.num_embeddings:,} on"
    )
