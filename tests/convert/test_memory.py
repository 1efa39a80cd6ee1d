"""A load holds little more than the weights it returns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanomolmo2.convert.pretrained import save_pretrained
from nanomolmo2.convert.tensor_files import write_cache
from nanomolmo2.models import LanguageModel, LLMConfig

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
from nanomolmo2.convert.pretrained import load_language_model

def memory(field):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(l.split()[1]) for l in lines if l.startswith(field))

torch.set_num_threads(1)
for path, dtype in json.loads(sys.argv[2]):
    reader, writer = os.pipe()
    if not os.fork():
        load_language_model(sys.argv[1], dtype=torch.float16)  # maps the code that a load runs
        before = memory("VmRSS")
        model = load_language_model(path, dtype=dtype and getattr(torch, dtype))
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
    arguments = [(str(tmp_path / name), dtype) for name, dtype in cases]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "small", json.dumps(arguments)],
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
    assert max(ratios) <= LIMIT
    assert min(ratios) > 0.9, f"the measure does not see the weights: {done.stdout}"
