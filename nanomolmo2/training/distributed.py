"""One run on many processes: ranks, sharded weights, sums over ranks, sharded checkpoints.

Started by ``torchrun``; without it there is one rank and everything here still works. Every rank
holds a part of each weight, its gradient and its moments (FSDP2); a block's weights are whole only
while it computes. What a run computes does not depend on the number of ranks: the loss is summed,
gradients are summed, and the trainer divides once, by the weight of the whole step.

Source: torch.distributed.fsdp.fully_shard and torch.distributed.checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from nanomolmo2.accelerate import checkpoint_activations
from nanomolmo2.accelerate.device import choose_device
from nanomolmo2.checks import read_with_digest, sha256_of, with_digest
from nanomolmo2.models import NanoMolmo2, VisionEncoder
from nanomolmo2.models.connector import MultimodalConnector
from nanomolmo2.models.language_model import DecoderLayer
from nanomolmo2.models.layers import LayerNorm, RMSNorm
from nanomolmo2.models.vision_encoder import VisionLayer

NORMS = (RMSNorm, LayerNorm)
GLOO_THREADS_FINISH = 0.2  # seconds; they need far less
Item = TypeVar("Item")
STATE_FILE = "state.json"  # step, data position: what is no tensor


@dataclass(frozen=True)
class World:
    """The processes of a run, and this one's place among them."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def from_env(cls, device: str | None = None) -> Self:
        """Join the processes that ``torchrun`` started; without it, one rank on one device.

        Args:
            device: such as "cpu", "cuda" or "cuda:1"; by default CUDA where there is one, else the
                CPU: on MPS no training was tried, so that is taken by its name only. With
                ``torchrun`` every rank has a GPU of its own. NCCL between GPUs, Gloo between CPU
                processes.
        Raises: ValueError for a device that is not there, and one GPU for many ranks.
        """
        place = choose_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        ranks = "RANK" in os.environ
        if ranks and place.type == "cuda":
            if ":" in str(device):
                raise ValueError(
                    f"the device is {device}, but torchrun gives every process a GPU of its own: "
                    f"choose cuda, and the GPUs by CUDA_VISIBLE_DEVICES"
                )
            place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if place.type == "cuda":
            torch.cuda.set_device(place)
        if not ranks:
            return cls(device=place)
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if not dist.is_initialized():
            dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
        return cls(rank, size, place)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This rank's part of what all have; where there are too few for all ranks, everything."""
        few = len(items) < self.size
        return items if few else items[self.rank :: self.size]

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs and folders."""
        return self.rank == 0

    def mesh(self) -> DeviceMesh:
        """All ranks in a row. A single process without ``torchrun`` becomes a group of one."""
        if not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return init_device_mesh(self.device.type, (self.size,))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave the group, at the end of the program.

        All together: a rank that takes its connections away from others may crash. After an error
        the others may never come, so nobody waits then.
        """
        if dist.is_initialized():
            if kind is None:
                dist.barrier()
            dist.destroy_process_group()
            # Gloo's threads outlive it. One that has yet to let go of a tensor of the last
            # operation needs Python for it: if that is shutting down by then, the process aborts.
            time.sleep(GLOO_THREADS_FINISH)


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of every rank's ``value``, the same on all; call it on every rank."""
    value = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def average_gradients(model: nn.Module, world: World) -> None:
    """Give every rank the mean of all gradients, of a model that each of them holds whole.

    Call it on every rank. A gradient that a rank does not have counts as zero.
    """
    learns = [p for p in model.parameters() if p.requires_grad]
    has = sum_over_ranks(torch.tensor([float(p.grad is not None) for p in learns]))
    learns = [p for p, ranks in zip(learns, has.tolist(), strict=True) if ranks]
    parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learns]
    mean = sum_over_ranks(torch.cat(parts)) / world.size
    for p, gradient in zip(learns, mean.split([p.numel() for p in learns]), strict=True):
        p.grad = gradient.view_as(p)


