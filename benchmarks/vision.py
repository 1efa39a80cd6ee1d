"""One picture through the vision encoder, beside transformers; the memory of many crops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import (
    Row,
    Sizes,
    compare,
    forget_peak,
    in_mode,
    main,
    resident,
    take_turns,
    vision_encoder,
    vision_gflop,
)
from nanomolmo2.convert.parts import build_on_meta
from nanomolmo2.models import ConnectorConfig, MultimodalConnector
from tests.parity.references import siglip

TARGETS = {"float32": 0.97, "fp16-weights": 0.97, "int8": 0.62}
PEER = "transformers float32"
LAYERS = (-3, -9)  # what the Molmo2 design reads


def measure(sizes: Sizes) -> list[Row]:
    encoder = vision_encoder(sizes)
    side = sizes.vision.image_size
    picture = torch.randn(1, 3, side, side)
    reference = siglip(encoder, "sdpa")
    sides: dict[str, Callable[[], object]] = {PEER: lambda: reference(picture)}
    for mode in TARGETS:
        model = encoder if mode == "float32" else in_mode(encoder, mode)
        sides[mode] = lambda model=model: model(picture)  # type: ignore[misc]
    error = (encoder(picture) - reference(picture).last_hidden_state).abs().max()
    assert error < 1e-3, f"the two sides differ by {error}"
    times = take_turns(sides, sizes.rounds)
    gflop = vision_gflop(sizes.vision)
    rows = [
        compare(f"vision, one picture, {mode}", times, mode, PEER, target=target, gflop=gflop)
        for mode, target in TARGETS.items()
    ]
    crops = peak_of_crops(sizes)
    if crops is not None:
        name = f"vision and connector, {sizes.crops} crops: memory over the weights"
        rows.append(Row(name, crops, "GB", target=1.5))
    return rows


def peak_of_crops(sizes: Sizes) -> float | None:
    """GB at the peak over what is held before; None where the system does not tell."""
    if not Path("/proc/self/status").exists():
        return None
    encoder = vision_encoder(sizes)
    config = ConnectorConfig(
        vision_dim=sizes.vision.hidden_size,
        llm_dim=sizes.llm.hidden_size,
        connector_type="pooling",
        num_attention_heads=sizes.vision.num_attention_heads,
        vit_layers=LAYERS if sizes.vision.num_hidden_layers > 9 else (-1, -2),
    )
    connector = build_on_meta(MultimodalConnector, config).to_empty(device="cpu").eval()
    for parameter in (*encoder.parameters(), *connector.parameters()):
        parameter.fill_(0.01)  # pages that were never written do not count
    N, P = sizes.vision.num_patches, sizes.vision.patch_size
    pixels = torch.randn(sizes.crops, N, 3 * P * P)
    windows = torch.arange(sizes.crops * N)[: sizes.crops * N // 4 * 4].view(-1, 4)
    before = forget_peak()
    connector(encoder.features(pixels, config.vit_layers), windows)
    return (resident("VmHWM") - before) / 1e9


if __name__ == "__main__":
    main("vision", measure)
