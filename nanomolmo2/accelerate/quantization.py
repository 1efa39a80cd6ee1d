"""Whole modules with 8-bit or 16-bit weights.

K inputs, N outputs, V num_logits.

Modes:

- ``int8``: int8 weights with one scale an output, activations rounded to int8 on the way in.
- ``int8-weight-only``: the same weights, activations stay floating point.
- ``fp16-weights``: float16 weights, float32 arithmetic.
- ``auto``: what :func:`auto_precision` finds best for the device.

What selects points (`PointPredictor`) stays in floating point unless it is named: it has 0.2 % of
the weights of an 8B, and its scores choose between neighbours.

A layer stores plain tensors and packs them for its kernel at the first call; packing frees the
plain ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from nanomolmo2.accelerate.fused import fuse_projections
from nanomolmo2.accelerate.quantized_linear import QuantizedLinear, check_mode
from nanomolmo2.accelerate.swap import replace_layer

Module = TypeVar("Module", bound=nn.Module)
Modes: TypeAlias = "str | Mapping[str, str | None] | None"
Samples: TypeAlias = Any  # a tensor, keyword arguments as a mapping, or a sequence of these

# Parts that a mode for the whole model leaves as they are.
_FLOATING = ("point_predictor.", "finder.")
# Numbers that a cache holds of a position, from which it is kept in 16 bit beside int8 weights.
_WORTH_ROUNDING = 2**14
_TINY = torch.finfo(torch.float32).tiny


# ---- whole modules ----


@dataclasses.dataclass(frozen=True)
class LayerError:
    """How far a layer's output moves when it alone is quantised.

    name: in the module. mode: what it was quantised to. shape: (N, K).
    error: norm of the difference over the norm of the output (without bias), on the samples.
    """

    name: str
    mode: str
    shape: tuple[int, int]
    error: float


def quantize(
    module: Module,
    mode: Modes,
    *,
    calibration: Samples = None,
    max_error: float | None = None,
    samples: Samples = None,
    keep: Iterable[str] = (),
) -> Module:
    """Replace every linear layer in place, the head of a tied language model included.

    Linear layers become `QuantizedLinear`, and attention and SwiGLU are fused, see
    `fuse_projections`. Embeddings, norms and convolutions stay, and so do what selects points,
    unless ``mode`` names it (``{"point_predictor": "int8"}``), and what finds. The embedding table
    of a quantised
    language model is rounded to 16 bit, as it is saved, but keeps its dtype. No weight needs a
    gradient afterwards.

    Args:
        module: floating point, such as a LanguageModel.
        mode: one of :data:`MODES`; ``"auto"``, which may also cast the module; None = nothing. Or
            one for some children by name, such as ``{"llm": "int8"}``.
        calibration: inputs of the module, which move the scale of channels with outliers from the
            activations into the weights; for int8.
        max_error: layers whose relative error on the samples is above it get float16 weights; for
            int8.
        samples: inputs for ``max_error``.
        keep: names of layers that get float16 weights whatever their error.
    Returns: the module.
    Raises: ValueError for unknown modes, a module that is quantised already or has no linear
        layers, options that do not go together, names in ``keep`` that are no layers.
    """
    if any(isinstance(m, QuantizedLinear) for m in _covered(module, mode)):
        raise ValueError(
            "the module is quantised already: quantise floating point weights, once; to change the "
            "mode load them again"
        )
    if any(hasattr(m, "lora_A") for m in _covered(module, mode)):
        raise ValueError(
            "the module has LoRA matrices, which would be lost: merge_lora(llm, final=True) first"
        )
    if (max_error is None) != (samples is None):
        raise ValueError("max_error and samples go together: the error is measured on the samples")
    with _separate_heads(module, mode):
        plan = _plan(module, mode)
        if (calibration is not None or max_error is not None) and "int8" not in plan.values():
            raise ValueError("calibration and max_error are for the mode 'int8', which no part has")
        keep = set(keep)
        if unknown := sorted(keep - set(plan)):
            raise ValueError(
                f"keep names {unknown[0]!r}, which is no linear layer to quantise: expected names "
                f"such as {next(iter(plan), 'layers.0.mlp.up_proj')!r}"
            )
        scales = {} if calibration is None else _input_scales(module, plan, calibration)
        if max_error is not None:
            errors = _errors(module, plan, samples, scales)
            keep |= {e.name for e in errors if e.mode == "int8" and not e.error <= max_error}
        plan |= dict.fromkeys(keep, "fp16-weights")
        for name, layer_mode in plan.items():
            linear = module.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            scale = scales.get(name) if layer_mode == "int8" else None
            replace_layer(module, name, QuantizedLinear.from_linear(linear, layer_mode, scale))
    for part in _parts(module, mode):
        if any(isinstance(m, QuantizedLinear) for m in part.modules()):
            _round_tables(part)
            part.requires_grad_(False)
    return fuse_projections(module)


@torch.no_grad()
def dequantize(module: Module) -> Module:
    """Replace every quantised layer in place by a float32 one of the same, rounded, values.

    It can be trained then; what quantising had rounded away is not there. A tied head is the
    embedding table again.
    """
    model: Any
    for model in list(module.modules()):
        if _is_tied(model) and isinstance(model.lm_head, QuantizedLinear):
            model.lm_head = None
    for name, layer in list(module.named_modules()):
        if isinstance(layer, QuantizedLinear):
            replace_layer(module, name, layer.dequantized())
    return module


def quantization_report(
    module: nn.Module,
    samples: Samples,
    mode: str | Mapping[str, str | None] = "int8",
    *,
    calibration: Samples = None,
) -> list[LayerError]:
    """The error of every layer that the samples reach, in the order of the module.

    Each layer is compared on the inputs that it gets in the floating point module, which stays as
    it is. Arguments as in :func:`quantize`.
    """
    if any(isinstance(m, QuantizedLinear) for m in module.modules()):
        raise ValueError(
            "the module is quantised already: the report compares with floating point weights"
        )
    with _separate_heads(module, mode):
        plan = _plan(module, mode, cast=False)
        scales = {} if calibration is None else _input_scales(module, plan, calibration)
        return _errors(module, plan, samples, scales)


def is_quantized(module: nn.Module) -> bool:
    """Whether any layer is."""
    return any(isinstance(m, QuantizedLinear) for m in module.modules())


def count_weights(module: nn.Module) -> int:
    """Parameters of a module, quantised ones included and a quantised copy of a tied head not."""
    heads = {id(m.lm_head) for m in module.modules() if _is_tied(m)}
    layers = [m for m in module.modules() if isinstance(m, QuantizedLinear) and id(m) not in heads]
    return sum(p.numel() for p in module.parameters()) + sum(m.num_weights for m in layers)


def cache_dtype(llm: nn.Module) -> torch.dtype | None:
    """Of a decoder's keys and values in a cache; None = as they are computed.

    Beside int8 weights, whose own rounding is coarser, bfloat16: on a CPU, reading a float32 cache
    costs as much as all int8 weights. Small models keep what they compute: they gain no time, and
    `tiny` loses answers by it (docs/quantisation.md).
    """
    config: Any = llm.config
    position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    if position < _WORTH_ROUNDING:
        return None
    int8 = any(isinstance(m, QuantizedLinear) and m.mode.startswith("int8") for m in llm.modules())
    return torch.bfloat16 if int8 else None


def _is_tied(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    return hasattr(module, "lm_head") and bool(getattr(config, "tie_word_embeddings", False))


# ---- what a device is good at ----


@dataclasses.dataclass(frozen=True)
class Choice:
    """A precision: a mode of :data:`MODES` or None, and a dtype to cast to or None."""

    mode: str | None
    dtype: torch.dtype | None


def auto_precision(device: torch.device | str = "cpu") -> Choice:
    """The precision that ``auto`` stands for.

    CUDA: bfloat16. Apple GPUs: float16. CPUs with AMX or AVX512-BF16: bfloat16, which they multiply
    natively. Other CPUs with AVX2: float16 weights, nearly lossless and twice as fast as float32.
    Anything else stays as it is.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return Choice(None, torch.bfloat16)
    if kind == "mps":
        return Choice(None, torch.float16)
    features = cpu_features() if kind == "cpu" else frozenset()
    if features & {"amx", "avx512_bf16"}:
        return Choice(None, torch.bfloat16)
    if "avx2" in features:
        return Choice("fp16-weights", None)
    return Choice(None, None)


