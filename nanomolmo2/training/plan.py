"""What a run needs of every rank, before anything is started.

Weights, gradients and moments are counted on a model without memory (PyTorch's meta device).
Activations are counted by running the model's own blocks, forward and backward, on fake tensors:
they have shapes and lifetimes, but no contents. Two depths are run; every further block adds the
same. docs/scaling.md compares the result with measured peaks.

m rows at once, T tokens a row, D width, V vocabulary, M crops a row, N patches, R ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanomolmo2.accelerate import checkpoint_activations, lean_norms
from nanomolmo2.accelerate.cross_entropy import CHUNK_SIZE, linear_cross_entropy
from nanomolmo2.accelerate.memory import GROUP_BYTES, GROUP_BYTES_ELSEWHERE
from nanomolmo2.convert.pretrained import load_config
from nanomolmo2.models import LanguageModel, NanoMolmo2, VisionEncoder
from nanomolmo2.models.connector import MultimodalConnector
from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config
from nanomolmo2.models.presets import preset
from nanomolmo2.training.lora import LoraConfig, add_lora
from nanomolmo2.training.optim import Optimizers, components, set_trainable
from nanomolmo2.training.recipe import Recipe

GB = 1e9
# Of a GPU, for what is no tensor of ours: CUDA's context, NCCL's buffers, gaps between blocks of
# memory. An assumption: it was not measured.
RESERVED = {"cpu": 0.0, "cuda": 2 * GB}
SHORTEST_ROW = 512
_HEAD_CHUNKS = 32  # of the vocabulary: more than the loss cuts a small one into
KNOWN = {"base": "nanomolmo2", "tiny": "tiny", "allenai/Molmo2-4B": "molmo2-4b"}
KNOWN["allenai/Molmo2-8B"] = "molmo2-8b"


@dataclass(frozen=True)
class Setup:
    """A run, as far as its memory is concerned."""

    recipe: Recipe
    model: NanoMolmo2Config
    ranks: int = 1
    device: str = "cpu"

    def change(self, **fields: Any) -> Setup:
        """Other fields of the recipe."""
        return dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, **fields))

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.recipe.dtype == "bfloat16" else torch.float32

    @property
    def rows(self) -> int:
        """m: of a micro-batch; a rank may have fewer in a step."""
        return min(self.recipe.micro_batch_size, self.recipe.batch_size // self.ranks)

    @property
    def is_sharded(self) -> bool:
        """As :func:`nanomolmo2.training.distributed.shard` decides."""
        return self.ranks > 1 or self.dtype != torch.float32


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the highest point of a step.

    temporary: weights of the blocks that compute, of the table and the head, whole, and their
        gradients on the way to the ranks they belong to; or, where that is more, what the optimiser
        computes with at the end of the step, when the next two are nothing.
    activations: what forward keeps for backward, and the work of one block.
    logits: those of a chunk of positions, with their gradients.
    """

    weights: float
    gradients: float
    moments: float
    temporary: float
    activations: float
    logits: float
    reserved: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Switch:
    """A change that makes a run fit."""

    what: str
    setup: Setup
    memory: Memory


def setup_for(recipe: Recipe, ranks: int, device: str, architecture: str | None = None) -> Setup:
    """What is known of a recipe's model, without loading it.

    Args:
        architecture: a preset that has its sizes, where they follow from neither the recipe nor a
            known name nor a folder.
    Raises: ValueError if the sizes are unknown, or the rows cannot be shared by the ranks.
    """
    if recipe.batch_size % ranks:
        raise ValueError(
            f"batch_size {recipe.batch_size} cannot be shared by {ranks} ranks: choose a multiple "
            f"of the ranks"
        )
    model = preset(architecture) if architecture is not None else recipe.architecture
    if model is None:
        model = known_config(recipe.model)
    if model is None and Path(recipe.model).expanduser().is_dir():
        model = load_config(recipe.model)
    if model is None:
        raise ValueError(
            f"the sizes of {recipe.model!r} are not known here: give a preset of the same sizes "
            f"(--architecture)"
        )
    return Setup(recipe, model, ranks, device)