def gather_objects(value: Any) -> list[Any]:
    """Every rank's ``value`` (small and picklable), by rank; call it on every rank."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def shard(
    model: nn.Module,
    world: World,
    *,
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    compile: bool = False,
) -> None:
    """Spread ``model`` over the ranks, in place. Optimisers are made afterwards.

    Every rank must hold the same weights before. A vision encoder without trainable weights stays
    whole on every rank, in ``dtype``: it needs neither gradients nor moments, and ranks may encode
    any number of images. Of a single rank that is so of everything frozen but norms: nothing is
    gathered that is there already. Everything else is sharded block by block.

    Args:
        model: NanoMolmo2, or a LanguageModel; what learns in float32, what is frozen is frozen
            already, in float32 or ``dtype``.
        dtype: of the arithmetic. Weights that learn and moments stay in float32, norms compute in
            float32, and gradients are summed over ranks in float32.
        gradient_checkpointing: keep one activation a block, compute the rest again in backward.
        compile: torch.compile every block.
    """
    if gradient_checkpointing:
        checkpoint_activations(model, "full")
    blocks: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, (DecoderLayer, VisionLayer)):
            blocks.append(module)
    if compile:
        for block in blocks:
            block.compile()
    if world.size == 1 and dtype == torch.float32:
        model.to(world.device)
        return
    unsharded: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, VisionEncoder) and not any(
            p.requires_grad for p in module.parameters()
        ):
            module.to(world.device, dtype)
            unsharded |= set(module.parameters())
    if world.size == 1:
        norms = {p for m in model.modules() if isinstance(m, NORMS) for p in m.parameters()}
        for parameter in model.parameters():
            if not parameter.requires_grad and parameter not in norms:
                parameter.data = parameter.data.to(world.device, dtype)
                unsharded.add(parameter)
    if isinstance(model, NanoMolmo2):
        # All ranks must gather the same weights: those of a rank whose texts have no image too.
        model.run_vision_without_images = world.size > 1
    _fully_shard(model, blocks, world.mesh(), dtype, unsharded)
    model.to(world.device)  # buffers, and what stays whole
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Sums, not means: the trainer divides by the weight of the whole step.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for method in ("loss", "loss_terms"):  # the other one of models that point
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)
    # The connector returns views, which is a problem only for operations in place: there are none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


def _fully_shard(
    model: nn.Module,
    blocks: list[nn.Module],
    mesh: DeviceMesh,
    dtype: torch.dtype,
    unsharded: set[nn.Parameter],
) -> None:
    """Inner modules first: norms where they compute in another dtype, blocks, connector, root."""
    # Inputs are never cast: label weights, for one, are float32 on purpose.
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    norm_policy = MixedPrecisionPolicy(
        torch.float32, torch.float32, output_dtype=dtype, cast_forward_inputs=False
    )
    units = [*blocks, *(m for m in model.modules() if isinstance(m, MultimodalConnector))]
    units = [m for m in units if not unsharded >= set(m.parameters())]
    taken: set[nn.Module] = set()
    for unit in [*units, model]:
        norms = [
            m
            for m in unit.modules()
            if isinstance(m, NORMS) and m not in taken and not unsharded & set(m.parameters())
        ]
        if dtype != torch.float32:
            if unit is model:  # far apart: each on its own
                for norm in norms:
                    fully_shard(norm, mesh=mesh, mp_policy=norm_policy)
            elif norms:
                fully_shard(norms, mesh=mesh, mp_policy=norm_policy)  # type: ignore[arg-type]
        taken |= set(norms)
        fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=unsharded)


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients, sharded or not, to a joint norm of at most ``max_norm``.

    Returns: the norm before, over all ranks, a scalar.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    norm = get_total_norm([p.grad for p in with_gradient if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    clip_grads_with_norm_(with_gradient, max_norm, norm)
    return norm


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, sharded or not, without its graph; call it on every rank."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All weights, unsharded and on the CPU, on rank 0; empty elsewhere. Call it on every rank."""
    main = not dist.is_initialized() or dist.get_rank() == 0
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():  # one at a time: no rank holds all of it
        tensor = full_tensor(value)
        if main:
            weights[name] = tensor.cpu()
    return weights