def cpu_features() -> frozenset[str]:
    """Which of ``amx``, ``avx512_bf16`` and ``avx2`` PyTorch finds."""
    names = {
        "amx": "_is_amx_tile_supported",
        "avx512_bf16": "_is_avx512_bf16_supported",
        "avx2": "_is_avx2_supported",
    }
    return frozenset(n for n, check in names.items() if getattr(torch.cpu, check, lambda: False)())


# ---- from and to files ----


def quantization_config(module: nn.Module) -> dict[str, Any] | None:
    """How a module is quantised, as plain JSON types; None if it is not.

    ``mode`` of most layers, ``exceptions`` by name (None = floating point), ``calibrated``.
    """
    modes: dict[str, str | None] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, QuantizedLinear):
            modes[name] = layer.mode
        elif isinstance(layer, nn.Linear):
            modes[name] = None
    counts = Counter(mode for mode in modes.values() if mode is not None)
    if not counts:
        return None
    usual = counts.most_common(1)[0][0]
    result: dict[str, Any] = {"mode": usual}
    if exceptions := {name: mode for name, mode in modes.items() if mode != usual}:
        result["exceptions"] = exceptions
    if any(isinstance(m, QuantizedLinear) and m.calibrated for m in module.modules()):
        result["calibrated"] = True
    return result


