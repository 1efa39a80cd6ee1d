"""Models by the names that the command line uses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanomolmo2.cli.options import UsageError, library_name

if TYPE_CHECKING:
    from torch import nn

    from nanomolmo2.generation.pipeline import Pipeline


MODEL_FILES = (
    *("*config.json", "processor.json", "tokenizer*.json", "*.index.json", "*.safetensors"),
    *("vocab.json", "special_tokens_map.json", "added_tokens.json", "README.md"),
)


def precision(dtype: str | None, quantize: str | None) -> dict[str, Any]:
    """The options of a load that a command line gave."""
    options = {"dtype": dtype, "quantize": quantize}
    return {name: value for name, value in options.items() if value is not None}


def files_of(model: str) -> list[Path]:
    """The folder and the files of a model on this disk, which no output may replace."""
    if model == "tiny" and not os.path.isdir(model):
        model = str(Path(__file__).parents[1] / "assets" / "tiny")
    if not os.path.isdir(model):
        return [Path(model)]
    return [Path(model)] + [path for pattern in MODEL_FILES for path in Path(model).glob(pattern)]


def load_pipeline(name: str, cache_dir: Path, **options: Any) -> Pipeline:
    """Model and processor by the name that the command line uses."""
    from nanomolmo2.generation.pipeline import Pipeline

    return Pipeline.from_pretrained(library_name(name), cache_dir=cache_dir, **options)


def load_module(name: str, cache_dir: Path, **options: Any) -> nn.Module:
    """A whole model, or a part: a SigLIP or Qwen3 folder, or a converted file.

    A preset comes without weights, on the meta device.
    """
    from nanomolmo2.convert.parts import build_on_meta, read_config
    from nanomolmo2.convert.tensor_files import CacheFile
    from nanomolmo2.models import PRESETS, LanguageModel, NanoMolmo2, VisionEncoder

    loader: Any = NanoMolmo2
    if os.path.isfile(name):
        loader = {"vision_encoder": VisionEncoder, "llm": LanguageModel}[CacheFile(name).component]
    elif name in PRESETS and name != "tiny" and not os.path.isdir(name):
        if options:
            raise UsageError(f"{name} is sizes alone: --dtype and --quantize need weights")
        return build_on_meta(NanoMolmo2, PRESETS[name])
    elif os.path.isdir(name):
        model_type = str(read_config(name).get("model_type"))
        if model_type.startswith("siglip") or model_type == "nanomolmo2_vision_encoder":
            loader = VisionEncoder
        elif model_type.startswith("qwen") or model_type == "nanomolmo2_llm":
            loader = LanguageModel
    return loader.from_pretrained(library_name(name), cache_dir=cache_dir, **options)
