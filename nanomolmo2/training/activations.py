"""Activations of a step, counted by running the model's own blocks, forward and backward, on fake
tensors: they have shapes and lifetimes, but no contents. Two depths are run; every further block
adds the same.

m rows at once, T tokens a row, D width, N positions of a head.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanomolmo2.accelerate import checkpoint_activations, lean_norms
from nanomolmo2.accelerate.cross_entropy import CHUNK_SIZE, linear_cross_entropy
from nanomolmo2.accelerate.frozen_linear import quantize_frozen
from nanomolmo2.accelerate.memory import GROUP_BYTES, GROUP_BYTES_ELSEWHERE
from nanomolmo2.models import LanguageModel, NanoMolmo2, VisionEncoder
from nanomolmo2.models.connector import MultimodalConnector
from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config
from nanomolmo2.training.lora import LoraConfig, add_lora, lora_parameters
from nanomolmo2.training.recipe import FrozenWeights
from nanomolmo2.training.setup import Setup

HEAD_CHUNKS = 32  # of the vocabulary: more than the loss cuts a small one into


class Live(TorchDispatchMode):
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
class Shape:
    """What activations depend on: the same for many numbers of ranks."""

    model: NanoMolmo2Config
    vision_layers: int
    rows: int
    tokens: int
    crops: int
    train: tuple[str, ...]
    lora: LoraConfig | None
    frozen_weights: FrozenWeights
    dtype: torch.dtype
    gradient_checkpointing: bool
    z_loss: float
    device: str


def shape_of(setup: Setup, model: NanoMolmo2) -> Shape:
    recipe = setup.recipe
    return Shape(
        model=setup.model,
        vision_layers=len(model.vision_encoder.layers),
        rows=setup.rows,
        tokens=recipe.sequence_length,
        crops=recipe.max_crops,
        train=recipe.train,
        lora=recipe.lora,
        frozen_weights=recipe.frozen_weights,
        dtype=setup.dtype,
        gradient_checkpointing=recipe.gradient_checkpointing,
        z_loss=recipe.z_loss,
        device=setup.device,
    )


@dataclass(frozen=True)
class Passes:
    """Bytes of a forward and a backward pass. ``saved``: after forward, the result included;
    ``work``: beyond that, at the highest point."""

    saved: float
    work: float

    def deeper(self, other: Passes, layers: int) -> Passes:
        """Of many layers: ``self`` had one, ``other`` two."""
        return Passes(self.saved + (layers - 1) * (other.saved - self.saved), other.work)


def _run(
    shape: Shape,
    build: Callable[[], nn.Module],
    forward: Callable[[nn.Module], Tensor],
) -> Passes:
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
        with Live([*module.parameters(), *module.buffers()]) as live:
            result = forward(module)
            saved = live.now
            if not result.requires_grad:
                return Passes(saved, live.peak - saved)
            result.backward(torch.empty_like(result))
            return Passes(saved, live.peak - saved)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@functools.lru_cache(maxsize=64)
def count_activations(shape: Shape) -> tuple[float, float, float]:
    """Bytes that forward keeps; the most work beside them, of a block and of the head."""
    config, size = shape.model, shape.dtype.itemsize
    m, T, D = shape.rows, shape.tokens, config.llm_config.hidden_size
    images = m * shape.crops
    vision = vision_passes(shape, images)
    connector = connector_passes(shape, images)
    one, two = (decoder_passes(shape, layers) for layers in (1, 2))
    decoder = one.deeper(two, config.llm_config.num_hidden_layers)
    side, channels = config.vision_config.image_size, config.vision_config.num_channels
    pixels = 4 * images * channels * side**2
    if "vision" in shape.train and shape.dtype == torch.float32:
        pixels = 0  # the first layer keeps them: they are among its activations
    merged = 2 * m * T * D * size  # embeddings, before and after the visual tokens came in
    saved = pixels + vision.saved + connector.saved + merged + decoder.saved
    # The vision encoder works when the decoder's activations are not there yet, or gone.
    work = max(decoder.work, vision.work - merged - decoder.saved)
    return saved, work, head_passes(shape).work


def vision_passes(shape: Shape, images: int) -> Passes:
    config, size = shape.model.vision_config, shape.dtype.itemsize
    side = config.image_size
    if "vision" not in shape.train:
        features = images * config.num_patches * shape.model.connector.feature_dim * size
        limit = GROUP_BYTES.get(shape.device, GROUP_BYTES_ELSEWHERE)
        widths = 2 * config.intermediate_size + 4 * config.hidden_size
        group = min(images, max(1, limit // (config.num_patches * widths * size)))

        def encode(module: nn.Module) -> Tensor:
            with torch.no_grad():
                pixels = torch.empty(group, config.num_channels, side, side, dtype=shape.dtype)
                result: Tensor = module(pixels)
                return result

        passes = _run(
            shape, lambda: VisionEncoder(config, num_layers=1, post_layernorm=False), encode
        )
        return Passes(features, passes.saved + passes.work)

    def run(layers: int) -> Passes:
        def build() -> nn.Module:
            encoder = VisionEncoder(config, num_layers=layers, post_layernorm=False)
            return checkpoint_activations(
                encoder, "full" if shape.gradient_checkpointing else "none"
            )

        return _run(
            shape,
            build,
            lambda m: m(torch.empty(images, config.num_channels, side, side, dtype=shape.dtype)),
        )

    return run(1).deeper(run(2), shape.vision_layers)


def connector_passes(shape: Shape, images: int) -> Passes:
    config, train = shape.model.connector, shape.train

    def forward(module: nn.Module) -> Tensor:
        patches = shape.model.vision_config.num_patches
        features = torch.empty(images, patches, config.feature_dim, dtype=shape.dtype)
        result: Tensor = module(features.requires_grad_("vision" in train))
        return result

    return _run(
        shape, lambda: MultimodalConnector(config).requires_grad_("connector" in train), forward
    )


def decoder_passes(shape: Shape, layers: int) -> Passes:
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
        if shape.lora is None:
            return llm
        if shape.frozen_weights:
            quantize_frozen(llm.layers, shape.frozen_weights)
        add_lora(llm, shape.lora)
        for matrix in lora_parameters(llm):
            matrix.data = matrix.data.to(shape.dtype)  # as shards are, when they compute
        return llm

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


def head_passes(shape: Shape) -> Passes:
    """The loss where every position carries one; the gradient of the weight is not counted."""
    config = shape.model.llm_config
    N = shape.rows * shape.tokens
    # The loss takes so many columns of the logits at a time; the next ones need no more memory.
    vocabulary = min(config.vocab_size, HEAD_CHUNKS * max(1, CHUNK_SIZE // N))

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
    return Passes(0.0, passes.saved + passes.work)
