"""What `scripts/gpu_check.py` measures: every section is a function that gives rows.

Transformers is imported in the sections that compare with it, and nowhere else.
"""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanomolmo2.batch import PACK_SUBSEGMENT, PREFIX_SUBSEGMENT
from nanomolmo2.models import LanguageModel, LLMConfig, VisionConfig, VisionEncoder

if TYPE_CHECKING:
    from nanomolmo2.training.recipe import Recipe


@dataclass(frozen=True)
class Row:
    """A number that was found, and the most that it may be; None = it is only reported."""

    what: str
    found: float
    limit: float | None = None
    unit: str = ""


@dataclass(frozen=True)
class Setting:
    """Where a section runs, and whether at toy sizes."""

    device: str
    quick: bool

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def wait(self) -> None:
        """Until the device has done all its work."""
        if self.on_gpu:
            torch.cuda.synchronize()


# ---- models and times ----


def random_llm(setting: Setting) -> LanguageModel:
    """Qwen3-0.6B with random weights near unit scale, float32; in toy size a net of two layers."""
    from tests import nets

    config = nets.LLM if setting.quick else LLMConfig()
    return nets.randomize(nets.allocate(LanguageModel, config)).to(setting.device)


def ids_for(llm: LanguageModel, rows: int, length: int) -> Tensor:
    from tests.nets import text_ids

    ids = text_ids(rows, length, vocab_size=llm.config.vocab_size)
    return ids.to(llm.embed_tokens.weight.device)


def milliseconds(setting: Setting, work: Callable[[], object]) -> float:
    """Of the fastest of some rounds, behind one that warms up."""
    times = []
    for _ in range(2 if setting.quick else 4):
        setting.wait()
        start = time.perf_counter()
        work()
        setting.wait()
        times.append(time.perf_counter() - start)
    return 1000 * min(times[1:])


def peak_bytes(setting: Setting, work: Callable[[], object]) -> float:
    """Most memory of the GPU that tensors took beyond what they had before."""
    if not setting.on_gpu:
        work()
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return float(torch.cuda.max_memory_allocated() - before)


# ---- the sections ----


def parity(setting: Setting) -> list[Row]:
    """Logits and features beside transformers, on the same weights; the whole beside the CPU."""
    from tests import nets
    from tests.parity.references import qwen3, siglip

    rows = []
    with torch.no_grad():
        llm = random_llm(setting)
        ids = ids_for(llm, 2, 33)
        theirs = qwen3(llm).to(setting.device)
        difference = nets.greatest_difference(llm(ids), theirs(ids).logits)
        rows.append(Row("decoder, float32: largest difference of a logit", difference, 1e-4))
        rows.append(_bfloat16_row("decoder", _decoder_states(setting, llm, ids_for(llm, 24, 33))))
        del llm, theirs

        config = nets.VISION if setting.quick else VisionConfig()
        encoder = nets.randomize(nets.allocate(VisionEncoder, config)).to(setting.device)
        images = nets.pictures(2, config=config).to(setting.device)
        tower = siglip(encoder).to(setting.device)
        difference = nets.greatest_difference(encoder(images), tower(images).last_hidden_state)
        rows.append(Row("vision encoder, float32: largest difference", difference, 1e-4))
        rows.append(_bfloat16_row("vision encoder", _vision_states(setting, encoder, images)))
        del encoder, tower
        rows += _whole_rows(setting)
    return rows


def _decoder_states(setting: Setting, llm: Any, ids: Tensor) -> tuple[Any, Any, Any]:
    """Every block's output and the logits: ours and theirs in bfloat16, theirs in float32."""
    from tests.nets import in_bfloat16
    from tests.parity.references import qwen3, recorded

    half = in_bfloat16(llm)
    logits, states = half(ids, output_hidden_states=True)
    outputs = []
    for net, attention in ((half, "sdpa"), (llm, "eager")):
        reference = qwen3(net, attention).to(setting.device)
        with recorded(reference.model.layers) as found:
            found.append(reference(ids).logits)
        outputs.append(found)
    return [*states[1:-1], logits], outputs[0], outputs[1]


