"""What a run needs of every rank, before anything is started.

Weights, gradients and moments are counted on a model without memory (PyTorch's meta device).
Activations are counted by running the model's own blocks, forward and backward, on fake tensors:
they have shapes and lifetimes, but no contents. Two depths are run; every further block adds the
same. docs/scaling.md compares the result with measured peaks.

m rows at once, T tokens a row, D width, V vocabulary, M crops a row, N patches, R ranks.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanomolmo2.convert.pretrained import load_config
from nanomolmo2.models.connector import MultimodalConnector
from nanomolmo2.models.language_model import LanguageModel
from nanomolmo2.models.loss import head_loss
from nanomolmo2.models.nanomolmo2 import NanoMolmo2, NanoMolmo2Config
from nanomolmo2.models.presets import preset
from nanomolmo2.models.vision_encoder import GROUP_BYTES, GROUP_BYTES_ELSEWHERE, VisionEncoder
from nanomolmo2.training.lora import LoraConfig, add_lora
from nanomolmo2.training.optim import Optimizers, components, set_trainable
from nanomolmo2.training.recipe import Recipe

GB = 1e9
# Of a GPU, for what is no tensor of ours: CUDA's context, NCCL's buffers, gaps between blocks of
# memory. An assumption: it was not measured.
RESERVED = {"cpu": 0.0, "cuda": 2 * GB}
MOST_RANKS = 1024
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

    gathered: weights of the blocks that compute, the table and the head whole, their gradients on
        the way to the ranks they belong to.
    activations: what forward keeps for backward, and the work of one block.
    logits: those of a chunk of positions, with their gradients.
    """

    weights: float
    gradients: float
    moments: float
    gathered: float
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

    def fits(self, limit: float) -> bool:
        return self.memory.total <= limit


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
    if architecture is not None:
        model = preset(architecture)
    elif recipe.architecture is not None:
        model = recipe.architecture
    elif recipe.model in KNOWN:
        model = preset(KNOWN[recipe.model])
    elif Path(recipe.model).is_dir():
        model = load_config(recipe.model)
    else:
        raise ValueError(
            f"the sizes of {recipe.model!r} are not known here: give a preset of the same sizes "
            f"(--architecture)"
        )
    return Setup(recipe, model, ranks, device)


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
    saved, work, head = _activations(setup)
    whole, with_block, at_end = _gathered(setup, model)
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
        gathered=whole + with_block,
        activations=activations,
        logits=logits,
        reserved=RESERVED[setup.device],
    )


def switches(setup: Setup, limit: float) -> list[Switch]:
    """Changes that bring a run below ``limit`` bytes a rank, the least costly first; one alone
    where that is enough, else several together, else none."""
    single = _changes(setup)
    found = [s for s in (_switch(what, changed) for what, changed in single) if s.fits(limit)]
    if found:
        return found
    together: Setup = setup
    names: list[str] = []
    for name, fields in _FREE:
        if any(getattr(together.recipe, k) != v for k, v in fields.items()):
            together, names = together.change(**fields), [*names, name]
    for what, changed in [("", together), *_changes(together)]:
        switch = _switch(" + ".join([*names, *([what] if what else [])]), changed)
        if names and switch.fits(limit):
            found.append(switch)
    return found


# Changes that leave what is learned nearly as it is.
_FREE: list[tuple[str, dict[str, Any]]] = [
    ("gradient_checkpointing", {"gradient_checkpointing": True}),
    ("micro_batch_size 1", {"micro_batch_size": 1}),
    ("dtype bfloat16", {"dtype": "bfloat16"}),
]