def known_config(name: str) -> NanoMolmo2Config | None:
    """Sizes of a model that is known by its name; None for folders, and for other names."""
    is_folder = "/" in name and Path(name).is_dir()
    return preset(KNOWN[name]) if name in KNOWN and not is_folder else None


def count_weights(config: NanoMolmo2Config) -> int:
    """Parameters of a model, which is not allocated."""
    with torch.device("meta"):
        return _count(NanoMolmo2(config).parameters())


def predict(setup: Setup) -> Memory:
    """Memory of the rank that needs most. Nothing of the model is allocated."""
    model = _on_meta(setup)
    size = setup.dtype.itemsize
    shared = setup.ranks if setup.is_sharded else 1
    vision_is_whole = setup.is_sharded and "vision" not in setup.recipe.train
    vision = _count(model.vision_encoder.parameters()) if vision_is_whole else 0
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = Optimizers(components(model, setup.recipe.train, setup.recipe.optimisers))
    moments = {"adamw": 8, "muon": 4}  # bytes a weight
    saved, work, head = _activations(_shape(setup, model))
    whole, with_block, at_end = _temporary(setup, model)
    activations, logits = saved + max(0.0, work - head), head
    if activations + logits + with_block < at_end:
        activations, logits, with_block = 0.0, 0.0, at_end
    return Memory(
        weights=4 * (_count(model.parameters()) - vision) / shared + vision * size,
        gradients=4 * _count(trained) / shared,
        moments=sum(
            moments[name] * _count(group["params"]) / shared
            for name, part in optimizers.parts.items()
            for group in part.param_groups
        ),
        temporary=whole + with_block,
        activations=activations,
        logits=logits,
        reserved=RESERVED[setup.device],
    )


def switches(setup: Setup, limit: float) -> list[Switch]:
    """Changes that bring a run below ``limit`` bytes a rank: each alone, where any is enough; else
    each together with those that leave the numbers nearly as they are; else none."""
    found = _fitting(setup, [], limit)
    if found:
        return found
    names: list[str] = []
    for name, fields in _FREE:
        if any(getattr(setup.recipe, k) != v for k, v in fields.items()):
            setup, names = setup.change(**fields), [*names, name]
    if not names:
        return []
    together = Switch(" + ".join(names), setup, predict(setup))
    return [together] if together.memory.total <= limit else _fitting(setup, names, limit)


def _fitting(setup: Setup, names: list[str], limit: float) -> list[Switch]:
    """Of every kind of change the smallest that is enough."""
    found = []
    for kind in _changes(setup):
        for name, changed in kind:
            memory = predict(changed)
            if memory.total <= limit:
                found.append(Switch(" + ".join([*names, name]), changed, memory))
                break
    return found


# Changes that leave what is learned nearly as it is.
_FREE: list[tuple[str, dict[str, Any]]] = [
    ("gradient_checkpointing", {"gradient_checkpointing": True}),
    ("micro_batch_size 1", {"micro_batch_size": 1}),
    ("dtype bfloat16", {"dtype": "bfloat16"}),
]


def _changes(setup: Setup) -> Iterator[Iterator[tuple[str, Setup]]]:
    """Kinds of changes, each from the smallest change on."""
    recipe = setup.recipe
    for name, fields in _FREE:
        if any(getattr(recipe, k) != v for k, v in fields.items()):
            yield iter([(name, setup.change(**fields))])
    yield _more_ranks(setup)
    if "llm" in recipe.train:
        train = tuple("lora" if part == "llm" else part for part in recipe.train)
        rates = {**recipe.optimisers, "lora": recipe.optimisers["llm"]}
        lora = setup.change(train=train, optimisers=rates, lora=LoraConfig())
        yield iter([("LoRA in place of llm", lora)])
    yield _shorter_rows(setup)