def apply_quantization_config(module: nn.Module, description: Mapping[str, Any]) -> None:
    """Give a module the layers of :func:`quantization_config`, empty, for its weights to be loaded.

    Raises: ValueError for anything that :func:`quantization_config` does not write.
    """
    known = ("mode", "exceptions", "calibrated")
    entry = description if isinstance(description, Mapping) else {}
    exceptions = entry.get("exceptions", {})
    if set(entry) - {*known} or not entry or not isinstance(exceptions, Mapping):
        raise ValueError(
            f"a quantization entry is an object with the keys {', '.join(known)}, found "
            f"{description!r:.80}: use a newer nanomolmo2"
        )
    mode = description.get("mode")
    for name in (mode, *(m for m in exceptions.values() if m is not None)):
        check_mode(name)
    with _separate_heads(module, mode):
        names = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
        if unknown := sorted(set(exceptions) - set(names)):
            raise ValueError(
                f"the quantization exceptions name {unknown[0]!r}, which the model does not have"
            )
        for name in names:
            layer_mode = exceptions.get(name, mode)
            if layer_mode is not None:
                linear = module.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                layer = QuantizedLinear(
                    linear.in_features,
                    linear.out_features,
                    layer_mode,
                    bias=linear.bias is not None,
                    calibrated=bool(description.get("calibrated")) and layer_mode == "int8",
                    device=linear.weight.device,
                )
                replace_layer(module, name, layer)
    module.requires_grad_(False)


def fixed_dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    """Tensors of the state that keep their dtype whatever the module is cast to."""
    return {
        f"{name}.{buffer}" if name else buffer: tensor.dtype
        for name, layer in module.named_modules()
        if isinstance(layer, QuantizedLinear)
        for buffer, tensor in layer.state_dict().items()
    }


def in_16_bit(table: Tensor) -> Tensor:
    """The same values in 16 bit, where that loses nothing; else the table itself."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(table.to(dtype).to(table.dtype), table):
            return table.to(dtype)
    return table


# ---- helpers ----


def _parts(module: nn.Module, mode: Modes) -> list[nn.Module]:
    """The modules that the modes are for."""
    if not isinstance(mode, Mapping):
        return [module] if mode is not None else []
    children = dict(module.named_children())
    if unknown := sorted(set(mode) - set(children)):
        raise ValueError(
            f"there is no part {unknown[0]!r} to quantise: the module has {', '.join(children)}"
        )
    return [children[name] for name, m in mode.items() if m is not None]


def _covered(module: nn.Module, mode: Modes) -> Iterator[nn.Module]:
    for part in _parts(module, mode):
        yield from part.modules()


def _plan(module: nn.Module, mode: Modes, cast: bool = True) -> dict[str, str]:
    """The mode of every layer by name; ``auto`` is resolved, and casts what it wants cast."""
    if isinstance(mode, Mapping):
        plan: dict[str, str] = {}
        for child, child_mode in mode.items():
            part = module.get_submodule(child)
            found = _plan(part, child_mode, cast)
            plan |= {f"{child}.{name}" if name else child: m for name, m in found.items()}
        return plan
    if mode is None:
        return {}
    if mode == "auto":
        tensor = next(iter(module.parameters()))
        choice = auto_precision(tensor.device)
        if choice.dtype is not None and cast:
            module.to(choice.dtype)
        if choice.mode is None:
            return {}
        mode = choice.mode
    check_mode(mode)
    plan = {
        name: mode
        for name, m in module.named_modules()
        if isinstance(m, nn.Linear) and not name.startswith(_FLOATING)
    }
    if not plan or "" in plan:
        raise ValueError(
            f"{type(module).__name__} has no linear layers inside: quantise a whole part, such as "
            f"a LanguageModel"
        )
    return plan


@contextlib.contextmanager
def _separate_heads(module: nn.Module, mode: Modes) -> Iterator[None]:
    """Give tied language models a head of their own: a layer that shares the embedding's memory.

    A head that was not replaced meanwhile goes again.
    """
    made: list[tuple[Any, nn.Linear]] = []
    for owner in list(_covered(module, mode)):
        model: Any = owner
        if _is_tied(model) and model.lm_head is None:
            V, table = model.config.num_logits, model.embed_tokens.weight
            head = nn.Linear(table.shape[1], V, bias=False, device="meta")
            head.weight = nn.Parameter(table.detach()[:V], requires_grad=False)
            model.lm_head = head
            made.append((model, head))
    try:
        yield
    finally:
        for model, head in made:
            if model.lm_head is head:
                model.lm_head = None


def _round_tables(module: nn.Module) -> None:
    """Round token embeddings to 16 bit, so that a saved model gives the same bits."""
    for owner in module.modules():
        table = getattr(owner, "embed_tokens", None)
        if isinstance(table, nn.Embedding) and in_16_bit(table.weight.detach()).itemsize > 2:
            rounded = table.weight.detach().half().to(table.weight.dtype)
            table.weight = nn.Parameter(rounded, requires_grad=False)


def _call(module: nn.Module, samples: Samples) -> None:
    """Run a module on samples, without gradients and in evaluation mode."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            for sample in [samples] if isinstance(samples, (Tensor, Mapping)) else samples:
                if isinstance(sample, Mapping):
                    module(**sample)
                else:
                    module(sample)
    finally:
        module.train(training)