def _changes(setup: Setup) -> list[tuple[str, Setup]]:
    """Single changes that could help, the least costly first."""
    recipe, changes = setup.recipe, []
    for name, fields in _FREE:
        if any(getattr(recipe, k) != v for k, v in fields.items()):
            changes.append((name, setup.change(**fields)))
    ranks = setup.ranks * 2
    while ranks <= min(recipe.batch_size, MOST_RANKS):
        if recipe.batch_size % ranks == 0:
            changes.append((f"{ranks} ranks", dataclasses.replace(setup, ranks=ranks)))
        ranks *= 2
    if "llm" in recipe.train:
        train = tuple("lora" if part == "llm" else part for part in recipe.train)
        rates = {**recipe.optimisers, "lora": recipe.optimisers["llm"]}
        lora = setup.change(train=train, optimisers=rates, lora=LoraConfig())
        changes.append(("LoRA in place of llm", lora))
    shorter = recipe
    while shorter.sequence_length >= 1024:
        shorter = dataclasses.replace(  # a row that is half as long holds half as many crops
            shorter,
            sequence_length=shorter.sequence_length // 2,
            max_crops=max(1, shorter.max_crops // 2),
        )
        name = f"sequence_length {shorter.sequence_length} and max_crops {shorter.max_crops}"
        changes.append((name, dataclasses.replace(setup, recipe=shorter)))
    return changes


def _switch(what: str, setup: Setup) -> Switch:
    return Switch(what, setup, predict(setup))


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
        f"steps: {recipe.steps:,}, up to {recipe.steps * tokens / 1e9:,.3g} billion tokens",
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


def _gathered(setup: Setup, model: NanoMolmo2) -> tuple[float, float, float]:
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
            if isinstance(tensor, Tensor):
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
class _Passes:
    """Bytes of a forward and a backward pass. ``saved``: after forward, the result included;
    ``work``: beyond that, at the highest point."""

    saved: float
    work: float

    def deeper(self, other: _Passes, layers: int) -> _Passes:
        """Of many layers: ``self`` had one, ``other`` two."""
        return _Passes(self.saved + (layers - 1) * (other.saved - self.saved), other.work)


def _run(
    setup: Setup,
    build: Callable[[], nn.Module],
    forward: Callable[[nn.Module], Tensor],
) -> _Passes:
    """Build a module of fake tensors and run it forward and, where something learns, backward."""
    before = torch.get_default_dtype()
    with FakeTensorMode(), warnings.catch_warnings():
        try:
            torch.set_default_dtype(setup.dtype)
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


def _activations(setup: Setup) -> tuple[float, float, float]:
    """Bytes that forward keeps; the most work beside them, of a block and of the head."""
    recipe, config, size = setup.recipe, setup.model, setup.dtype.itemsize
    m, T, D = setup.rows, recipe.sequence_length, config.llm_config.hidden_size
    pictures = m * recipe.max_crops
    vision = _vision(setup, pictures)
    connector = _connector(setup, pictures)
    one, two = (_decoder(setup, layers) for layers in (1, 2))
    decoder = one.deeper(two, config.llm_config.num_hidden_layers)
    side, channels = config.vision_config.image_size, config.vision_config.num_channels
    pixels = 4 * pictures * channels * side**2
    merged = 2 * m * T * D * size  # embeddings, before and after the visual tokens came in
    saved = pixels + vision.saved + connector.saved + merged + decoder.saved
    # The vision encoder works when the decoder's activations are not there yet, or gone.
    work = max(decoder.work, vision.work - merged - decoder.saved)
    return saved, work, _head(setup).work


def _vision(setup: Setup, pictures: int) -> _Passes:
    config, size = setup.model.vision_config, setup.dtype.itemsize
    if "vision" not in setup.recipe.train:
        features = pictures * config.num_patches * setup.model.connector.feature_dim * size
        group = GROUP_BYTES.get(setup.device, GROUP_BYTES_ELSEWHERE)
        widths = 2 * config.intermediate_size + 4 * config.hidden_size
        return _Passes(features, min(group, pictures * config.num_patches * widths * size))

    def run(layers: int) -> _Passes:
        def build() -> nn.Module:
            encoder = VisionEncoder(config, num_layers=layers, post_layernorm=False)
            encoder.gradient_checkpointing = setup.recipe.gradient_checkpointing
            return encoder

        side = config.image_size
        return _run(
            setup,
            build,
            lambda m: m(torch.empty(pictures, config.num_channels, side, side, dtype=setup.dtype)),
        )

    return run(1).deeper(run(2), len(_on_meta(setup).vision_encoder.layers))


def _connector(setup: Setup, pictures: int) -> _Passes:
    config, train = setup.model.connector, setup.recipe.train

    def forward(module: nn.Module) -> Tensor:
        patches = setup.model.vision_config.num_patches
        features = torch.empty(pictures, patches, config.feature_dim, dtype=setup.dtype)
        result: Tensor = module(features.requires_grad_("vision" in train))
        return result

    return _run(
        setup, lambda: MultimodalConnector(config).requires_grad_("connector" in train), forward
    )


def _decoder(setup: Setup, layers: int) -> _Passes:
    config, recipe = setup.model.llm_config, setup.recipe

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
        llm.gradient_checkpointing = recipe.gradient_checkpointing
        llm.requires_grad_("llm" in recipe.train)
        return llm if recipe.lora is None else add_lora(llm, recipe.lora)

    def forward(llm: nn.Module) -> Tensor:
        assert isinstance(llm, LanguageModel)
        m, T, D = setup.rows, recipe.sequence_length, config.hidden_size
        x = torch.empty(m, T, D, dtype=setup.dtype)
        return llm.transform(
            inputs_embeds=x.requires_grad_(bool(set(recipe.train) - {"llm", "lora"})),
            attention_mask=torch.empty(m, 1, T, T, dtype=torch.bool),
            position_ids=torch.empty(m, T, dtype=torch.long),
        )

    return _run(setup, build, forward)


def _head(setup: Setup) -> _Passes:
    """The loss where every position carries one; the gradient of the weight is not counted."""
    config = setup.model.llm_config
    N = setup.rows * setup.recipe.sequence_length

    def forward(module: nn.Module) -> Tensor:
        assert isinstance(module, nn.Embedding)
        hidden = torch.empty(N, config.hidden_size, dtype=setup.dtype).requires_grad_()
        tokens = torch.empty(N, dtype=torch.long)
        return head_loss(hidden, module.weight, tokens, torch.empty(N), z_loss=setup.recipe.z_loss)

    passes = _run(
        setup,
        lambda: nn.Embedding(config.vocab_size, config.hidden_size).requires_grad_(False),
        forward,
    )
    return _Passes(0.0, passes.saved + passes.work)