def save_sharded(
    folder: str | Path,
    model: nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
    state: Mapping[str, Any],
    left_out: Collection[str] = (),
) -> None:
    """Write a checkpoint of model, moments and random generators; call it on every rank.

    The folder is there completely or not at all: all ranks write into a folder beside it, which
    rank 0 renames when the last one is done.

    Args:
        state: what else the run needs (step, data position), of rank 0, as plain JSON types.
        left_out: names of weights that are not written.
    Raises: ValueError if the folder exists or cannot be written; nothing is left of it then.
    """
    folder = Path(folder)
    aside = folder.with_name(f".tmp-{folder.name}")
    json.dumps(state)  # an error of the caller shows before anything is written
    _on_main(lambda: _prepare(folder, aside))
    try:
        tensors = _tensors(model, optimizers, left_out)
        tensors |= _random_state()
        try:
            with _quiet():
                dcp.save(tensors, checkpoint_id=aside, no_dist=not dist.is_initialized())
        except (Exception, dcp.api.CheckpointException) as error:
            raise ValueError(
                f"the checkpoint {folder} cannot be written ({_reason(error)}): is the disk full? "
                f"Earlier checkpoints are as they were"
            ) from error
        sums: dict[str, str] = {}
        for own in gather_objects(_checksums(aside.glob(f"__{_rank()}_*.distcp"))):
            sums |= own
        _on_main(lambda: _finish(folder, aside, {"state": dict(state), "sha256": sums}))
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def stored_checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a checkpoint, as :func:`save_sharded` took them."""
    sums: dict[str, str] = read_state(folder)["sha256"]
    return {**sums, STATE_FILE: sha256_of(folder / STATE_FILE)}


def read_state(folder: Path) -> dict[str, Any]:
    """``state``, ``sha256`` of the files and number of ``ranks`` of a checkpoint.

    Raises: OSError, ValueError if the file is not as it was written.
    """
    contents = read_with_digest(folder / STATE_FILE)
    if contents.keys() != {"state", "sha256", "ranks"}:
        raise ValueError(f"{STATE_FILE} has the keys {', '.join(contents)}")
    if ".metadata" not in contents["sha256"]:
        raise ValueError(f"{STATE_FILE} does not name its files")
    return contents


def load_sharded(
    folder: str | Path,
    model: nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
    left_out: Collection[str] = (),
) -> dict[str, Any]:
    """Read what :func:`save_sharded` wrote, on any number of ranks; call it on every rank.

    Weights and moments are read in place, each rank its own part. Random generators come back
    where the number of ranks is the same.

    Args:
        left_out: names of weights that stay as they are where the checkpoint does not hold them.
    Returns: ``state``.
    Raises: ValueError if the checkpoint is damaged or of another model.
    """
    folder = Path(folder)
    try:
        contents = read_state(folder)
        state: dict[str, Any] = contents["state"]
        _verify(folder, contents["sha256"])
        reader = dcp.FileSystemReader(folder)
        stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    except Exception as error:  # pickle and JSON raise many kinds
        raise ValueError(
            f"{folder} is no readable training checkpoint ({_reason(error)}): use the one before"
        ) from None
    left_out = {name for name in left_out if f"model/{name}" not in stored}
    target = _tensors(model, {}, left_out)
    moments = _empty_moments(model, optimizers, stored)
    target |= {name: slot.tensor for name, slot in moments.items()}
    found = {name for name in stored if not name.startswith("random/")}
    if found != target.keys():
        missing, unknown = sorted(target.keys() - found), sorted(found - target.keys())
        raise ValueError(
            f"{folder} is of another model or optimiser: it lacks {missing[:3]} ({len(missing)}) "
            f"and has {unknown[:3]} ({len(unknown)}) that are not in this run: use the same recipe"
        )
    misshapen = [name for name, t in target.items() if stored[name].size != t.shape]
    if misshapen:
        name = misshapen[0]
        raise ValueError(
            f"{folder} is of another model: {name} is {tuple(stored[name].size)} there and "
            f"{tuple(target[name].shape)} in this run: use the same recipe"
        )
    random = {}
    if contents["ranks"] == _ranks():
        random = {k: torch.empty_like(t) for k, t in _random_state().items() if k in stored}
    with _quiet():
        dcp.load(target | random, storage_reader=reader, no_dist=not dist.is_initialized())
    for slot in moments.values():
        slot.optimizer.state[slot.parameter][slot.key] = slot.tensor
    _set_random_state(random)
    return state


@dataclass
class _Moment:
    """One tensor of an optimiser's state, and where it belongs."""

    optimizer: torch.optim.Optimizer
    parameter: nn.Parameter
    key: str
    tensor: Tensor