@contextlib.contextmanager
def _hooked(
    module: nn.Module, names: Iterable[str], hook: Callable[[str, nn.Linear, Tensor, Tensor], None]
) -> Iterator[None]:
    """Call ``hook(name, layer, x, y)`` after every call of the named layers."""
    handles = []

    def register(name: str) -> None:
        layer = module.get_submodule(name)
        handles.append(
            layer.register_forward_hook(lambda _, inputs, y: hook(name, layer, inputs[0], y))  # type: ignore[arg-type]
        )

    for name in names:
        register(name)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_scales(
    module: nn.Module, plan: Mapping[str, str], calibration: Samples
) -> dict[str, Tensor]:
    """The scale of every input (K,) of the int8 layers: sqrt of its largest value over the median.

    Half of an outlier (in powers) then is in the activations and half in the weights. Channels
    below the median stay: larger activations there would cost others precision.
    """
    names = [name for name, mode in plan.items() if mode == "int8"]
    largest: dict[str, Tensor] = {}

    def look(name: str, layer: nn.Linear, x: Tensor, y: Tensor) -> None:
        peak = x.detach().flatten(0, -2).float().abs().amax(dim=0)
        largest[name] = torch.maximum(largest[name], peak) if name in largest else peak

    with _hooked(module, names, look):
        _call(module, calibration)
    scales = {}
    for name in names:
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        peak = largest.get(name, torch.ones(layer.in_features, device=layer.weight.device))
        scales[name] = (peak / peak.median().clamp_min(_TINY)).sqrt().clamp(1.0, 1e4)
    return scales


def _errors(
    module: nn.Module, plan: Mapping[str, str], samples: Samples, scales: Mapping[str, Tensor]
) -> list[LayerError]:
    squares: dict[str, list[float]] = {}
    layers: dict[str, QuantizedLinear] = {}

    def compare(name: str, layer: nn.Linear, x: Tensor, y: Tensor) -> None:
        if name not in layers:
            scale = scales.get(name) if plan[name] == "int8" else None
            layers[name] = QuantizedLinear.from_linear(layer, plan[name], scale)
        expected = y.float()
        difference = layers[name](x.detach()).float() - expected
        if layer.bias is not None:
            expected = expected - layer.bias.float()
        sums = squares.setdefault(name, [0.0, 0.0])
        sums[0] += float(difference.square().sum())
        sums[1] += float(expected.square().sum())

    with _hooked(module, plan, compare):
        _call(module, samples)
    rows = []
    for name, mode in plan.items():
        if name in squares:
            layer, (wrong, whole) = layers[name], squares[name]
            error = (wrong / max(whole, _TINY)) ** 0.5
            shape = (layer.out_features, layer.in_features)
            rows.append(LayerError(name, mode, shape, error))
    return rows
