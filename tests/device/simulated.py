"""``sim``: a device without hardware. It computes on the CPU and is as strict as CUDA.

Importing this module registers the device with torch, once for the whole process and before the
first backward pass (autograd counts devices then). So nothing but `tests/test_device.py`, in a
process of its own, runs what imports it.

Placement. An operator refuses tensors of two devices, as CUDA's do. Allowed are, as there:

- a CPU tensor without dimensions as an operand of an elementwise operator, or as the value of an
  indexed assignment;
- index tensors on the CPU (``x[index]``), which are copied over;
- copies (``to``, ``copy_``).

An in-place operator never writes a device's numbers into a CPU tensor, ``numpy()`` refuses, and a
CPU generator cannot draw on the device.

Waits. The host of a GPU runs ahead of it; counted is what makes it wait, by the rule of
``torch.cuda.set_sync_debug_mode``:

- a value read from the device: ``item``, ``bool``, ``int``, ``float``, ``if tensor``, ``tolist``,
  ``torch.equal``;
- results whose shape depends on values: ``nonzero``, boolean-mask indexing, ``masked_select``,
  ``unique``, ``repeat_interleave`` without ``output_size``, ``bincount``;
- a copy from device to host, also one that is said not to block: memory here is pageable;
- a copy from host to device that blocks (``non_blocking=False``): so does ``torch.tensor(values,
  device=...)``, and indexing by an index that is on the CPU. With ``non_blocking=True`` it does
  not count.

Scalars of Python are arguments of a kernel and never count; neither do CPU tensors without
dimensions that an elementwise operator reads.

The random numbers are the CPU's, so that a result can be compared with one on the CPU bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import traceback
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "sim"
PACKAGE = str(Path(__file__).parents[2] / "nanomolmo2")
aten = torch.ops.aten

READS_A_VALUE = {aten._local_scalar_dense, aten.equal, aten.is_nonzero}
SHAPE_FROM_VALUES = {
    aten.nonzero,
    aten.masked_select,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
COPIES = {aten.copy_, aten._copy_from, aten._to_copy}
FLASH = 1  # of torch's numbers of attention kernels


class SimTensor(Tensor):
    """A tensor of the device; its numbers are those of ``raw``, on the CPU."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> SimTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            layout=raw.layout,
            device=torch.device(NAME, 0),
            requires_grad=False,
        )
        made.raw = raw
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __reduce_ex__(self, protocol: Any) -> Any:
        """In a file it is a tensor of the CPU, as one of CUDA is by ``map_location="cpu"``."""
        return self.raw.__reduce_ex__(protocol)

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{NAME}:{self.raw!r}"


# ---- the rules ----


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    packet = func.overloadpacket
    if packet in COPIES:
        return _copy(func, args, kwargs)
    _refuse_mixed_devices(func, args, kwargs)
    _note_waits(func, args, kwargs)
    goes_to = kwargs.get("device")
    if goes_to is not None and torch.device(goes_to).type != NAME:  # such as new_zeros(device=cpu)
        return func(*_raw(args), **_raw(kwargs))
    on_cpu = {k: v for k, v in _raw(kwargs).items() if k not in ("device", "pin_memory")}
    if goes_to is not None:
        on_cpu["device"] = torch.device("cpu")
    result = _moved(func(*_raw(args), **on_cpu))
    return return_and_correct_aliasing(func, args, kwargs, result) if _has_alias(func) else result


@functools.cache
def _has_alias(func: Any) -> bool:
    """Whether it gives a view, or what it wrote into."""
    return any(r.alias_info is not None for r in func._schema.returns)