def _tensors(
    model: nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
    left_out: Collection[str] = (),
) -> dict[str, Tensor]:
    """Weights and moments by name; the name says nothing of ranks."""
    weights = model.state_dict().items()
    tensors = {f"model/{name}": value for name, value in weights if name not in left_out}
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    for part, optimizer in optimizers.items():
        for parameter, moments in optimizer.state.items():
            for key, value in moments.items():
                tensors[f"optimizer/{part}/{names[parameter]}/{key}"] = value
    return tensors


def _empty_moments(
    model: nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
    stored: Mapping[str, Any],
) -> dict[str, _Moment]:
    """Room for every stored moment of this run's optimisers, sharded as its parameter is."""
    parameters = dict(model.named_parameters())
    own = {part: {p for g in o.param_groups for p in g["params"]} for part, o in optimizers.items()}
    moments = {}
    for name, meta in stored.items():
        kind, _, rest = name.partition("/")
        if kind != "optimizer" or not isinstance(meta, TensorStorageMetadata):
            continue
        part, parameter_name, key = rest.split("/")
        parameter = parameters.get(parameter_name)
        if parameter is None or parameter not in own.get(part, ()):
            continue
        if meta.size == parameter.shape:
            tensor = torch.zeros_like(parameter, dtype=meta.properties.dtype)
        else:  # a step counter; AdamW keeps it on the CPU
            tensor = torch.zeros(meta.size, dtype=meta.properties.dtype)
        moments[name] = _Moment(optimizers[part], parameter, key, tensor.detach())
    return moments


def _random_state() -> dict[str, Tensor]:
    """This rank's random generators."""
    states = {f"random/{_rank()}/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"random/{_rank()}/cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_state(states: Mapping[str, Tensor]) -> None:
    for name, value in states.items():
        (torch.cuda if name.endswith("/cuda") else torch).set_rng_state(value)


def _prepare(folder: Path, aside: Path) -> None:
    if folder.exists():
        raise ValueError(f"{folder} already exists: a checkpoint is written once")
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
    aside.mkdir(parents=True)


def _checksums(files: Iterable[Path]) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in files}


def _verify(folder: Path, sums: dict[str, str]) -> None:
    """Every file is as it was written; the ranks share the reading and the verdict."""
    names = sorted(sums)[_rank() :: _ranks()]
    damaged = [
        name
        for name in names
        if not (folder / name).is_file() or sha256_of(folder / name) != sums[name]
    ]
    damaged = [name for part in gather_objects(damaged) for name in part]
    if damaged:
        raise ValueError(f"missing or changed since it was written: {', '.join(damaged)}")


def _finish(folder: Path, aside: Path, contents: dict[str, Any]) -> None:
    contents["ranks"] = _ranks()
    contents["sha256"] |= _checksums([aside / ".metadata"])
    text = json.dumps(with_digest(contents))
    (aside / STATE_FILE).write_text(text, encoding="utf-8")
    os.replace(aside, folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A single process is meant: it is no reason for a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _on_main(work: Callable[[], None]) -> None:
    """Rank 0 does it, the others wait; its error is everyone's."""
    problem: str | None = None
    if _rank() == 0:
        try:
            work()
        except (OSError, ValueError) as error:
            problem = str(error)
    problem = _from_main(problem)
    if problem is not None:
        raise ValueError(problem)


def _from_main(value: str | None) -> str | None:
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _reason(error: BaseException) -> str:
    """The last line of an error: DCP puts the traces of all ranks before it."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__
