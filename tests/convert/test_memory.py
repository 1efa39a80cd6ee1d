"""A load holds little more than the weights it returns."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanomolmo2.convert import export_molmo2, export_molmo_point
from nanomolmo2.convert.pretrained import save_pretrained
from nanomolmo2.convert.tensor_files import write_cache
from nanomolmo2.models import (
    ConnectorConfig,
    LanguageModel,
    LLMConfig,
    NanoMolmo2,
    NanoMolmo2Config,
    VisionConfig,
)
from nanomolmo2.models.presets import molmo_point_config
from tests.convert.molmo2_checkpoint import write_checkpoint
from tests.convert.molmo_point_checkpoint import write_point_checkpoint

# Shares of the parts as in Qwen3-0.6B: the embedding is a quarter, 47 M parameters in all.
CONFIG = LLMConfig(
    vocab_size=24_576,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=10,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=128,
)
LIMIT = 1.2

# Every load runs in a fork, whose peak starts at what the process holds before.
PROGRAM = """
import json, os, sys
import torch
from nanomolmo2.convert import pretrained

load = getattr(pretrained, sys.argv[3])

def memory(field):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(l.split()[1]) for l in lines if l.startswith(field))

torch.set_num_threads(1)
for path, dtype in json.loads(sys.argv[2]):
    reader, writer = os.pipe()
    if not os.fork():
        load(sys.argv[1], dtype=torch.float16)  # maps the code that a load runs
        before = memory("VmRSS")
        model = load(path, dtype=dtype and getattr(torch, dtype))
        for parameter in model.parameters():
            parameter.detach().view(-1)[::512].sum()  # mapped pages count when they are read
        size = sum(p.nbytes for p in model.parameters())
        os.write(writer, json.dumps((memory("VmHWM") - before) / size).encode())
        os._exit(0)
    os.wait()
    os.close(writer)
    print(path, dtype, os.read(reader, 100).decode())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_peak_memory_of_a_load(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = LanguageModel(CONFIG)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.view(-1)[:1000])
    assert sum(p.numel() for p in model.parameters()) > 45e6
    small = LanguageModel(
        LLMConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    )
    save_pretrained(small, tmp_path / "small")
    save_pretrained(model, tmp_path / "float32", max_shard_size="100MB")
    for name in ("float32", "bfloat16"):
        model.to(getattr(torch, name))
        write_cache(
            tmp_path / f"{name}.pt",
            component="llm",
            config=CONFIG.to_dict(),
            source={},
            state_dict=model.state_dict(),
        )
    del model
    cases = [
        ("float32", None),  # safetensors, sharded
        ("float32", "bfloat16"),
        ("float32.pt", None),  # the cache, mapped
        ("float32.pt", "bfloat16"),
        ("bfloat16.pt", "float32"),
    ]
    ratios = peaks("load_language_model", tmp_path / "small", tmp_path, cases)
    assert max(ratios) <= LIMIT


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("points", [False, True], ids=["molmo2", "molmo_point"])
def test_peak_memory_of_a_load_of_fused_and_joined_tensors(tmp_path: Path, points: bool) -> None:
    """Embeddings are joined and projections are cut, each straight to its place; in MolmoPoint the
    head is joined too.
    """
    config = NanoMolmo2Config(
        vision_config=VisionConfig(
            hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6
        ),
        connector_config=ConnectorConfig(
            vision_dim=384,
            llm_dim=512,
            connector_type="pooling",
            num_attention_heads=6,
            vit_layers=(-3, -5),
        ),
        llm_config=replace(CONFIG, tie_word_embeddings=False, additional_vocab_size=4096),
        image_token_id=CONFIG.vocab_size + 2,
        bidirectional_image_attention=True,
    )
    config = molmo_point_config(config) if points else config
    with torch.device("meta"):
        model = NanoMolmo2(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.view(-1)[:1000])
    (write_point_checkpoint if points else write_checkpoint)(tmp_path / "small")
    export = export_molmo_point if points else export_molmo2
    cases: list[tuple[str, str | None]] = [("float32", None), ("float32", "bfloat16")]
    with pytest.warns(UserWarning):
        export(model, tmp_path / "float32", max_shard_size="100MB")
    if points:
        save_pretrained(model, tmp_path / "own", max_shard_size="100MB")
        with pytest.warns(UserWarning):
            export(model.bfloat16(), tmp_path / "bfloat16", max_shard_size="50MB")
        cases += [("own", None), ("own", "bfloat16"), ("bfloat16", None), ("bfloat16", "float32")]
    del model
    ratios = peaks("load_nanomolmo2", tmp_path / "small", tmp_path, cases)
    assert max(ratios) <= 1.15


def peaks(load: str, small: Path, folder: Path, cases: list[tuple[str, str | None]]) -> list[float]:
    """Peak memory of loads, as a multiple of the weights they return."""
    arguments = [(str(folder / name), dtype) for name, dtype in cases]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, small, json.dumps(arguments), load],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    ratios = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(ratios) == len(cases)
    print(done.stdout)
    assert min(ratios) > 0.9, f"the measure does not see the weights: {done.stdout}"
    return ratios
