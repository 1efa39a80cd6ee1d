"""The two pretrained parts of the base design, and everything in which their formats differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from nanomolmo2.config import Config, read_json_object
from nanomolmo2.convert.config_checks import check_fields, check_limits, in_file
from nanomolmo2.convert.reference_config import (
    llm_config_from_reference,
    llm_config_to_reference,
    vision_config_from_reference,
    vision_config_to_reference,
)
from nanomolmo2.convert.state_dict import from_reference
from nanomolmo2.convert.tables import QWEN3, QWEN3_PREFIX, SIGLIP2, SIGLIP2_PREFIX, Table
from nanomolmo2.convert.tensor_files import Readable, StoredTensor, open_safetensors
from nanomolmo2.files import read_regular
from nanomolmo2.models import LanguageModel, VisionEncoder
from nanomolmo2.models.language_model import LLMConfig
from nanomolmo2.models.vision_encoder import VisionConfig

CONFIG_NAME = "config.json"
UNFINISHED = ".unfinished-save"  # in a folder while the files of a save are moved into it


@dataclass(frozen=True)
class Part:
    """A component with a reference checkpoint on the hub.

    component: its attribute in NanoMolmo2, and the kind of its cache file.
    repository, config: where ``from_pretrained()`` without a name gets it, and its sizes.
    cache_name, cache_dtype: the converted file in ``cache_dir``.
    companions: small files of the repository that are fetched along.
    """

    component: str
    repository: str
    config: Config
    cache_name: str
    cache_dtype: torch.dtype
    build: Callable[[Any], nn.Module]
    table: Table
    prefix: str
    config_from_reference: Callable[[Mapping[str, Any]], Config]
    config_to_reference: Callable[[Any], dict[str, Any]]
    companions: tuple[str, ...] = ()

    @property
    def folder_name(self) -> str:
        """The converted weights in ``cache_dir`` as safetensors, in the format of the reference."""
        return self.cache_name.removesuffix(".pt")


VISION = Part(
    component="vision_encoder",
    repository="google/siglip2-so400m-patch14-384",
    config=VisionConfig(),
    cache_name="siglip2_so400m_384.pt",
    cache_dtype=torch.float32,
    build=VisionEncoder,
    table=SIGLIP2,
    prefix=SIGLIP2_PREFIX,
    config_from_reference=vision_config_from_reference,
    config_to_reference=vision_config_to_reference,
)

LLM = Part(
    component="llm",
    repository="Qwen/Qwen3-0.6B-Base",
    config=LLMConfig(),
    cache_name="qwen3_0.6b_base.pt",
    cache_dtype=torch.bfloat16,
    build=LanguageModel,
    table=QWEN3,
    prefix=QWEN3_PREFIX,
    config_from_reference=llm_config_from_reference,
    config_to_reference=llm_config_to_reference,
    companions=("tokenizer.json",),
)


def build_on_meta(
    build: Callable[[Any], nn.Module], config: Config, source: str | Path | None = None
) -> nn.Module:
    """Build a module without memory for its weights.

    Args:
        source: the file of the config, for an error.
    Raises: ValueError for sizes that no tensor can have.
    """
    try:
        check_limits(config)
        with torch.device("meta"), _WithoutInit():
            return build(config)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # torch has one a way
        reason = str(error).split("\n")[0][:200]
        raise ValueError(
            f"{'' if source is None else f'{source}: '}{type(config).__name__} has sizes that can "
            f"not be built ({reason}): correct {CONFIG_NAME}"
        ) from error


class _WithoutInit(TorchFunctionMode):
    """Skip ``torch.nn.init``: on the meta device it only imports a compiler, for a second."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def check_depth(config: Any, num_tensors: int, source: str) -> None:
    """Refuse a config with more blocks than tensors, before time goes into building them.

    Raises: ValueError naming both numbers.
    """
    if config.num_hidden_layers > num_tensors:
        raise ValueError(
            f"{source}: the config asks for {config.num_hidden_layers} blocks, but the weights are "
            f"{num_tensors} tensors: is it the one that they were saved with?"
        )


def read_config(directory: str | Path) -> dict[str, Any]:
    """The ``config.json`` of a checkpoint folder.

    Raises: ValueError for a folder without one, one that is not JSON, and a folder whose files are
        partly of one save and partly of another.
    """
    path = Path(directory) / CONFIG_NAME
    if (mark := path.with_name(UNFINISHED)).exists():
        whole = path.parent.resolve().with_name(Path(read_regular(mark, 300).decode()).name)
        raise ValueError(
            f"{directory} holds files of two models, because a save into it goes on or was ended: "
            f"save it again, or, if {whole} is there, move its files here and delete {mark.name}"
        )
    if not path.exists():
        raise ValueError(
            f"{directory} holds no {CONFIG_NAME}: expected a checkpoint folder with {CONFIG_NAME} "
            f"and safetensors"
        )
    return read_json_object(path)


def open_reference(directory: str | Path, part: Part) -> tuple[nn.Module, dict[str, Readable]]:
    """Open a reference checkpoint: the module on the meta device, and its tensors to be read.

    Raises: ValueError for a config of another model or tensors that do not fit it.
    """
    directory = Path(directory)
    values = read_config(directory)
    with in_file(directory / CONFIG_NAME):
        check_fields(values)
        config = part.config_from_reference(values)
    tensors = open_safetensors(directory)
    check_depth(config, len(tensors), str(directory))
    module = build_on_meta(part.build, config, directory / CONFIG_NAME)
    if getattr(config, "tie_word_embeddings", False):
        tensors = _without_tied_head(directory, tensors, part.prefix)
    renamed: Mapping[str, Readable] = from_reference(
        tensors,
        part.table,
        expected=module.state_dict(),
        prefix=part.prefix,
        source=str(directory),
    )
    return module, dict(renamed)


def _without_tied_head(
    directory: Path, tensors: dict[str, StoredTensor], prefix: str
) -> dict[str, StoredTensor]:
    """Drop the copy of the embedding that some files of tied models hold as their head."""
    head = tensors.get("lm_head.weight")
    if head is None:
        return tensors
    name = "embed_tokens.weight"
    embedding = tensors.get(prefix + name, tensors.get(name))
    if embedding is not None and not head.equals(embedding):
        raise ValueError(
            f"{directory / CONFIG_NAME} says tie_word_embeddings, but lm_head.weight is not a copy "
            f"of {name}: set tie_word_embeddings to false if the head was trained on its own"
        )
    return {name: tensor for name, tensor in tensors.items() if tensor is not head}