def _vision_states(setting: Setting, encoder: Any, images: Tensor) -> tuple[Any, Any, Any]:
    from tests.nets import in_bfloat16
    from tests.parity.references import siglip

    half = in_bfloat16(encoder)
    found = [half(images.bfloat16())]
    theirs = siglip(half, "sdpa").to(setting.device)(images.bfloat16()).last_hidden_state
    exact = siglip(encoder).to(setting.device)(images).last_hidden_state
    return found, [theirs], [exact]


def _bfloat16_row(name: str, states: tuple[Any, Any, Any]) -> Row:
    from tests.parity.references import bf16_errors

    worst = max(ours / theirs for ours, theirs in bf16_errors(*states))
    return Row(f"{name}, bfloat16: our rounding error over transformers'", worst, 1.1)


def _whole_rows(setting: Setting) -> list[Row]:
    """Both designs, small, beside themselves on the CPU."""
    import copy

    from tests import nets

    rows = []
    for name, kind in (("base design", "linear"), ("Molmo2 design", "pooling")):
        model = nets.small_model(kind, bidirectional_image_attention=kind == "pooling")
        moved = copy.deepcopy(model).to(setting.device)
        ids = nets.text_ids(2, 9)
        ids[:, 2] = nets.IMAGE
        images = nets.pictures(2)
        found = moved(ids.to(setting.device), images.to(setting.device)).cpu()
        difference = nets.greatest_difference(found, model(ids, images))
        rows.append(
            Row(f"{name}, float32: largest difference of a logit to the CPU's", difference, 1e-4)
        )
    return rows


def _recipe(setting: Setting, steps: int, **changes: Any) -> Recipe:
    from nanomolmo2.recipes import smoke

    if setting.quick:
        rows = {"batch_size": 2, "micro_batch_size": 1, "sequence_length": 256, "max_crops": 4}
        changes = {**rows, "packing_buffer": 2, **changes}
    return replace(smoke(), steps=steps, save_every=1000, **changes)


def _losses(recipe: Recipe, device: Any, folder: str | Path, **options: Any) -> list[float]:
    """Of every step of a run by the trainer; a run that goes on gives all of its steps."""
    from nanomolmo2.training.distributed import World
    from nanomolmo2.training.trainer import train_recipe

    world = World(device=torch.device(device))
    train_recipe(recipe, folder, workers=0, quiet=True, world=world, **options)
    lines = (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines if '"loss"' in line]


def _apart(found: list[float], expected: list[float]) -> float:
    """Largest relative difference of two courses of the loss."""
    return max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))


def training(setting: Setting) -> list[Row]:
    """The recipe `smoke` in float32, here and on the CPU."""
    steps = 2 if setting.quick else 8
    rows = []
    for name, changes in (("", {}), (", checkpointing", {"gradient_checkpointing": True})):
        recipe = _recipe(setting, steps, **changes)
        with tempfile.TemporaryDirectory() as folder:
            expected = _losses(recipe, "cpu", f"{folder}/cpu")
            found = _losses(recipe, setting.device, f"{folder}/device")
        rows.append(
            Row(
                f"first loss{name}: relative difference to the CPU's",
                _apart(found[:1], expected[:1]),
                1e-5,
            )
        )
        rows.append(
            Row(
                f"{steps} losses{name}: relative difference to the CPU's",
                _apart(found, expected),
                1e-3,
            )
        )
    return rows


def sharding(setting: Setting) -> list[Row]:
    """FSDP2 on one rank: bfloat16 beside float32, and a run that was stopped beside one that was
    not."""
    steps, half = (2, 1) if setting.quick else (6, 3)
    with tempfile.TemporaryDirectory() as folder:
        plain = _losses(_recipe(setting, steps), setting.device, f"{folder}/plain")
        recipe = _recipe(setting, steps, dtype="bfloat16")
        sharded = _losses(recipe, setting.device, f"{folder}/sharded")
        _losses(recipe, setting.device, f"{folder}/resumed", stop_after=half)
        resumed = _losses(recipe, setting.device, f"{folder}/resumed", resume=True)
    return [
        Row(
            "sharded bfloat16 beside float32: relative difference of a loss",
            _apart(sharded, plain),
            2e-2,
        ),
        Row(
            "resumed beside never stopped: relative difference of a loss",
            _apart(resumed, sharded),
            1e-3,
        ),
    ]


