"""Models by the names that the command line uses."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nanomolmo2.cli.options import UsageError, library_name
from nanomolmo2.cli.output import announce, note

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nanomolmo2.generation.pipeline import Pipeline
    from nanomolmo2.models import NanoMolmo2
    from nanomolmo2.processor import Processor


MODEL_FILES = (
    *("*config.json", "processor.json", "tokenizer*.json", "*.index.json", "*.safetensors"),
    *("vocab.json", "special_tokens_map.json", "added_tokens.json", "README.md"),
)
# Beside the model's own files: what a folder may hold that is written anew.
TAUGHT_FILES = ("words.json", "word-*", "merges.txt", "LICENSE*", "NOTICE")


def precision(
    dtype: str | None,
    quantize: str | None = None,
    device: str | None = None,
    adapter: Sequence[str] = (),
) -> dict[str, Any]:
    """The options of a load that a command line gave."""
    options = {"dtype": dtype, "quantize": quantize, "device": device, "adapter": adapter or None}
    return {name: value for name, value in options.items() if value is not None}


def device_of(name: str | None) -> torch.device:
    """The device that a command line named; None = the best there is.

    Raises: UsageError if it is not there.
    """
    from nanomolmo2.accelerate.device import choose_device

    try:
        device = choose_device(name)
    except ValueError as error:
        raise UsageError(f"--device: {error}, or leave it out") from None
    if device.type == "meta":
        raise UsageError("--device: meta holds sizes alone, and computes nothing: choose another")
    return device


def where(model: nn.Module) -> str:
    """One line: where a model is, and in which precision."""
    from nanomolmo2.accelerate.device import device_text
    from nanomolmo2.convert.folder import QUANTIZATION
    from nanomolmo2.convert.quantization import quantization_entry

    weight = next(model.parameters())
    text = f"on {device_text(weight.device)}, {str(weight.dtype).removeprefix('torch.')}"
    entries = quantization_entry(model).get(QUANTIZATION, {}).values()
    if modes := sorted({entry["mode"] for entry in entries}):
        text += f", weights {' and '.join(modes)}"
        if weight.device.type != "cpu":  # the kernels for them are the CPU's
            text += ", which save memory there, not time"
    return text


def files_of(model: str) -> list[Path]:
    """The folder and the files of a model on this disk, which no output may replace."""
    if model == "tiny" and not os.path.isdir(model):
        model = str(Path(__file__).parents[1] / "assets" / "tiny")
    if not os.path.isdir(model):
        return [Path(model)]
    return [Path(model)] + [path for pattern in MODEL_FILES for path in Path(model).glob(pattern)]


def load_pipeline(name: str, cache_dir: Path, **options: Any) -> Pipeline:
    """Model and processor by the name that the command line uses; one line says where they are.

    Args:
        options: of `precision`.
    """
    from nanomolmo2.generation.pipeline import Pipeline

    options["device"] = device_of(options.get("device"))
    pipeline = Pipeline.from_pretrained(library_name(name), cache_dir=cache_dir, **options)
    collect_again()
    announce(where(pipeline.model))
    return pipeline


def note_words_left(model: str, what: str) -> None:
    """Say that the words that a model was taught are not in what is made of it."""
    from nanomolmo2.generation.words import listed, words_of

    if (words := words_of(model)) is not None and words.words:
        names = listed(words.words)
        verb = "is" if len(words.words) == 1 else "are"
        note(f"note: {names}, taught beside the language model, {verb} not part of what is {what}")


def collect_again() -> None:
    """The model is there: collect garbage again, but among what comes from now on.

    __main__.py turned it off, if it did, while all this was loaded.
    """
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def load_model(name: str, cache_dir: Path, **options: Any) -> tuple[NanoMolmo2, Processor]:
    """The same for what writes the model: its weights are as they are stored."""
    from nanomolmo2.convert.pretrained import load

    options["device"] = device_of(options.get("device"))
    model, processor = load(library_name(name), cache_dir=cache_dir, **options)
    announce(where(model))
    return model, processor


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
            raise UsageError(
                f"{name} is sizes alone: --dtype, --quantize and --device need weights"
            )
        return build_on_meta(NanoMolmo2, PRESETS[name])
    elif os.path.isdir(name):
        model_type = str(read_config(name).get("model_type"))
        if model_type.startswith("siglip") or model_type == "nanomolmo2_vision_encoder":
            loader = VisionEncoder
        elif model_type.startswith("qwen") or model_type == "nanomolmo2_llm":
            loader = LanguageModel
    options["device"] = device_of(options.get("device"))
    return cast(
        "nn.Module", loader.from_pretrained(library_name(name), cache_dir=cache_dir, **options)
    )


def model_folder(model: str) -> Path:
    """The folder of a model's files.

    Raises: UsageError for what is none.
    """
    from nanomolmo2.convert.pretrained import find_directory

    name = library_name(model)
    if name is None:
        raise UsageError(f"--model is {model}, which is two parts: name a folder, or tiny")
    return find_directory(name)


def copy_model(source: Path, folder: Path) -> None:
    """Copy the files of a model into a folder."""
    for pattern in (*MODEL_FILES, *TAUGHT_FILES[2:]):
        for path in source.glob(pattern):
            shutil.copyfile(path, folder / path.name)
