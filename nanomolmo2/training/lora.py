"""LoRA: small trained matrices beside frozen linear layers of the language model.

y = W x + alpha / rank * B A x, with A (rank, K) random and B (N, rank) zero at the start: the model
begins as what it was. Merged, the sum is one weight and costs nothing.

K inputs, N outputs.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021); files in the format
of Hugging Face's PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nanomolmo2.accelerate.frozen_linear import (
    Format,
    FrozenLinear,
    dequantize_frozen,
    plain_linear,
    quantize_frozen,
)
from nanomolmo2.accelerate.linear import OneDNNLinear
from nanomolmo2.accelerate.swap import replace_layer
from nanomolmo2.convert.adapters import (
    CONFIG_NAME,
    PEFT_PREFIX,
    WEIGHTS_NAME,
    Adapter,
    LoraConfig,
    add_others,
    check_others,
    check_stack,
    fingerprint,
    joined,
    read_stack,
    round_layers,
    write_adapter,
)
from nanomolmo2.models import LanguageModel, NanoMolmo2
from nanomolmo2.training.distributed import full_tensor

__all__ = [
    "CONFIG_NAME",
    "PEFT_PREFIX",
    "WEIGHTS_NAME",
    "LoraConfig",
    "LoraLinear",
    "adapter_of",
    "add_lora",
    "add_qlora",
    "load_lora",
    "lora_parameters",
    "lora_state_dict",
    "merge_lora",
    "save_lora",
    "unmerge_lora",
]


class LoraLinear(OneDNNLinear):
    """A frozen linear layer with its two matrices.

    ``weight`` keeps its name, so the base's weights are found where they were; where they are 4 or
    8 bits, ``frozen`` holds them in its place. The matrices are float32 whatever the base is: 16
    bit would lose small steps.
    """

    weight: Any  # a parameter, None where `frozen` holds the weights
    bias: Any

    def __init__(self, base: nn.Linear | FrozenLinear, config: LoraConfig) -> None:
        nn.Module.__init__(self)  # the weights are those of the base
        self.in_features, self.out_features, self.config = (
            base.in_features,
            base.out_features,
            config,
        )
        self.frozen = base if isinstance(base, FrozenLinear) else None
        self.origin: str | None = None  # fingerprint of the base, from before it was rounded
        if isinstance(base, FrozenLinear):
            self.weight, self.bias, device = None, None, base.codes.device
        else:
            self.weight, self.bias = base.weight.requires_grad_(False), base.bias
            device = base.weight.device
        K, N, r = self.in_features, self.out_features, config.rank
        self.lora_A = nn.Parameter(torch.empty(r, K, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(N, r, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.is_merged = False
        self.unmerged: Tensor | None = None  # the base weight, while the sum is in its place
        self.train(base.training)

    @property
    def scale(self) -> float:
        return self.config.scale

    def forward(self, x: Tensor) -> Tensor:
        if self.frozen is not None and not self.is_merged:
            y = self.frozen(x)
        else:
            y = super().forward(x)
        if self.is_merged:
            return y
        z = F.dropout(x, self.config.dropout, self.training).to(self.lora_A.dtype)
        return y + (self.scale * F.linear(F.linear(z, self.lora_A), self.lora_B)).to(y.dtype)

    @torch.no_grad()
    def merge(self, dtype: torch.dtype | None = None) -> None:
        """Put the sum, computed in float32, into ``weight``; ``dtype``: by default the base's, and
        float32 where that is 4 or 8 bits."""
        if self.is_merged:
            return
        self.unmerged = None if self.weight is None else self.weight.detach()
        base = self.base_weight()
        merged = base.float() + self.scale * self.lora_B.float() @ self.lora_A.float()
        self.weight = nn.Parameter(merged.to(dtype or base.dtype), requires_grad=False)
        if self.frozen is not None:
            self.bias = self.frozen.bias
        self.is_merged = True

    def unmerge(self) -> None:
        """Put the base weight back: the very same bits, since it was kept."""
        if not self.is_merged:
            return
        if self.unmerged is None:
            self.weight, self.bias = None, None
        else:
            base = self.unmerged.to(self.weight)  # the model may have been moved or cast since
            self.weight = nn.Parameter(base, requires_grad=False)
        self.unmerged, self.is_merged = None, False

    def base_weight(self) -> Tensor:
        """(N, K), without the matrices; float32 of 4 or 8 bits."""
        if self.frozen is not None:
            return self.frozen.dequantized()
        weight: Any = self.unmerged if self.is_merged else self.weight
        base: Tensor = weight.detach()
        return base


def add_lora(llm: LanguageModel, config: LoraConfig | None = None) -> LanguageModel:
    """Give layers of the model matrices, in place; everything else of it is frozen.

    A is drawn from PyTorch's global generator.

    Raises: ValueError for targets that are not there, layers that have matrices already, or a rank
        above that of all layers.
    """
    config = config or LoraConfig()
    if any(True for _ in _layers(llm)):
        raise ValueError("the model has LoRA matrices already: merge them before adding others")
    linear = {
        name: layer
        for name, layer in llm.named_modules()
        if name and isinstance(layer, (nn.Linear, FrozenLinear))
    }
    names = {name.rpartition(".")[2] for name in linear}
    if unknown := [target for target in config.targets if target not in names]:
        raise ValueError(
            f"LoRA's target {unknown[0]!r} is no linear layer of this model: choose among "
            f"{', '.join(sorted(names)) or 'none (a quantised model has no weights to train)'}"
        )
    chosen = {n: layer for n, layer in linear.items() if n.rpartition(".")[2] in config.targets}
    widest = max(min(layer.in_features, layer.out_features) for layer in chosen.values())
    if config.rank > widest:
        raise ValueError(
            f"LoRA's rank is {config.rank}, but no layer that it is for has a rank above {widest}, "
            f"so no more can be learned: choose {widest} or less (--lora-rank)"
        )
    llm.requires_grad_(False)
    for name, layer in chosen.items():
        replace_layer(llm, name, LoraLinear(layer, config))
    return llm


def add_qlora(llm: LanguageModel, config: LoraConfig, format: Format) -> LanguageModel:
    """:func:`add_lora` beside weights of 4 or 8 bits: all linear layers of the blocks, in place.

    Raises: ValueError as :func:`add_lora`, and for weights that are not finite.
    """
    first = next(llm.parameters())
    origin = None if first.is_meta else base_fingerprint(llm, config)
    quantize_frozen(llm.layers, format)
    add_lora(llm, config)
    for _, layer in _layers(llm):
        layer.origin = origin
    return llm


def merge_lora(
    llm: LanguageModel, *, final: bool = False, dtype: torch.dtype | None = None
) -> LanguageModel:
    """Put the sums into the weights, in place.

    By default the base weights are kept beside them, for :func:`unmerge_lora`. ``final``: they and
    the matrices go, layer by layer; what remains is a plain model, ready to save, export or
    quantise. Weights of 4 or 8 bits are floating point then, of the rounded values.

    Args:
        dtype: of the merged weights; by default that of the base, float32 where it is rounded.
    """
    for name, layer in list(_layers(llm)):
        layer.merge(dtype)
        if final:
            replace_layer(llm, name, plain_linear(layer.weight.detach(), layer.bias))
    if final:
        dequantize_frozen(llm, dtype or torch.float32)
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
    adapter = adapter_of(llm)
    if not dist.is_initialized() or dist.get_rank() == 0:
        write_adapter(adapter, folder)


def adapter_of(
    llm: LanguageModel, others: Mapping[str, Tensor] | None = None, model: str = ""
) -> Adapter:
    """The matrices of a model as an `Adapter`; a joint call of all ranks.

    Args:
        others: what else learned; model: the name of the base.
    """
    layer = next((layer for _, layer in _layers(llm)), None)
    if layer is None:
        raise ValueError("the model has no LoRA matrices to save: save the model itself")
    return Adapter(
        source="",
        config=layer.config,
        matrices=lora_state_dict(llm),
        others=others or {},
        model=model,
        base=layer.origin or base_fingerprint(llm, layer.config),
        rounded=None if layer.frozen is None else layer.frozen.format,
    )


def base_fingerprint(llm: LanguageModel, config: LoraConfig) -> str:
    """Of the weights that matrices stand beside, or would; a joint call of all ranks."""
    layers = sorted(_weights(llm).items())
    return fingerprint((n, full_tensor(w)) for n, w in layers if _is_target(n, config))


def load_lora(
    model: LanguageModel | NanoMolmo2,
    folder: str | Path | Sequence[str | Path],
    weights: Sequence[float] | None = None,
) -> LanguageModel | NanoMolmo2:
    """Put matrices that were saved beside the layers of their base, in place.

    Matrices that the model has already are replaced if they are of the same configuration.
    `nanomolmo2.load(base, adapter=folder)` merges them instead.

    Args:
        model: with a whole model, parts that learned whole (the connector) are read too.
        folder: one or several, which are stacked: what they add adds up.
        weights: of several, one for each; 1 by default.
    Raises: ValueError for damaged files, matrices of other layers or shapes, and for a base whose
        adapted weights are others; the model is then as it was.
    """
    llm = model.llm if isinstance(model, NanoMolmo2) else model
    stack = read_stack(folder, weights)
    adapter = joined(stack)
    config = adapter.config
    layers = dict(_layers(llm))
    if layers and (found := next(iter(layers.values())).config) != config:
        raise ValueError(
            f"{adapter.source} holds {config}, but the model has {found}: merge that first"
        )
    check_stack(stack, _weights(llm))
    if isinstance(model, NanoMolmo2):
        check_others(model, stack)
    elif any(one.others for one, _ in stack):
        raise ValueError(
            f"{adapter.source} holds other weights too, such as {next(iter(stack[0][0].others))}: "
            f"give the whole model, not its language model alone"
        )
    round_layers(llm, adapter.rounded)
    if not layers:
        add_lora(llm, config)
    with torch.no_grad():
        for name, tensor in adapter.matrices.items():
            llm.get_parameter(name).copy_(tensor)
    if isinstance(model, NanoMolmo2):
        add_others(model, stack)
    return model


# ---- helpers ----


def _layers(module: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLinear):
            yield name, layer


def _weights(llm: LanguageModel) -> dict[str, Tensor]:
    """Weights (N, K) of the linear layers by name, without matrices that stand beside them."""
    return {
        name: layer.base_weight() if isinstance(layer, LoraLinear) else layer.weight.detach()
        for name, layer in llm.named_modules()
        if isinstance(layer, nn.Linear)
    }


def _is_target(name: str, config: LoraConfig) -> bool:
    return name.rpartition(".")[2] in config.targets