def _copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Between devices, or within one."""
    packet = func.overloadpacket
    blocking = not kwargs.get("non_blocking", False)
    if packet is aten._to_copy:
        (source,) = args
        given = kwargs.get("device")
        target = torch.device(given) if given is not None else source.device
        on_cpu = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
        if target.type != NAME:
            _wait("copy from device to host")
            return func(_raw(source), **on_cpu, device=target)
        return SimTensor(func(_raw(source), **on_cpu))
    first, second, *rest = args
    blocking = blocking and not (rest and rest[0])
    target, source = (second, first) if packet is aten._copy_from else (first, second)
    if not isinstance(target, SimTensor):
        _wait("copy from device to host")
    elif not isinstance(source, SimTensor) and blocking:
        _wait("blocking copy from host to device")
    _raw(target).copy_(_raw(source))
    return target


def _refuse_mixed_devices(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = [*_leaves(args), *_leaves(kwargs)]
    others = [x for x in given if not isinstance(x, SimTensor)]
    if not others:  # the usual case
        return
    packet = func.overloadpacket
    allowed: list[Any] = []
    if packet in INDEXING:
        allowed += [x for x in args[1] if isinstance(x, Tensor)]
        allowed += [x for x in args[2:3] if x.ndim == 0]
    elif torch.Tag.pointwise in func.tags or packet in (aten.masked_fill, aten.masked_fill_):
        writes = func._schema.is_mutable
        allowed += [x for x in given[writes:] if isinstance(x, Tensor) and x.ndim == 0]
    refused = [x for x in others if all(x is not y for y in allowed)]
    if packet in INDEXING and not isinstance(args[0], SimTensor):
        refused = [args[0]]
    if refused:
        what = ", ".join(
            f"{tuple(x.shape)} on {x.device}"
            if isinstance(x, Tensor)
            else f"generator on {x.device}"
            for x in given
        )
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"{NAME}:0 and {refused[0].device}! ({func}: {what})"
        )


def _note_waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    packet = func.overloadpacket
    if packet in READS_A_VALUE:
        _wait("a value is read")
    elif packet in SHAPE_FROM_VALUES:
        _wait("the shape depends on values")
    elif packet is aten.repeat_interleave and func._overloadname == "Tensor":
        if kwargs.get("output_size") is None:
            _wait("repeat_interleave without output_size")
    elif packet in INDEXING:
        indices = [x for x in args[1] if isinstance(x, Tensor)]
        masks = [x for x in indices if x.dtype in (torch.bool, torch.uint8)]
        fills = packet is not aten.index and len(args) > 2 and args[2].numel() == 1
        if masks and not (fills and len(indices) == 1):
            _wait("boolean-mask indexing")
        if any(not isinstance(x, SimTensor) for x in indices):
            _wait("an index on the host")


def _raw(values: Any) -> Any:
    """The same with tensors of the CPU."""
    if isinstance(values, SimTensor):
        return values.raw
    if isinstance(values, (list, tuple)):
        return type(values)(map(_raw, values))
    if isinstance(values, dict):
        return {k: _raw(v) for k, v in values.items()}
    return values


def _moved(values: Any) -> Any:
    """The same with tensors of the device."""
    if isinstance(values, Tensor):
        return SimTensor(values)
    return type(values)(map(_moved, values)) if isinstance(values, (list, tuple)) else values


def _leaves(values: Any) -> Iterator[Any]:
    if isinstance(values, dict):
        values = values.values()
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        elif isinstance(value, (Tensor, torch.Generator)):
            yield value


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that the CPU would take; torch would compute it from products and a softmax."""
    options = {"scale": scale, "enable_gqa": enable_gqa}
    raw = _raw((q, k, v, attn_mask))
    if torch._fused_sdp_choice(*raw, dropout_p, is_causal, **options) != FLASH:
        math = aten._scaled_dot_product_attention_math
        return math(q, k, v, attn_mask, dropout_p, is_causal, **options)[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
    flash = aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


# ---- the count ----


@dataclass
class Waits:
    """Host synchronisations, in order: where in the package, and why."""

    places: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.places)

    def __str__(self) -> str:
        lines = Counter(self.places).most_common()
        found = "\n".join(f"  {n} x {where}: {why}" for (where, why), n in lines)
        return f"{len(self)} host synchronisations\n{found}"


_watching: list[Waits] = []


@contextlib.contextmanager
def count_waits() -> Iterator[Waits]:
    """The host synchronisations within it."""
    waits = Waits()
    _watching.append(waits)
    try:
        yield waits
    finally:
        _watching.remove(waits)


def _wait(why: str) -> None:
    if not _watching:
        return
    ours = [f for f in traceback.extract_stack() if f.filename.startswith(PACKAGE)]
    where = "outside the package"
    if ours:
        path = Path(ours[-1].filename).relative_to(Path(PACKAGE).parent)
        where = f"{path}:{ours[-1].lineno} {ours[-1].name}: {ours[-1].line}"
    for waits in _watching:
        waits.places.append((where, why))


# ---- the registration ----


def _module() -> types.ModuleType:
    """``torch.sim``: what torch asks a device's module."""
    module = types.ModuleType(f"torch.{NAME}")
    found: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda device=None: _wait("synchronize"),
        "_is_in_bad_fork": lambda: False,
        "manual_seed_all": lambda seed: None,  # the generator is the CPU's
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
    }
    for name, value in found.items():
        setattr(module, name, value)
    return module


def _factory(func: Any) -> Any:
    """A kernel for an operator that makes tensors of nothing, such as zeros."""

    def make(*args: Any, **kwargs: Any) -> SimTensor:
        _refuse_mixed_devices(func, args, kwargs)
        kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"}
        kwargs["device"] = torch.device("cpu")
        return SimTensor(func(*args, **kwargs))

    return make


def _factories() -> Iterator[tuple[str, Any]]:
    """Operators that take a device and no tensor."""
    for qualified in torch._C._dispatch_get_all_op_names():
        namespace, _, name = qualified.partition("::")
        packet_name, _, overload = name.partition(".")
        unusual = (
            "sparse",
            "quantized",
            "nested",
            "cudnn",
            "mkldnn",
            "_make_dep_token",
            "from_file",
        )
        if namespace != "aten" or any(word in packet_name for word in unusual):
            continue
        packet = getattr(aten, packet_name, None)
        func = getattr(packet, overload or "default", None)
        if func is None:
            continue
        kinds = [(a.name, str(a.type)) for a in func._schema.arguments]
        returns = [str(r.type) for r in func._schema.returns]
        takes_tensors = any("Tensor" in kind for _, kind in kinds)
        if returns == ["Tensor"] and not takes_tensors and any(n == "device" for n, _ in kinds):
            yield name, func


def _register() -> torch.library.Library:
    _setup_privateuseone_for_python_backend(NAME, backend_module=_module())
    library = torch.library.Library("aten", "IMPL")  # lives as long as the registrations
    for name, func in _factories():
        library.impl(name, _factory(func), "PrivateUse1")
    # torch.tensor(values, device=...) comes here, not through __torch_dispatch__.
    copy_from = aten._copy_from.default
    library.impl("_copy_from", lambda *a, **k: _copy(copy_from, a, k), "PrivateUse1")
    library.impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")
    return library


_LIBRARY = _register()
DEVICE = torch.device(NAME, 0)
