"""Adapters: what a run with LoRA learned, apart from the model it belongs to.

    DIR/adapter_model.safetensors   the matrices, by the names of Hugging Face's PEFT
    DIR/adapter_config.json         their rank and scale, the base model and its fingerprint
    DIR/other_weights.safetensors   parts that learned whole, such as the connector, if any did

Several adapters of one base are stacked: what they change of it adds up.

K inputs, N outputs, A rows that an embedding has beyond the base vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from nanomolmo2.accelerate.frozen_linear import Format, dequantize_frozen, quantize_frozen
from nanomolmo2.accelerate.quantization import is_quantized
from nanomolmo2.checks import check_replaceable
from nanomolmo2.config import Config, read_json_object
from nanomolmo2.convert.tensor_files import open_tensor_file
from nanomolmo2.convert.tensor_writer import save_tensors
from nanomolmo2.files import atomic_path
from nanomolmo2.models import LanguageModel, NanoMolmo2
from nanomolmo2.terminal import visible

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
OTHERS_NAME = "other_weights.safetensors"
# (A, D) each, see accelerate/new_rows.py.
NEW_ROWS = "llm.embed_tokens.new_rows"
NEW_HEAD_ROWS = "llm.lm_head.new_rows"
OURS = "nanomolmo2"  # the key of the configuration that is not PEFT's, and that PEFT passes over
PEFT_PREFIX = "base_model.model.model."  # PEFT's own, then that of Qwen3ForCausalLM


@dataclass(frozen=True)
class LoraConfig(Config):
    """Which layers get matrices, and of which rank.

    alpha: the sum is scaled by alpha / rank, so that another rank needs no other rate.
    dropout: share of the inputs of A that are left out in training.
    targets: last names of layers: those of attention and MLP by default.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )

    def __post_init__(self) -> None:
        self.check_positive()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a share of at least 0 and below 1, found {self.dropout}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Adapter:
    """One or more adapters as tensors.

    Attributes:
        source: the folder, for messages.
        matrices: such as ``layers.0.mlp.up_proj.lora_A`` (rank, K) and ``.lora_B`` (N, rank).
        others: whole weights by their names in the model, `NEW_ROWS` and `NEW_HEAD_ROWS`.
        model: name of the base; base: fingerprint of its adapted layers; None = not known.
        rounded: what the decoder's layers were rounded to while the matrices learned, None = not.
    """

    source: str
    config: LoraConfig
    matrices: Mapping[str, Tensor]
    others: Mapping[str, Tensor] = field(default_factory=dict)
    model: str = ""
    base: str | None = None
    rounded: Format | None = None


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Of weights by name, in the order given.

    They are rounded to bfloat16, so that a base has one name in float32 and in bfloat16.
    """
    hashed = hashlib.blake2b(digest_size=16)
    for name, weight in weights:
        rounded = weight.detach().bfloat16().cpu().contiguous()
        hashed.update(f"{name} {tuple(rounded.shape)};".encode())
        hashed.update(rounded.view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def write_adapter(adapter: Adapter, folder: str | Path) -> None:
    """Write a folder that :func:`read_adapter` reads, complete or not at all.

    PEFT reads the matrices onto a Qwen3 of the same weights.
    Raises: ValueError if the folder holds other things.
    """
    check_replaceable(folder, (WEIGHTS_NAME, CONFIG_NAME, OTHERS_NAME, "README.md"))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.model or None,
        "r": adapter.config.rank,
        "lora_alpha": adapter.config.alpha,
        "lora_dropout": adapter.config.dropout,
        "target_modules": list(adapter.config.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        OURS: {
            "base": adapter.base,
            "rounded": adapter.rounded,
            "other_weights": len(adapter.others),
        },
    }
    metadata = {"format": "pt"} | ({} if adapter.base is None else {"base": adapter.base})
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        matrices = {f"{PEFT_PREFIX}{n}.weight": t for n, t in adapter.matrices.items()}
        save_tensors(matrices, temporary / WEIGHTS_NAME, metadata)
        if adapter.others:
            save_tensors(adapter.others, temporary / OTHERS_NAME, {"format": "pt"})
        text = json.dumps(config, indent=2)
        (temporary / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def read_adapter(folder: str | Path) -> Adapter:
    """Read what :func:`write_adapter` or PEFT wrote.

    Raises: ValueError for damaged files, and variants of LoRA.
    """
    folder = Path(folder).expanduser()
    if not (folder / CONFIG_NAME).is_file() or not (folder / WEIGHTS_NAME).is_file():
        raise ValueError(
            f"{folder} holds no LoRA: expected {CONFIG_NAME} and {WEIGHTS_NAME}, as save_lora and "
            f"`nanomolmo2 train --lora` (RUN/adapter) write them"
        )
    values = read_json_object(folder / CONFIG_NAME)
    try:
        config = _config_of(values)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_NAME}: {error}") from None
    matrices, metadata = _read_tensors(folder / WEIGHTS_NAME)
    others: dict[str, Tensor] = {}
    if (folder / OTHERS_NAME).is_file():
        others, _ = _read_tensors(folder / OTHERS_NAME)
    ours = values.get(OURS)
    ours = ours if isinstance(ours, dict) else {}
    if ours.get("other_weights", len(others)) != len(others):
        raise ValueError(
            f"{folder} lacks {OTHERS_NAME} or a part of it: {ours['other_weights']!r:.20} weights "
            f"learned whole and {len(others)} are there: copy the folder again"
        )
    base, rounded = ours.get("base") or metadata.get("base"), ours.get("rounded")
    if rounded not in (None, *get_args(Format)):
        raise ValueError(
            f"{folder / CONFIG_NAME}: the base was rounded to {rounded!r:.40}, expected "
            f"{' or '.join(get_args(Format))}: use a newer nanomolmo2"
        )
    model = values.get("base_model_name_or_path")
    return Adapter(
        source=str(folder),
        config=config,
        matrices={
            name.removeprefix(PEFT_PREFIX).removesuffix(".weight"): tensor
            for name, tensor in matrices.items()
        },
        others=others,
        model=model if isinstance(model, str) else "",
        base=base if isinstance(base, str) else None,
        rounded=rounded,
    )


def read_stack(
    folders: str | Path | Sequence[str | Path], weights: Sequence[float] | None = None
) -> list[tuple[Adapter, float]]:
    """Adapters, each with its weight: 1 where none is given.

    Raises: ValueError also for another number of weights, and adapters whose bases differ.
    """
    names = [folders] if isinstance(folders, (str, Path)) else list(folders)
    if not names:
        raise ValueError("no adapter is named: give one folder or more")
    factors = [1.0] * len(names) if weights is None else [float(w) for w in weights]
    if len(factors) != len(names):
        raise ValueError(
            f"{len(factors)} weights were given for {len(names)} adapters: give one for each"
        )
    stack = [(read_adapter(name), weight) for name, weight in zip(names, factors, strict=True)]
    first = stack[0][0]
    for adapter, _ in stack[1:]:
        if adapter.rounded != first.rounded:
            raise ValueError(
                f"{first.source} was trained beside {first.rounded or 'unrounded'} weights and "
                f"{adapter.source} beside {adapter.rounded or 'unrounded'} ones: adapters of one "
                f"base are stacked, merge one of them first"
            )
    return stack


def joined(stack: Sequence[tuple[Adapter, float]]) -> Adapter:
    """One adapter whose matrices have the sum of several as their product.

    The matrices A stand one above the other, the matrices B side by side, with the scales in them.
    One alone, of weight 1, stays as it is.
    """
    first = stack[0][0]
    if len(stack) == 1 and stack[0][1] == 1:
        return first
    rank = sum(adapter.config.rank for adapter, _ in stack)
    targets = tuple(dict.fromkeys(t for adapter, _ in stack for t in adapter.config.targets))
    config = LoraConfig(rank=rank, alpha=float(rank), targets=targets)
    layers = sorted({n.rpartition(".")[0] for adapter, _ in stack for n in adapter.matrices})
    matrices = {}
    for layer in layers:
        parts = [
            (a.matrices.get(f"{layer}.lora_A"), a.matrices.get(f"{layer}.lora_B"), a, weight)
            for a, weight in stack
        ]
        K = next(len(A[0]) for A, _, _, _ in parts if A is not None)
        N = next(len(B) for _, B, _, _ in parts if B is not None)
        upper, side = [], []
        for A, B, adapter, weight in parts:
            r = adapter.config.rank
            upper.append(torch.zeros(r, K) if A is None else A.float())
            scale = weight * adapter.config.scale
            side.append(torch.zeros(N, r) if B is None else B.float() * scale)
        matrices[f"{layer}.lora_A"] = torch.cat(upper)
        matrices[f"{layer}.lora_B"] = torch.cat(side, dim=1)
    source = " + ".join(adapter.source for adapter, _ in stack)
    return dataclasses.replace(first, source=source, config=config, matrices=matrices, others={})


def check_stack(stack: Sequence[tuple[Adapter, float]], layers: Mapping[str, Tensor]) -> None:
    """Whether adapters belong to a decoder, of which ``layers`` are the weights (N, K) by name.

    Raises: ValueError for matrices of other layers or shapes, and for other weights.
    """
    found: dict[tuple[str, ...], str] = {}
    for adapter, _ in stack:
        targets, rank = adapter.config.targets, adapter.config.rank
        own = {n: w for n, w in sorted(layers.items()) if n.rpartition(".")[2] in targets}
        expected = {}
        for name, weight in own.items():
            expected[f"{name}.lora_A"] = (rank, weight.shape[1])
            expected[f"{name}.lora_B"] = (weight.shape[0], rank)
        shapes = {name: tuple(tensor.shape) for name, tensor in adapter.matrices.items()}
        named = f" ({visible(adapter.model)})" if adapter.model else ""
        for name in sorted(expected.keys() | shapes.keys()):
            if expected.get(name) != shapes.get(name):
                raise ValueError(
                    f"{adapter.source} was made for another model: {name:.80} is "
                    f"{shapes.get(name, 'not there')}, but this model's would be "
                    f"{expected.get(name, 'not there')}. Load the base that it was trained on"
                    f"{named}"
                )
        if adapter.base is None:  # of PEFT
            continue
        if targets not in found:
            found[targets] = fingerprint(own.items())
        if adapter.base != found[targets]:
            raise ValueError(
                f"{adapter.source} was trained on other weights of the same shape: load its own "
                f"base{named}, in its own dtype or in float32, before anything is merged or "
                f"quantised"
            )


@torch.no_grad()
def merge_adapters(
    model: NanoMolmo2,
    folders: str | Path | Sequence[str | Path],
    weights: Sequence[float] | None = None,
) -> None:
    """Put adapters into the weights of the base that they belong to, in place.

    What several change adds up, each times its weight: the products of matrices, and the
    differences of weights that learned whole. Where the base was rounded to 4 or 8 bits while they
    learned, it is rounded alike.

    Args:
        folders: of one adapter or more; weights: one for each, 1 by default.
    Raises: ValueError for damaged files, another base, and quantised models; the model is then as
        it was.
    """
    stack = read_stack(folders, weights)
    if is_quantized(model):
        raise ValueError(
            f"{stack[0][0].source} cannot be merged into quantised weights: load a model in "
            f"floating point and quantise it afterwards (--quantize)"
        )
    layers = linear_weights(model.llm)
    check_stack(stack, layers)
    check_others(model, stack)
    round_layers(model.llm, stack[0][0].rounded)
    adapter = joined(stack)
    layers = linear_weights(model.llm)
    for name in sorted({n.rpartition(".")[0] for n in adapter.matrices}):
        A, B = (adapter.matrices[f"{name}.{matrix}"] for matrix in ("lora_A", "lora_B"))
        weight = layers[name]
        merged = weight.float() + adapter.config.scale * (B.float() @ A.float()).to(weight.device)
        weight.copy_(merged)
    add_others(model, stack)


def linear_weights(llm: LanguageModel) -> dict[str, Tensor]:
    """The weights (N, K) of the linear layers of a decoder, by the names of the layers."""
    return {n: m.weight for n, m in llm.named_modules() if isinstance(m, nn.Linear)}


def round_layers(llm: LanguageModel, format: Format | None) -> None:
    """Round the weights of a decoder's blocks as training beside 4 or 8 bits did, in place."""
    if format is not None:
        dtype = llm.norm.weight.dtype
        dequantize_frozen(quantize_frozen(llm.layers, format), dtype)


