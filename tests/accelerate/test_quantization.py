"""Whole modules with 8-bit and 16-bit weights."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nanomolmo2.accelerate.quantization as quantize_module
from nanomolmo2.accelerate.kernels import MODES, WEIGHT_DTYPE
from nanomolmo2.accelerate.quantization import (
    Choice,
    apply_quantization_config,
    auto_precision,
    cache_dtype,
    count_weights,
    cpu_features,
    dequantize,
    is_quantized,
    quantization_config,
    quantization_report,
    quantize,
)
from nanomolmo2.accelerate.quantized_linear import QuantizedLinear, project
from nanomolmo2.convert.pretrained import load
from nanomolmo2.emoji.exam import ExamPlan, evaluate
from nanomolmo2.models import (
    LanguageModel,
    LLMConfig,
    NanoMolmo2,
    VisionEncoder,
)
from tests.nets import LLM, VISION, randomize, text_ids
from tests.small_model import small_model

# Of the logits of two random blocks and the head; the errors of layers add up.
BOUND = {"int8": 0.06, "int8-weight-only": 0.03, "fp16-weights": 1e-3}


def decoder(config: LLMConfig = LLM) -> LanguageModel:
    return randomize(LanguageModel(config)).eval()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def picture_inputs(model: NanoMolmo2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = [5, *[model.config.image_token_id] * 4, 6, 7, 8]
    pixels = torch.randn(1, 16, 3 * 16 * 16, generator=generator)
    return {
        "input_ids": torch.tensor([ids]),
        "pixel_values": pixels,
        "image_token_pooling": torch.arange(16).view(4, 4),
    }


# ---- in place, on every class ----


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model(mode: str, tied: bool) -> None:
    llm = decoder(dataclasses.replace(LLM, tie_word_embeddings=tied))
    ids = text_ids(2, 9)
    with torch.no_grad():
        expected = llm(ids)
    names = [n for n, m in llm.named_modules() if isinstance(m, nn.Linear)]
    assert llm.quantize(mode) is llm
    found = llm(ids)
    assert 0 < relative(found, expected) < BOUND[mode]
    left = [m for m in llm.modules() if isinstance(m, nn.Linear)]
    assert not left
    assert isinstance(llm.embed_tokens, nn.Embedding)
    made = {n: m for n, m in llm.named_modules() if isinstance(m, QuantizedLinear)}
    assert set(made) == {*names, "lm_head"}
    assert {m.mode for m in made.values()} == {mode}
    assert llm.embed_tokens.weight.dtype == torch.float32


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_dequantized_layers_hold_the_rounded_values(mode: str, calibrated: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 6)
    scale = torch.linspace(0.5, 2.0, 8) if calibrated and mode == "int8" else None
    layer = QuantizedLinear.from_linear(linear, mode, scale)
    x = torch.randn(3, 8)
    layer(x)  # packs the weights, which must come back
    plain = layer.dequantized()
    assert plain.weight.dtype == plain.bias.dtype == torch.float32
    assert plain.weight.requires_grad
    assert torch.equal(plain.bias, linear.bias)
    error = (plain.weight - linear.weight).abs().max()
    largest = linear.weight.abs().max() * (4 if calibrated else 1)
    assert 0 < error < largest / 200
    torch.testing.assert_close(plain(x), layer(x), rtol=0.05, atol=0.05)


def test_a_dequantized_model_can_learn() -> None:
    llm = randomize(LanguageModel(LLM), 1)  # tied
    quantize(llm, "int8-weight-only")
    ids = text_ids(2, 5)
    expected = llm(ids)
    dequantize(llm)
    assert not is_quantized(llm) and llm.lm_head is None
    torch.testing.assert_close(llm(ids), expected, rtol=0.05, atol=0.05)
    llm(ids).sum().backward()
    assert llm.layers[0].mlp.up_proj.weight.grad is not None


@pytest.mark.parametrize("mode", MODES)
def test_a_vision_encoder(mode: str) -> None:
    encoder = randomize(VisionEncoder(VISION)).eval()
    pictures = torch.randn(2, 3, 22, 22, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = encoder(pictures)
    assert encoder.quantize(mode) is encoder
    assert isinstance(encoder.patch_embedding, nn.Conv2d)
    assert 0 < relative(encoder(pictures), expected) < BOUND[mode]


@pytest.mark.parametrize("mode", MODES)
def test_a_whole_model(mode: str) -> None:
    model = randomize(small_model())
    inputs = picture_inputs(model)
    with torch.no_grad():
        expected = model(**inputs)
    count = count_weights(model)
    assert model.quantize(mode) is model
    assert 0 < relative(model(**inputs), expected) < 2 * BOUND[mode]
    assert count_weights(model) == count == sum(p.numel() for p in small_model().parameters())
    assert f"| {count:>13,} |" in model.parameter_summary()
    assert model.generate(inputs["input_ids"][:, -3:], max_new_tokens=4).shape[1] > 3


def test_parts_of_a_model_by_name() -> None:
    model = randomize(small_model())
    model.quantize({"vision_encoder": "int8", "connector": None, "llm": "fp16-weights"})
    described = {name: quantization_config(part) for name, part in model.named_children()}
    assert described == {
        "vision_encoder": {"mode": "int8"},
        "connector": None,
        "llm": {"mode": "fp16-weights"},
    }
    # What is not quantised can be quantised later, and is trainable.
    assert all(p.requires_grad for p in model.connector.parameters())
    model.quantize({"connector": "int8"})
    assert quantization_config(model.connector) == {"mode": "int8"}


def test_rows_are_bit_identical_in_any_batch() -> None:
    """Through the linear layers; the rest of the network sees to itself."""
    llm = decoder().quantize("int8")
    x = torch.randn(33, LLM.hidden_size, generator=torch.Generator().manual_seed(0))
    x[4] *= 30
    head, up = llm.head(x), llm.layers[0].mlp.up_proj(x)
    for i in range(33):
        assert torch.equal(llm.head(x[i : i + 1])[0], head[i])
        assert torch.equal(llm.layers[0].mlp.up_proj(x[None, i : i + 1])[0, 0], up[i])


def test_the_table_is_rounded_to_16_bit_and_the_head_is_not() -> None:
    llm = decoder()
    table = llm.embed_tokens.weight.detach().clone()
    quantize(llm, "fp16-weights")
    assert torch.equal(llm.embed_tokens.weight, table.half().float())
    assert not torch.equal(llm.embed_tokens.weight, table)
    # bfloat16 values stay as they are
    llm = decoder().bfloat16().float()
    table = llm.embed_tokens.weight.detach().clone()
    quantize(llm, "int8")
    assert torch.equal(llm.embed_tokens.weight, table)


def test_no_remark_of_torch_reaches_the_user() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm = decoder().quantize("int8")
        llm(text_ids(1, 5))
        llm.state_dict()


def test_float_weights_are_let_go() -> None:
    """The packed form is the only one once it is there, and plain tensors are made from it."""
    llm = decoder().quantize("int8")
    plain = {name: tensor.clone() for name, tensor in llm.state_dict().items()}
    llm(text_ids(1, 4))
    assert all(m.weight is None for m in llm.modules() if isinstance(m, QuantizedLinear))
    again = llm.state_dict()
    assert set(again) == set(plain)
    for name, tensor in plain.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("mode", MODES)
def test_copies_pickles_casts_and_loads(mode: str) -> None:
    llm, ids = decoder().quantize(mode), text_ids(2, 6)
    expected = llm(ids)
    stream = io.BytesIO()
    pickle.dump(llm, stream)
    stream.seek(0)
    other = decoder(LLM).quantize(mode)
    for layer in other.modules():
        if isinstance(layer, QuantizedLinear):
            layer.weight.zero_()  # type: ignore[union-attr]
    assert not torch.equal(other(ids), expected)
    other.load_state_dict(llm.state_dict())
    for twin in (copy.deepcopy(llm), pickle.load(stream), llm.to("cpu"), llm.float(), other):
        assert torch.equal(twin(ids), expected)
    half = llm.bfloat16()
    assert half(ids).dtype == torch.bfloat16
    assert half.layers[0].mlp.up_proj.weight is None
    state = half.state_dict()
    assert state["layers.0.mlp.up_proj.weight"].dtype == WEIGHT_DTYPE[mode]
    assert state["norm.weight"].dtype == torch.bfloat16
    assert state.get("lm_head.scale", torch.ones(1)).dtype == torch.float32


def test_state_of_another_kind_is_refused() -> None:
    llm = decoder().quantize("int8")
    state = decoder().state_dict()
    state["lm_head.weight"] = state["embed_tokens.weight"]
    with pytest.raises(
        RuntimeError, match=r"up_proj\.weight is torch\.float32, expected torch\.in"
    ):
        llm.load_state_dict(state, strict=False)


def test_no_rows() -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(6, 4), "int8")
    assert layer(torch.zeros(2, 0, 6)).shape == (2, 0, 4)


# ---- what is refused ----


def test_quantising_twice_unknown_modes_and_parts() -> None:
    llm = decoder().quantize("int8")
    with pytest.raises(ValueError, match="quantised already"):
        llm.quantize("int8")
    with pytest.raises(ValueError, match="quantised already"):
        quantization_report(llm, text_ids(1, 3))
    fresh = decoder()
    for mode in ("int4", "fp8", 8):
        with pytest.raises(ValueError, match=f"no quantisation mode {mode!r}: choose one of int8"):
            fresh.quantize(mode)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no part 'text' to quantise: the module has vision_enc"):
        small_model().quantize({"text": "int8"})
    with pytest.raises(ValueError, match="no linear layers inside"):
        quantize(nn.LayerNorm(4), "int8")
    assert not is_quantized(fresh)
    assert fresh.lm_head is None


def test_options_that_do_not_go_together() -> None:
    llm, ids = decoder(), text_ids(1, 5)
    with pytest.raises(ValueError, match="max_error and samples go together"):
        llm.quantize("int8", max_error=0.1)
    with pytest.raises(ValueError, match="max_error and samples go together"):
        llm.quantize("int8", samples=ids)
    with pytest.raises(ValueError, match="are for the mode 'int8'"):
        llm.quantize("fp16-weights", calibration=ids)
    with pytest.raises(ValueError, match=r"'layers\.9\.x', which is no linear layer"):
        llm.quantize("int8", keep=["layers.9.x"])
    assert not is_quantized(llm)
    assert llm.quantize(None) is llm
    assert llm.lm_head is None


def test_weights_that_are_not_finite() -> None:
    llm = decoder()
    with torch.no_grad():
        llm.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        llm.quantize("int8")


def test_training_is_refused_with_one_clear_error() -> None:
    llm, ids = decoder().quantize("int8"), text_ids(1, 5)
    llm(ids)  # nothing needs a gradient: no no_grad() is asked for
    llm.requires_grad_(True)
    with pytest.raises(ValueError, match="train the model before it is quantised"):
        llm(ids)
    with torch.no_grad():
        llm(ids)
    model = small_model().quantize({"llm": "int8"})
    with pytest.raises(ValueError, match="train the model before it is quantised"):
        model(**picture_inputs(model))


# ---- errors by layer, calibration, mixed precision ----


def outliers(channels: tuple[int, ...] = (3, 70), times: float = 50.0) -> tuple[nn.Linear, Tensor]:
    """A layer and inputs some of whose channels are far larger, as trained decoders have them."""
    torch.manual_seed(0)
    layer = nn.Linear(1024, 256, bias=False)
    x = torch.randn(64, 1024)
    x[:, list(channels)] *= times
    return layer, x


def test_channels_with_outliers() -> None:
    """Two channels 50 times larger cost 12 % with plain int8, 2 % where they are calibrated."""
    layer, x = outliers()
    stack = nn.Sequential(layer)
    (plain,) = quantization_report(stack, x)
    (calibrated,) = quantization_report(stack, x, calibration=x)
    (half,) = quantization_report(stack, x, "fp16-weights")
    assert 0.04 < plain.error < 0.20
    assert calibrated.error < 0.025
    assert half.error < 5e-4
    assert (calibrated.name, calibrated.shape) == ("0", (256, 1024))


def test_weights_with_outliers() -> None:
    """A few outputs 50 times larger have scales of their own; a few inputs share theirs."""
    torch.manual_seed(0)
    x = torch.randn(32, 512)
    weight = torch.randn(256, 512) * 0.02
    rows, columns = weight.clone(), weight.clone()
    rows[:4] *= 50
    columns[:, :4] *= 50
    # Norm over all outputs, and over the ordinary ones of each matrix.
    bounds = {"int8": (0.02, 0.12), "int8-weight-only": (0.01, 0.12), "fp16-weights": (5e-4, 5e-4)}
    for mode, (bound_rows, bound_columns) in bounds.items():
        for matrix, bound in ((rows, bound_rows), (columns, bound_columns)):
            layer = nn.Linear(512, 256, bias=False)
            layer.weight.data = matrix
            found = QuantizedLinear.from_linear(layer, mode)(x)
            assert relative(found[:, 4:], (x @ matrix.T)[:, 4:]) < bound, mode


def test_a_calibrated_model() -> None:
    torch.manual_seed(0)
    llm, ids = decoder(), text_ids(4, 16)
    with torch.no_grad():
        for layer in llm.layers:  # outliers of the norms reach q, k, v, gate and up
            layer.input_layernorm.weight[5] *= 50
            layer.post_attention_layernorm.weight[7] *= 50
        expected = llm(ids)
    plain = copy.deepcopy(llm).quantize("int8")
    calibrated = copy.deepcopy(llm).quantize("int8", calibration=ids)
    assert quantization_config(calibrated) == {"mode": "int8", "calibrated": True}
    assert relative(calibrated(ids), expected) < 0.7 * relative(plain(ids), expected)
    assert torch.equal(calibrated(ids)[2:3], calibrated(ids[2:3]))


def test_calibration_does_not_change_the_rows_promise() -> None:
    layer, x = outliers()
    stack = quantize(nn.Sequential(layer), "int8", calibration=x)
    together = stack(x)
    assert all(torch.equal(stack(x[i : i + 1])[0], together[i]) for i in range(len(x)))


def test_report_of_a_model() -> None:
    model = randomize(small_model())
    inputs = picture_inputs(model)
    with torch.no_grad():
        expected = model(**inputs)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = quantization_report(model, [inputs, inputs], "int8")
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert {row.name for row in report} == {*names, "llm.lm_head"}
    assert all(0 < row.error < 0.05 and row.mode == "int8" for row in report)
    # ... and the model is as it was
    assert model.llm.lm_head is None
    assert list(before) == list(model.state_dict())
    assert torch.equal(model(**inputs).detach(), expected)
    # Layers that the samples do not reach are not in it.
    text = quantization_report(model, {"input_ids": text_ids(1, 5)}, "int8")
    assert {row.name.split(".")[0] for row in text} == {"llm"}


def test_mixed_precision_by_a_bound() -> None:
    """The layer whose input has outliers gets float16 weights, the others stay int8."""
    llm, ids = decoder(), text_ids(4, 16)
    with torch.no_grad():
        llm.layers[1].post_attention_layernorm.weight[7] *= 80
        expected = llm(ids)
    report = sorted(quantization_report(llm, ids), key=lambda row: -row.error)
    bad = {"layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"}
    assert {row.name for row in report[:2]} == bad
    bound = (report[1].error + report[2].error) / 2
    plain = copy.deepcopy(llm).quantize("int8")
    assert llm.quantize("int8", max_error=bound, samples=ids) is llm
    assert quantization_config(llm) == {
        "mode": "int8",
        "exceptions": dict.fromkeys(sorted(bad), "fp16-weights"),
    }
    assert relative(llm(ids), expected) < relative(plain(ids), expected)


def test_prepare_makes_what_describe_says() -> None:
    llm, ids = decoder(), text_ids(1, 6)
    llm.quantize("int8", keep=["layers.0.mlp.up_proj"], calibration=ids)
    description = quantization_config(llm)
    assert description is not None
    with torch.device("meta"):
        empty = LanguageModel(LLM).eval()
        apply_quantization_config(empty, description)
    empty.load_state_dict(llm.state_dict(), assign=True)
    assert torch.equal(empty(ids), llm(ids))
    assert quantization_config(empty) == description
    for wrong, message in (
        ({"mode": "int3"}, "no quantisation mode 'int3'"),
        ({"mode": "int8", "exceptions": {"layers.7": "int8"}}, "which the model does not have"),
        ({"mode": "int8", "group": 32}, "found .*group"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_quantization_config(decoder(), wrong)


# ---- auto ----


@pytest.mark.parametrize(
    ("features", "choice"),
    [
        ({"avx2"}, Choice("fp16-weights", None)),
        ({"avx2", "amx"}, Choice(None, torch.bfloat16)),
        ({"avx2", "avx512_bf16"}, Choice(None, torch.bfloat16)),
        (set(), Choice(None, None)),
    ],
)
def test_auto_on_cpus(features: set[str], choice: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_module, "cpu_features", lambda: frozenset(features))
    assert auto_precision("cpu") == auto_precision(torch.device("cpu")) == choice
    llm = decoder()
    assert llm.quantize("auto") is llm
    assert (quantization_config(llm) or {}).get("mode") == choice.mode
    assert llm.norm.weight.dtype == (choice.dtype or torch.float32)
    assert llm(text_ids(1, 4)).isfinite().all()
    assert llm.lm_head is None or choice.mode is not None


def test_auto_on_other_devices() -> None:
    assert auto_precision("cuda:1") == Choice(None, torch.bfloat16)
    assert auto_precision("mps") == Choice(None, torch.float16)
    assert auto_precision("xpu") == Choice(None, None)


def test_auto_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_module, "cpu_features", lambda: frozenset({"avx2"}))
    model = small_model().quantize({"vision_encoder": "auto", "llm": "int8"})
    assert quantization_config(model.vision_encoder) == {"mode": "fp16-weights"}
    assert quantization_config(model.llm) == {"mode": "int8"}


def test_cpu_features_are_asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.delattr(torch.cpu, "_is_avx2_supported")
    assert cpu_features() == {"amx"}


# ---- tasks, and full size ----


@pytest.fixture(scope="module")
def emoji_scores() -> Any:
    """``scores(mode)`` of `tiny` on 25 scenes."""

    def scores(mode: str | None) -> dict[str, float]:
        model, processor = load("tiny", dtype=torch.float32, quantize=mode)
        return dict(evaluate(model, processor, ExamPlan(scenes=25)).means)

    return scores


@pytest.mark.slow
def test_tiny_answers_as_well(emoji_scores: Any) -> None:
    """About 250 answers: one answer is .004 of the rows with all questions, .02 of the rarest."""
    expected = emoji_scores(None)
    for mode, bound in (("int8", 0.08), ("fp16-weights", 0.03)):
        found = emoji_scores(mode)
        for name in ("presence", "count", "point_f1", "caption_f1", "number"):
            assert abs(found[name] - expected[name]) <= bound, (mode, name)


@pytest.fixture(scope="module")
def full_size() -> tuple[LanguageModel, Tensor, list[Tensor]]:
    """Qwen3-0.6B with random weights, 32 tokens and 4 more, and the float32 logits of those."""
    llm = randomize(LanguageModel()).eval().requires_grad_(False)
    ids = text_ids(1, 36)
    return llm, ids, prefill_and_steps(llm, ids)


@torch.no_grad()
def prefill_and_steps(llm: LanguageModel, ids: Tensor) -> list[Tensor]:
    logits, cache = llm(ids[:, :32], use_cache=True)
    rows = [logits[:, -1]]
    for i in range(32, 36):
        logits, cache = llm(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        rows.append(logits[:, -1])
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "bound"), [("int8", 0.15), ("int8-weight-only", 0.1), ("fp16-weights", 0.003)]
)
def test_full_size(
    mode: str, bound: float, full_size: tuple[LanguageModel, Tensor, list[Tensor]]
) -> None:
    llm, ids, expected = full_size
    found = prefill_and_steps(copy.deepcopy(llm).quantize(mode), ids)
    for one, other in zip(found, expected, strict=True):
        assert 0 < relative(one, other) < bound


# ---- layers of one input, packed as one ----


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [True, False])
def test_layers_together_give_what_each_gives_alone(mode: str, bias: bool) -> None:
    torch.manual_seed(0)
    layers = [
        QuantizedLinear.from_linear(nn.Linear(40, n, bias=bias), mode).requires_grad_(False)
        for n in (24, 8, 16)
    ]
    x = torch.randn(2, 5, 40)
    alone = [copy.deepcopy(layer)(x) for layer in layers]
    states = [layer.state_dict() for layer in copy.deepcopy(layers)]
    together = project(x, layers)
    for found, expected in zip(together, alone, strict=True):
        assert torch.allclose(found, expected, atol=1e-6)
    for layer, state, expected in zip(layers, states, alone, strict=True):
        assert torch.allclose(layer(x), expected, atol=1e-6)  # still a layer by itself
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, state[name]), name
    layers[1].to(torch.float64)  # unpacks one of them
    for found, expected in zip(project(x, layers), alone, strict=True):
        assert torch.allclose(found, expected, atol=1e-6)


def test_layers_that_cannot_share_a_kernel_run_one_by_one() -> None:
    linear = nn.Linear(40, 8)
    layers = [QuantizedLinear.from_linear(linear, "int8"), linear]
    x = torch.randn(3, 40)
    with torch.no_grad():
        found = project(x, layers)
    assert torch.equal(found[1], linear(x))
    assert relative(found[0], found[1]) < 0.02


# ---- the cache beside int8 weights ----


def test_int8_keeps_keys_and_values_in_16_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_dtype(decoder().quantize("int8")) is None  # too small to gain by it
    monkeypatch.setattr(quantize_module, "_WORTH_ROUNDING", 0)
    llm = decoder()
    assert cache_dtype(llm) is None
    ids = text_ids(1, 12)
    with torch.no_grad():
        whole = llm(ids)
    llm.quantize("int8")
    assert cache_dtype(llm) == torch.bfloat16
    logits, cache = llm(ids[:, :9], use_cache=True)
    rest, _ = llm(ids[:, 9:], past_key_values=cache, use_cache=True)
    assert cache.keys[0].dtype == cache.values[0].dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    assert relative(torch.cat([logits, rest], dim=1), whole) < BOUND["int8"]
    assert cache_dtype(decoder().quantize("fp16-weights")) is None