def _more_ranks(setup: Setup) -> Iterator[tuple[str, Setup]]:
    for ranks in range(setup.ranks + 1, setup.recipe.batch_size + 1):
        if setup.recipe.batch_size % ranks == 0:
            yield f"{ranks} ranks", dataclasses.replace(setup, ranks=ranks)


def _shorter_rows(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """A row that is half as long holds half as many crops."""
    while setup.recipe.sequence_length >= 2 * SHORTEST_ROW:
        tokens = setup.recipe.sequence_length // 2
        crops = max(1, setup.recipe.max_crops // 2)
        setup = setup.change(sequence_length=tokens, max_crops=crops)
        yield f"sequence_length {tokens} and max_crops {crops}", setup


def report(setup: Setup, limit: float | None = None) -> str:
    """The plan as text; ``limit``: bytes that a rank has."""
    recipe, memory = setup.recipe, predict(setup)
    tokens = recipe.batch_size * recipe.sequence_length
    model = _on_meta(setup)
    total = _count(model.parameters())
    trained = _count(p for p in model.parameters() if p.requires_grad)
    passes = math.ceil(recipe.batch_size / setup.ranks / setup.rows)
    lines = [
        f"{recipe.name}: {total / 1e6:,.0f} M weights, {trained / 1e6:,.0f} M of them learn "
        f"({', '.join(recipe.train)})",
        f"a step: {recipe.batch_size} rows of up to {recipe.sequence_length:,} tokens and "
        f"{recipe.max_crops} crops = {tokens:,} tokens; on each of {setup.ranks} rank(s) {passes} "
        f"pass(es) of {setup.rows} row(s), in {recipe.dtype}"
        f"{', with gradient checkpointing' if recipe.gradient_checkpointing else ''}",
        f"steps: {recipe.steps:,}, up to {recipe.steps * tokens:,} tokens",
        "",
        "memory of a rank at its highest, predicted",
        *(
            f"  {name:<12} {value / GB:>9.2f} GB"
            for name, value in dataclasses.asdict(memory).items()
            if value
        ),
        f"  {'total':<12} {memory.total / GB:>9.2f} GB",
    ]
    if limit is None:
        return "\n".join(lines)
    if memory.total <= limit:
        return "\n".join([*lines, f"fits into {limit / GB:,.4g} GB"])
    largest = max(dataclasses.asdict(memory).items(), key=lambda entry: entry[1])
    lines.append(
        f"does not fit into {limit / GB:,.4g} GB: {(memory.total - limit) / GB:.2f} GB too much, "
        f"most of it {largest[0]}"
    )
    found = switches(setup, limit)
    lines += [f"  fits with {s.what}: {s.memory.total / GB:.2f} GB" for s in found]
    if not found:
        lines.append(
            "  no single switch, nor the usual ones together, make it fit: use a smaller model"
        )
    return "\n".join(lines)


def _on_meta(setup: Setup) -> NanoMolmo2:
    """The model, its trained parts chosen, without memory."""
    with torch.device("meta"):
        model = NanoMolmo2(setup.model)
        if setup.recipe.lora is not None:
            add_lora(model.llm, setup.recipe.lora)
    set_trainable(model, setup.recipe.train)
    return model


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _temporary(setup: Setup, model: NanoMolmo2) -> tuple[float, float, float]:
    """Bytes of whole weights and gradients: always; while a block goes backward; at the end.

    The root's own weights (table, head) stay whole from forward to the end of backward. Two blocks
    are whole at a time: one computes, the next is fetched. A gradient is whole in the dtype of the
    arithmetic, then once more in float32 to be summed over the ranks. At the end there are no
    activations, but the gradient of the table and what the optimiser computes with.
    """
    size, train = setup.dtype.itemsize, setup.recipe.train
    trained = [p for p in model.parameters() if p.requires_grad]
    if setup.device == "cuda":  # AdamW updates all weights at once, else one after the other
        update = 4 * _count(trained) / setup.ranks
    else:
        update = 2 * 4 * max(p.numel() for p in trained) / setup.ranks
    table = model.llm.embed_tokens.weight
    dense = size * _count([table] if table.requires_grad else [])  # an embedding's gradient is
    if not setup.is_sharded:
        # Where table and head are one, the head's gradient waits for the table's.
        weight = table if model.llm.lm_head is None else model.llm.lm_head.weight
        waiting = size * _count([weight] if weight.requires_grad else [])
        return waiting, 0.0, max(dense, update)
    vision = list(model.vision_encoder.layers) if "vision" in train else []
    blocks = [*model.llm.layers, model.connector, *vision]
    inside = {p for block in blocks for p in block.parameters()}
    if not vision:
        inside |= set(model.vision_encoder.parameters())
    root = [p for p in model.parameters() if p not in inside]
    its_gradient = _count(p for p in root if p.requires_grad)
    largest = max(_count(block.parameters()) for block in blocks)
    gradient = max(_count(p for p in b.parameters() if p.requires_grad) for b in blocks)
    return (
        size * (_count(root) + its_gradient),
        2 * size * largest + (size + 4) * gradient,
        max(dense, 4 * its_gradient, update),
    )


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that exist, of those made while it is on."""

    def __init__(self, ignored: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        # Keyed by address: kept alive, so that nothing else gets theirs.
        self._ignored = [t.untyped_storage() for t in ignored]
        self._known = {s._cdata for s in self._ignored}

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class _Shape:
    """What activations depend on: the same for many numbers of ranks."""

    model: NanoMolmo2Config
    vision_layers: int
    rows: int
    tokens: int
    crops: int
    train: tuple[str, ...]
    lora: LoraConfig | None
    dtype: torch.dtype
    gradient_checkpointing: bool
    z_loss: float
    device: str


def _shape(setup: Setup, model: NanoMolmo2) -> _Shape:
    recipe = setup.recipe
    return _Shape(
        model=setup.model,
        vision_layers=len(model.vision_encoder.layers),
        rows=setup.rows,
        tokens=recipe.sequence_length,
        crops=recipe.max_crops,
        train=recipe.train,
        lora=recipe.lora,
        dtype=setup.dtype,
        gradient_checkpointing=recipe.gradient_checkpointing,
        z_loss=recipe.z_loss,
        device=setup.device,
    )


@dataclass(frozen=True)
class _Passes:
    """Bytes of a forward and a backward pass. ``saved``: after forward, the result included;
    ``work``: beyond that, at the highest point."""

    saved: float
    work: float

    def deeper(self, other: _Passes, layers: int) -> _Passes:
        """Of many layers: ``self`` had one, ``other`` two."""
        return _Passes(self.saved + (layers - 1) * (other.saved - self.saved), other.work)


def _run(
    shape: _Shape,
    build: Callable[[], nn.Module],
    forward: Callable[[nn.Module], Tensor],
) -> _Passes:
    """Build a module of fake tensors and run it forward and, where something learns, backward."""
    before = torch.get_default_dtype()
    with FakeTensorMode():
        try:
            torch.set_default_dtype(shape.dtype)
            module = build()
        finally:
            torch.set_default_dtype(before)
        for parameter in module.parameters():
            if parameter.requires_grad:  # gradients are counted elsewhere
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with _Live(module.parameters()) as live:
            result = forward(module)
            saved = live.now
            if not result.requires_grad:
                return _Passes(saved, 0.0)
            result.backward(torch.empty_like(result))
            return _Passes(saved, live.peak - saved)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@functools.lru_cache(maxsize=64)
def _activations(shape: _Shape) -> tuple[float, float, float]:
    """Bytes that forward keeps; the most work beside them, of a block and of the head."""
    config, size = shape.model, shape.dtype.itemsize
    m, T, D = shape.rows, shape.tokens, config.llm_config.hidden_size
    images = m * shape.crops
    vision = _vision(shape, images)
    connector = _connector(shape, images)
    one, two = (_decoder(shape, layers) for layers in (1, 2))
    decoder = one.deeper(two, config.llm_config.num_hidden_layers)
    side, channels = config.vision_config.image_size, config.vision_config.num_channels
    pixels = 4 * images * channels * side**2
    if "vision" in shape.train and shape.dtype == torch.float32:
        pixels = 0  # the first layer keeps them: they are among its activations
    merged = 2 * m * T * D * size  # embeddings, before and after the visual tokens came in
    saved = pixels + vision.saved + connector.saved + merged + decoder.saved
    # The vision encoder works when the decoder's activations are not there yet, or gone.
    work = max(decoder.work, vision.work - merged - decoder.saved)
    return saved, work, _head(shape).work


def _vision(shape: _Shape, images: int) -> _Passes:
    config, size = shape.model.vision_config, shape.dtype.itemsize
    if "vision" not in shape.train:
        features = images * config.num_patches * shape.model.connector.feature_dim * size
        group = GROUP_BYTES.get(shape.device, GROUP_BYTES_ELSEWHERE)
        widths = 2 * config.intermediate_size + 4 * config.hidden_size
        return _Passes(features, min(group, images * config.num_patches * widths * size))

    def run(layers: int) -> _Passes:
        def build() -> nn.Module:
            encoder = VisionEncoder(config, num_layers=layers, post_layernorm=False)
            return checkpoint_activations(
                encoder, "full" if shape.gradient_checkpointing else "none"
            )

        side = config.image_size
        return _run(
            shape,
            build,
            lambda m: m(torch.empty(images, config.num_channels, side, side, dtype=shape.dtype)),
        )

    return run(1).deeper(run(2), shape.vision_layers)


def _connector(shape: _Shape, images: int) -> _Passes:
    config, train = shape.model.connector, shape.train

    def forward(module: nn.Module) -> Tensor:
        patches = shape.model.vision_config.num_patches
        features = torch.empty(images, patches, config.feature_dim, dtype=shape.dtype)
        result: Tensor = module(features.requires_grad_("vision" in train))
        return result

    return _run(
        shape, lambda: MultimodalConnector(config).requires_grad_("connector" in train), forward
    )


def _decoder(shape: _Shape, layers: int) -> _Passes:
    config = shape.model.llm_config

    def build() -> nn.Module:
        # The table and the head are counted on their own.
        llm = LanguageModel(
            dataclasses.replace(
                config,
                num_hidden_layers=layers,
                vocab_size=8,
                additional_vocab_size=0,
                tie_word_embeddings=True,
            )
        )
        checkpoint_activations(
            lean_norms(llm), "full" if shape.gradient_checkpointing else "selective"
        )
        llm.requires_grad_("llm" in shape.train)
        return llm if shape.lora is None else add_lora(llm, shape.lora)

    def forward(llm: nn.Module) -> Tensor:
        assert isinstance(llm, LanguageModel)
        m, T, D = shape.rows, shape.tokens, config.hidden_size
        x = torch.empty(m, T, D, dtype=shape.dtype)
        return llm.hidden_states(
            x.requires_grad_(bool(set(shape.train) - {"llm", "lora"})),
            torch.empty(m, T, dtype=torch.long),
            torch.empty(m, 1, T, T, dtype=torch.bool),
        )

    return _run(shape, build, forward)


def _head(shape: _Shape) -> _Passes:
    """The loss where every position carries one; the gradient of the weight is not counted."""
    config = shape.model.llm_config
    N = shape.rows * shape.tokens
    # The loss takes so many columns of the logits at a time; the next ones need no more memory.
    vocabulary = min(config.vocab_size, _HEAD_CHUNKS * max(1, CHUNK_SIZE // N))

    def forward(module: nn.Module) -> Tensor:
        assert isinstance(module, nn.Embedding)
        hidden = torch.empty(N, config.hidden_size, dtype=shape.dtype).requires_grad_()
        tokens = torch.empty(N, dtype=torch.long)
        return linear_cross_entropy(
            hidden, module.weight, tokens, torch.empty(N), z_loss=shape.z_loss
        )

    passes = _run(
        shape,
        lambda: nn.Embedding(vocabulary, config.hidden_size).requires_grad_(False),
        forward,
    )
    return _Passes(0.0, passes.saved + passes.work)