def generation(setting: Setting) -> list[Row]:
    """Greedy answers beside transformers, both from random weights of Qwen3-0.6B's size."""
    from tests.nets import in_bfloat16
    from tests.parity.references import qwen3

    prompt, new = (16, 4) if setting.quick else (512, 65)
    llm = random_llm(setting)
    rows = []
    for name, net in (("float32", llm), ("bfloat16", in_bfloat16(llm))):
        theirs: Any = qwen3(net, "sdpa").to(setting.device)
        for batch in (1, 2 if setting.quick else 8):
            ids = ids_for(llm, batch, prompt)

            def ours(count: int, ids: Tensor = ids, net: Any = net) -> Tensor:
                result: Tensor = net.generate(ids, max_new_tokens=count, lookup=False)
                return result

            def reference(count: int, ids: Tensor = ids, theirs: Any = theirs) -> Tensor:
                result: Tensor = theirs.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=count,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
                return result

            if name == "float32":
                differ = (ours(8) != reference(8)).sum().item()
                rows.append(Row(f"{name}, {batch} row(s): other ids than transformers", differ, 0))
            rows += _decode_rows(setting, f"{name}, {batch} row(s)", ours, reference, new)
    return rows


def _decode_rows(
    setting: Setting, name: str, ours: Callable[[int], Any], theirs: Callable[[int], Any], new: int
) -> list[Row]:
    """Time to the first token, and of every further one."""
    times = {}
    for side, generate in (("ours", ours), ("transformers", theirs)):
        first = milliseconds(setting, lambda generate=generate: generate(1))
        all_of_them = milliseconds(setting, lambda generate=generate: generate(new))
        times[side] = first, (all_of_them - first) / (new - 1)
    rows = []
    for i, what in enumerate(("first token", "further token")):
        mine, other = times["ours"][i], times["transformers"][i]
        rows.append(Row(f"{name}: {what}", mine, unit="ms"))
        rows.append(Row(f"{name}: {what}, over transformers' {other:.1f} ms", mine / other))
    return rows


def memory(setting: Setting) -> list[Row]:
    """Peaks of training steps beside what `nanomolmo2 plan` predicts."""
    from benchmarks.memory import CASES, case, steps
    from nanomolmo2.training.distributed import World
    from nanomolmo2.training.plan import predict

    names = ("wide", "checkpointing", "frozen vision", "bfloat16")
    cases = {"toy": case(128, 2, 512, 256)} if setting.quick else {n: CASES[n] for n in names}
    room = float("inf")
    if setting.on_gpu:
        cases["large, bfloat16"] = case(
            1024, 28, 151_936, 2048, rows=2, dtype="bfloat16", gradient_checkpointing=True
        )
        room = torch.cuda.mem_get_info()[0]
    rows = []
    for name, given in cases.items():
        setup = replace(given, device=setting.device)
        plan = predict(setup)
        expected = plan.total - plan.reserved
        if 1.2 * expected > room:
            rows.append(
                Row(f"{name}: left out, it needs more than this GPU has", expected / 1e9, unit="GB")
            )
            continue
        measured = steps(setup, World(device=torch.device(setting.device)))
        error = abs(expected / measured - 1)
        rows.append(Row(f"{name}: measured peak", measured / 1e9, unit="GB"))
        # What the kernel counts of a toy process is mostly not the model's.
        rows.append(Row(f"{name}: error of the plan", error, None if setting.quick else 0.15))
    return rows


