"""LoRA: small trained matrices beside frozen linear layers of the language model.

y = W x + alpha / rank * B A x, with A (rank, K) random and B (N, rank) zero at the start: the model
begins as what it was. Merged, the sum is one weight and costs nothing.

K inputs, N outputs.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021); files in the format
of Hugging Face's PEFT.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nanomolmo2.accelerate.linear import OneDNNLinear
from nanomolmo2.accelerate.swap import replace_layer
from nanomolmo2.checks import check_replaceable
from nanomolmo2.config import Config, read_json_object
from nanomolmo2.convert.tensor_files import open_tensor_file
from nanomolmo2.convert.tensor_writer import save_tensors
from nanomolmo2.files import atomic_path
from nanomolmo2.models import LanguageModel
from nanomolmo2.training.distributed import full_tensor

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
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


class LoraLinear(OneDNNLinear):
    """A frozen linear layer with its two matrices.

    ``weight`` keeps its name, so the base's weights are found where they were. The matrices are
    float32 whatever the base is: 16 bit would lose small steps.
    """

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        nn.Module.__init__(self)  # the weights are those of the base
        K, N, device = base.in_features, base.out_features, base.weight.device
        self.in_features, self.out_features, self.config = K, N, config
        self.weight, self.bias = base.weight.requires_grad_(False), base.bias
        self.lora_A = nn.Parameter(torch.empty(config.rank, K, device=device))
        self.lora_B = nn.Parameter(torch.zeros(N, config.rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.unmerged: Tensor | None = None  # the base weight, while the sum is in its place
        self.train(base.training)

    @property
    def scale(self) -> float:
        return self.config.alpha / self.config.rank

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.unmerged is not None:
            return y
        z = F.dropout(x, self.config.dropout, self.training).to(self.lora_A.dtype)
        return y + (self.scale * F.linear(F.linear(z, self.lora_A), self.lora_B)).to(y.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Put the sum, computed in float32, into ``weight``."""
        if self.unmerged is None:
            self.unmerged = self.weight.detach()
            merged = self.unmerged.float() + self.scale * self.lora_B.float() @ self.lora_A.float()
            self.weight = nn.Parameter(merged.to(self.unmerged.dtype), requires_grad=False)

    def unmerge(self) -> None:
        """Put the base weight back: the very same bits, since it was kept."""
        if self.unmerged is not None:
            base = self.unmerged.to(self.weight)  # the model may have been moved or cast since
            self.weight = nn.Parameter(base, requires_grad=False)
            self.unmerged = None


def add_lora(llm: LanguageModel, config: LoraConfig | None = None) -> LanguageModel:
    """Give layers of the model matrices, in place; everything else of it is frozen.

    A is drawn from PyTorch's global generator.

    Raises: ValueError for targets that are not there, or layers that have matrices already.
    """
    config = config or LoraConfig()
    if any(True for _ in _layers(llm)):
        raise ValueError("the model has LoRA matrices already: merge them before adding others")
    linear = {n: m for n, m in llm.named_modules() if n and isinstance(m, nn.Linear)}
    names = {name.rpartition(".")[2] for name in linear}
    if unknown := [target for target in config.targets if target not in names]:
        raise ValueError(
            f"LoRA's target {unknown[0]!r} is no linear layer of this model: choose among "
            f"{', '.join(sorted(names)) or 'none (a quantised model has no weights to train)'}"
        )
    llm.requires_grad_(False)
    for name, layer in linear.items():
        if name.rpartition(".")[2] in config.targets:
            replace_layer(llm, name, LoraLinear(layer, config))
    return llm


def merge_lora(llm: LanguageModel, *, final: bool = False) -> LanguageModel:
    """Put the sums into the weights, in place.

    By default the base weights are kept beside them, for :func:`unmerge_lora`. ``final``: they and
    the matrices go, layer by layer; what remains is a plain model, ready to save, export or
    quantise.
    """
    for name, layer in list(_layers(llm)):
        layer.merge()
        if final:
            plain = OneDNNLinear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight, plain.bias = layer.weight, layer.bias
            replace_layer(llm, name, plain)
    return llm


def unmerge_lora(llm: LanguageModel) -> LanguageModel:
    """Undo :func:`merge_lora`: the base weights come back bit for bit."""
    for _, layer in _layers(llm):
        layer.unmerge()
    return llm


def lora_parameters(module: nn.Module) -> list[nn.Parameter]:
    """All matrices A and B."""
    return [p for _, layer in _layers(module) for p in (layer.lora_A, layer.lora_B)]


def lora_state_dict(llm: LanguageModel) -> dict[str, Tensor]:
    """All matrices by name, such as ``layers.0.mlp.up_proj.lora_A``: unsharded, on the CPU.

    Of a sharded model it is a joint call of all ranks.
    """
    return {
        f"{name}.{matrix}": full_tensor(getattr(layer, matrix)).cpu()
        for name, layer in _layers(llm)
        for matrix in ("lora_A", "lora_B")
    }