def check_others(model: NanoMolmo2, stack: Sequence[tuple[Adapter, float]]) -> None:
    """Raises: ValueError for whole weights of an adapter that the model does not have."""
    for adapter, _ in stack:
        for name, tensor in adapter.others.items():
            target = _target(model, name)
            if target is None or target.shape != tensor.shape:
                shape = "not there" if target is None else tuple(target.shape)
                raise ValueError(
                    f"{adapter.source} was made for another model: {visible(name)} is "
                    f"{tuple(tensor.shape)} in {OTHERS_NAME} and {shape} in this model. Load the "
                    f"base that it was trained on"
                )


@torch.no_grad()
def add_others(model: NanoMolmo2, stack: Sequence[tuple[Adapter, float]]) -> None:
    """Put the weights that learned whole into the model: their differences to it, added up."""
    for name in dict.fromkeys(name for adapter, _ in stack for name in adapter.others):
        target = _target(model, name)
        assert target is not None
        values = [(a.others[name].to(target.device), w) for a, w in stack if name in a.others]
        if len(values) == 1 and values[0][1] == 1:
            target.copy_(values[0][0])
            continue
        base = target.float()
        target.copy_(base + sum(weight * (value.float() - base) for value, weight in values))


def _target(model: NanoMolmo2, name: str) -> Tensor | None:
    """The weight of that name; for `NEW_ROWS` and `NEW_HEAD_ROWS` those of the table or head."""
    parameters = dict(model.named_parameters())
    if name in (NEW_ROWS, NEW_HEAD_ROWS):
        whole = parameters.get(f"{name.removesuffix('new_rows')}weight")
        return None if whole is None else whole.detach()[model.config.llm_config.vocab_size :]
    return parameters[name].detach() if name in parameters else None


def _config_of(values: Mapping[str, Any]) -> LoraConfig:
    variants = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern")
    if values.get("peft_type") != "LORA" or any(values.get(key) for key in variants):
        raise ValueError("only plain LoRA is read, none of its variants")
    fields = {"rank": "r", "alpha": "lora_alpha", "targets": "target_modules"}
    if absent := [theirs for theirs in fields.values() if theirs not in values]:
        raise ValueError(f"{', '.join(absent)} is missing: copy the file again")
    found = {ours: values[theirs] for ours, theirs in fields.items()}
    return LoraConfig.from_dict({**found, "dropout": values.get("lora_dropout", 0.0)})


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        opened = open_tensor_file(path)
        return {name: tensor.read() for name, tensor in opened.tensors.items()}, opened.metadata
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): copy the file again") from None