def flex(setting: Setting) -> list[Row]:
    """The attention of long rows, by compiled FlexAttention on a GPU, beside a dense mask."""
    from nanomolmo2.accelerate.flex import whole_sequence
    from nanomolmo2.models.attention import attend, sequence_mask

    length, H, K, Dh = (256, 4, 2, 16) if setting.quick else (8192, 16, 8, 128)
    device = torch.device(setting.device)
    image_tokens, subsegments = _packed_trees(length, device)
    parts = {"image_tokens": image_tokens, "subsegment_ids": subsegments}
    dense = sequence_mask(length, device=device, **parts)
    blocks = whole_sequence(length, device=device, **parts)
    rows = []
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        generator = torch.Generator().manual_seed(0)
        heads = [torch.randn(1, n, length, Dh, generator=generator) for n in (H, K, K)]
        qkv = [x.to(device, dtype).requires_grad_() for x in heads]

        def learn(by_blocks: bool, qkv: list[Tensor] = qkv) -> list[Tensor]:
            y = blocks.attend(0, *qkv) if by_blocks else attend(*qkv, dense)
            return [y.detach(), *torch.autograd.grad(y.float().square().mean() * 1e3, qkv)]

        found, expected = learn(True), learn(False)
        worst = max(
            float((a.float() - b.float()).abs().max() / b.float().abs().max())
            for a, b in zip(found, expected, strict=True)
        )
        name = f"{str(dtype).removeprefix('torch.')}, {length} tokens"
        rows.append(Row(f"{name}: relative difference, forward and backward", worst, limit))
        ours, dense_time = (milliseconds(setting, partial(learn, x)) for x in (True, False))
        rows.append(Row(f"{name}: time of both", ours, unit="ms"))
        rows.append(Row(f"{name}: over the dense mask's {dense_time:.1f} ms", ours / dense_time))
        peaks = [peak_bytes(setting, partial(learn, x)) / 1e9 for x in (True, False)]
        rows.append(Row(f"{name}: peak (dense mask {peaks[1]:.2f} GB)", peaks[0], unit="GB"))
    rows.append(Row("the dense mask alone", dense.nbytes / 1e9, unit="GB"))
    return rows


def _packed_trees(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(1, T) image tokens, (1, T) subsegments: four examples of a picture and three branches."""
    each = length // 4
    subsegments = torch.full((4, each), PREFIX_SUBSEGMENT)
    for branch in range(3):
        start = each * (5 + branch) // 8
        subsegments[:, start : start + each // 8] = branch
    subsegments += torch.arange(3, -1, -1)[:, None] * PACK_SUBSEGMENT
    image_tokens = torch.zeros(4, each, dtype=torch.bool)
    image_tokens[:, 4 : each // 2] = True
    return image_tokens.view(1, -1).to(device), subsegments.view(1, -1).to(device)


def waits(setting: Setting) -> list[Row]:
    """How often the host waits for the GPU: what two runs of different length differ by.

    On a CPU the simulated device of the tests counts.
    """
    device, counting = _counter(setting)
    short, long = (2, 4) if setting.quick else (3, 8)

    def train(steps: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            # No run comes to its end: that alone writes the model.
            _losses(_recipe(setting, long + 1), device, folder, stop_after=steps)

    llm = random_llm(replace(setting, quick=True)).to(device)
    ids = ids_for(llm, 2, 9)

    def decode(tokens: int) -> None:
        llm.generate(ids, max_new_tokens=tokens, lookup=False)

    rows = []
    for name, work, limit in (("training step", train, 2), ("decode step of 2 rows", decode, 1)):
        work(short)  # what happens once, such as autotuning
        counts = []
        for steps in (short, long):
            with counting() as found:
                work(steps)
            counts.append(len(found))
        a_step = (counts[1] - counts[0]) / (long - short)
        rows.append(Row(f"{name}: host synchronisations", a_step, limit))
    return rows


def _counter(setting: Setting) -> tuple[Any, Callable[[], Any]]:
    """The device, and a context that gives what has a length: the synchronisations within it."""
    if not setting.on_gpu:
        from tests.device.simulated import DEVICE, count_waits

        return DEVICE, count_waits

    @contextmanager
    def warned() -> Iterator[list[warnings.WarningMessage]]:
        found: list[warnings.WarningMessage] = []
        with warnings.catch_warnings(record=True) as all_of_them:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode("default")
                found += [w for w in all_of_them if "synchronizing CUDA" in str(w.message)]

    return "cuda", warned