def save_lora(llm: LanguageModel, folder: str | Path) -> None:
    """Write the matrices alone, as ``adapter_model.safetensors`` and ``adapter_config.json``.

    PEFT reads them onto a Qwen3 of the same weights. Of a sharded model it is a joint call of all
    ranks, and the first one writes.
    """
    layers = dict(_layers(llm))
    if not layers:
        raise ValueError("the model has no LoRA matrices to save: save the model itself")
    tensors = {f"{PEFT_PREFIX}{n}.weight": t for n, t in lora_state_dict(llm).items()}
    metadata = {"format": "pt", "base": _fingerprint(layers)}
    if dist.is_initialized() and dist.get_rank():
        return
    check_replaceable(folder, (WEIGHTS_NAME, CONFIG_NAME, "README.md"))
    config = next(iter(layers.values())).config
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        save_tensors(tensors, temporary / WEIGHTS_NAME, metadata)
        text = json.dumps(_to_peft(config), indent=2)
        (temporary / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def load_lora(llm: LanguageModel, folder: str | Path) -> LanguageModel:
    """Read what :func:`save_lora` wrote onto the same base, in place.

    Matrices that the model has already are replaced if they are of the same configuration.

    Raises: ValueError for damaged files, matrices of other layers or shapes, and for a base whose
        adapted weights are others; the model is then as it was.
    """
    folder = Path(folder)
    config, tensors, base = _read(folder)
    layers: dict[str, Any] = dict(_layers(llm))
    if layers and (found := next(iter(layers.values())).config) != config:
        raise ValueError(f"{folder} holds {config}, but the model has {found}: merge that first")
    if not layers:
        layers = {
            name: layer
            for name, layer in llm.named_modules()
            if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in config.targets
        }
    expected = {}
    for name, layer in layers.items():
        expected[f"{name}.lora_A"] = (config.rank, layer.in_features)
        expected[f"{name}.lora_B"] = (layer.out_features, config.rank)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise ValueError(
                f"{folder} was made for another model: {name} is {shapes.get(name, 'not there')}, "
                f"but this model's would be {expected.get(name, 'not there')}. Load the base that "
                f"it was trained on"
            )
    if base is not None and base != _fingerprint(layers):
        raise ValueError(
            f"{folder} was trained on other weights of the same shape: load its own base, in its "
            f"own dtype or in float32, before anything is merged or quantised"
        )
    if not lora_parameters(llm):
        add_lora(llm, config)
    with torch.no_grad():
        for name, tensor in tensors.items():
            llm.get_parameter(name).copy_(tensor)
    return llm


# ---- helpers ----


def _layers(module: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLinear):
            yield name, layer


def _fingerprint(layers: Mapping[str, nn.Linear]) -> str:
    """Of the base weights of some layers, by name.

    They are rounded to bfloat16, so that a base has one name in float32 and in bfloat16.
    """
    hashed = hashlib.blake2b(digest_size=16)
    for name, layer in sorted(layers.items()):
        kept = layer.unmerged if isinstance(layer, LoraLinear) else None
        weight = full_tensor(layer.weight if kept is None else kept).bfloat16().cpu().contiguous()
        hashed.update(f"{name} {tuple(weight.shape)};".encode())
        hashed.update(weight.view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def _to_peft(config: LoraConfig) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _read(folder: Path) -> tuple[LoraConfig, dict[str, Tensor], str | None]:
    """Configuration, matrices by our names, and the base's fingerprint if the file has one."""
    if not (folder / CONFIG_NAME).exists() or not (folder / WEIGHTS_NAME).exists():
        raise ValueError(
            f"{folder} holds no LoRA: expected {CONFIG_NAME} and {WEIGHTS_NAME}, as save_lora "
            f"writes them"
        )
    values = read_json_object(folder / CONFIG_NAME)
    variants = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern")
    try:
        if values.get("peft_type") != "LORA" or any(values.get(key) for key in variants):
            raise ValueError("only plain LoRA is read, none of its variants")
        fields = {"rank": "r", "alpha": "lora_alpha", "targets": "target_modules"}
        if absent := [theirs for theirs in fields.values() if theirs not in values]:
            raise ValueError(f"{', '.join(absent)} is missing: copy the file again")
        found = {ours: values[theirs] for ours, theirs in fields.items()}
        config = LoraConfig.from_dict({**found, "dropout": values.get("lora_dropout", 0.0)})
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_NAME}: {error}") from None
    try:
        opened = open_tensor_file(folder / WEIGHTS_NAME)
        tensors = {
            name.removeprefix(PEFT_PREFIX).removesuffix(".weight"): tensor.read()
            for name, tensor in opened.tensors.items()
        }
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{folder / WEIGHTS_NAME} cannot be read ({error}): copy the file again"
        ) from None
    return config, tensors, opened.metadata.get("base")
