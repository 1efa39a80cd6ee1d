"""Forward, loss, backward, a step, quantised weights: the numbers of the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanomolmo2 import accelerate
from nanomolmo2.models import NanoMolmo2
from tests.device.cases import Case, case
from tests.device.simulated import DEVICE
from tests.nets import small_model

# The CPU takes other kernels for products; everything else is the same.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(params=["base", "molmo2", "tree"])
def both(request: pytest.FixtureRequest) -> Case:
    return case(request.param)


def test_logits(both: Case) -> None:
    given = {k: v for k, v in both.inputs().items() if k not in ("labels", "loss_weights")}
    moved = {k: v.to(DEVICE) for k, v in given.items()}
    found = both.on_device(**moved)
    assert found.device == DEVICE
    torch.testing.assert_close(found.cpu(), both.on_cpu(**given), **CLOSE)


def test_logits_and_loss_together(both: Case) -> None:
    _, expected = both.on_cpu(**both.inputs())
    _, found = both.on_device(**both.inputs(DEVICE))
    torch.testing.assert_close(found.cpu(), expected, **CLOSE)


ACCELERATED: dict[str, Callable[[NanoMolmo2], NanoMolmo2]] = {
    "plain": lambda model: model,
    "defaults": accelerate.defaults,
    "full checkpointing": lambda model: accelerate.checkpoint_activations(model, "full"),
}


@pytest.mark.parametrize("accelerated", ACCELERATED)
def test_a_step_of_training(both: Case, accelerated: str) -> None:
    """Loss, every gradient, every weight behind AdamW."""
    losses = []
    for model, place in ((both.on_cpu, "cpu"), (both.on_device, DEVICE)):
        model.train()
        model = ACCELERATED[accelerated](model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)  # calm near 0
        for _ in range(2):
            optimizer.zero_grad()
            loss = model.loss(**both.inputs(place), z_loss=1e-4)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        losses.append(loss.detach().cpu())
    torch.testing.assert_close(losses[1], losses[0], **CLOSE)
    moved = dict(both.on_device.named_parameters())
    for name, weight in both.on_cpu.named_parameters():
        assert (weight.grad is None) == (moved[name].grad is None), name
        assert moved[name].device == DEVICE
        if weight.grad is not None:
            torch.testing.assert_close(moved[name].grad.cpu(), weight.grad, **CLOSE, msg=name)
        torch.testing.assert_close(moved[name].detach().cpu(), weight.detach(), **CLOSE, msg=name)


@pytest.mark.parametrize("kind", ["linear", "mlp", "resampler", "pooling"])
def test_every_connector(kind: str) -> None:
    model = small_model(kind)
    moved = copy.deepcopy(model).to(DEVICE)
    images = case("base").batch.pixel_values
    assert images is not None
    found = moved.encode_images(images.to(DEVICE))
    torch.testing.assert_close(found.cpu(), model.encode_images(images), **CLOSE)


def test_a_cache_of_past_keys() -> None:
    """The seed's calls: a prompt, then a token, by ``past_key_values``."""
    both = case("base")
    ids = torch.tensor([[5, 9, 2, 7]])
    expected = both.on_cpu.llm(ids)
    first, cache = both.on_device.llm(ids[:, :3].to(DEVICE), use_cache=True)
    second, _ = both.on_device.llm(ids[:, 3:].to(DEVICE), past_key_values=cache, use_cache=True)
    found = torch.cat([first, second], dim=1)
    torch.testing.assert_close(found.cpu(), expected, **CLOSE)


def dequantised(model: nn.Module) -> nn.Module:
    """A copy whose quantised layers are plain ones of the same rounded weights."""
    twin = copy.deepcopy(model)
    for name, layer in list(twin.named_modules()):
        if "Quantized" not in type(layer).__name__:
            continue
        state = layer.state_dict()
        weight = state["weight"].float()
        if "scale" in state:
            weight = weight * state["scale"][:, None]
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in state)
        plain.load_state_dict({"weight": weight, **{k: state[k] for k in state if k == "bias"}})
        setattr(twin.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], plain)
    return twin


@pytest.mark.parametrize("first", ["quantise", "move"])
@pytest.mark.parametrize("mode", ["int8", "int8-weight-only", "fp16-weights"])
@torch.no_grad()
def test_quantised_weights(mode: str, first: str) -> None:
    """Quantised before it is moved, and there: the rounded weights, in float32 arithmetic."""
    both = case("molmo2")
    quantised = copy.deepcopy(both.on_cpu).quantize(mode)
    twin = dequantised(quantised)
    moved = quantised.to(DEVICE) if first == "quantise" else both.on_device.quantize(mode)
    given = {k: v for k, v in both.inputs().items() if k != "labels"}
    found: Tensor = moved(**{k: v.to(DEVICE) for k, v in given.items()})
    torch.testing.assert_close(found.cpu(), twin(**given), rtol=1e-4, atol=1e-5)
    for tensor in (*moved.parameters(), *moved.buffers()):
        assert tensor.device == DEVICE
    new = moved.generate(
        given["input_ids"][:1].to(DEVICE),
        given["pixel_values"][:1].to(DEVICE),
        image_token_pooling=given["image_token_pooling"][:4].to(DEVICE),
        max_new_tokens=4,
    )
    assert new.device == DEVICE


def test_weights_come_back_bit_for_bit() -> None:
    both = case("base")
    expected = both.on_cpu.state_dict()
    for name, tensor in both.on_device.to("cpu").state_dict().items():
        assert torch.equal(tensor, expected[name]), name
