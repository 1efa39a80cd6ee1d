"""Many streaming clients at once: does each get its answer, and how fast.

    python -m benchmarks.serving --clients 64 --seconds 120

Starts ``nanomolmo2 serve`` with `tiny`, asks every question alone first, and then lets clients ask
about scenes at random, a third of which leave in the middle of their answer. Each answer must equal
the one that was given alone. Prints rows for docs/serving.md: time to the first piece, tokens a
second, and the memory of the server, beside one client.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from nanomolmo2.emoji.scenes import test_scene

QUESTIONS = (
    "Describe this picture.",
    "Point to everything.",
    "How many stars are there?",
    "What is at the top?",
)
LEAVING = 1 / 3


@dataclass
class Load:
    """What clients saw. ``wrong``: answers that were not those given alone, or had no end."""

    answers: int = 0
    left: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)  # seconds to the first piece
    wrong: list[str] = field(default_factory=list)

    def row(self, clients: int, memory: tuple[int, int]) -> str:
        """Of the table in docs/serving.md; memory in bytes at the beginning and the end."""
        p50, p99 = np.percentile(self.first, [50, 99])
        before, after = (f"{x / 2**20:.0f}" for x in memory)
        return (
            f"| {clients} | {self.answers} | {self.left} | {len(self.wrong)} | {p50 * 1000:.0f} ms "
            f"| {p99 * 1000:.0f} ms | {self.tokens / self.seconds:.0f} | {before} -> {after} MiB |"
        )


HEAD = (
    "| clients | answers | left | not as alone | first piece, p50 | p99 | tokens/s | memory |\n"
    "|---|---|---|---|---|---|---|---|"
)


def requests(pictures: int) -> list[dict[str, Any]]:
    """Bodies of every question about every picture."""
    bodies = []
    for number in range(pictures):
        stream = io.BytesIO()
        Image.fromarray(test_scene(number, "seen", seed=7).image).save(stream, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
        for question in QUESTIONS:
            shown = {"type": "image_url", "image_url": {"url": url}}
            content = [shown, {"type": "text", "text": question}]
            bodies.append({"model": "tiny", "messages": [{"role": "user", "content": content}]})
    return bodies


async def alone(client: httpx.AsyncClient, bodies: list[dict[str, Any]]) -> list[str]:
    """The answers, one after the other."""
    answers = []
    for body in bodies:
        response = await client.post("/v1/chat/completions", json=body)
        answers.append(response.raise_for_status().json()["choices"][0]["message"]["content"])
    return answers


async def one_client(
    client: httpx.AsyncClient,
    bodies: list[dict[str, Any]],
    expected: list[str],
    load: Load,
    seed: int,
    until: float,
) -> None:
    """Ask until a time (of time.perf_counter), one question after the other."""
    random_ = random.Random(seed)
    while time.perf_counter() < until:
        number = random_.randrange(len(bodies))
        leaves_after = random_.randint(1, 8) if random_.random() < LEAVING else None
        start, text, ended = time.perf_counter(), "", False
        body = {**bodies[number], "stream": True, "stream_options": {"include_usage": True}}
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            pieces = 0
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    break
                if chunk["usage"]:
                    ended, load.tokens = True, load.tokens + chunk["usage"]["completion_tokens"]
                for choice in chunk["choices"]:
                    if piece := choice["delta"].get("content"):
                        if not text:
                            load.first.append(time.perf_counter() - start)
                        text, pieces = text + piece, pieces + 1
                if leaves_after is not None and pieces >= leaves_after:
                    break
        if leaves_after is not None and not ended:
            load.left += 1
            fits = expected[number].startswith(text)
        else:
            load.answers += 1
            fits = ended and text == expected[number]
        if not fits:
            load.wrong.append(f"{text!r} for {expected[number]!r}")


async def run_load(
    url: str, clients: int, seconds: float, bodies: list[dict[str, Any]], expected: list[str]
) -> Load:
    """So many clients for so long."""
    load, start = Load(), time.perf_counter()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        until = start + seconds
        await asyncio.gather(
            *(one_client(client, bodies, expected, load, seed, until) for seed in range(clients))
        )
    load.seconds = time.perf_counter() - start
    return load


def memory_of(process: int) -> int:
    """Bytes in memory of a process; 0 where the system does not tell."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


async def measure(url: str, process: int, clients: int, seconds: float, pictures: int) -> bool:
    """Print the rows of one client and of many. Returns: whether all answers were right."""
    bodies = requests(pictures)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        expected = await alone(client, bodies)
    print(HEAD, flush=True)
    right = True
    for number in (1, clients):
        before = memory_of(process)
        load = await run_load(
            url, number, min(seconds, 20) if number == 1 else seconds, bodies, expected
        )
        print(load.row(number, (before, memory_of(process))), flush=True)
        for wrong in load.wrong[:5]:
            print(f"not as alone: {wrong}", file=sys.stderr)
        right = right and not load.wrong
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64, help="at once (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=120, help="default: %(default)s")
    parser.add_argument("--pictures", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--url", help="of a server that runs; none = start one")
    options = parser.parse_args()
    if options.url:
        arguments = (options.url, 0, options.clients, options.seconds, options.pictures)
        return int(not asyncio.run(measure(*arguments)))
    command = [sys.executable, "-m", "nanomolmo2", "serve", "--model", "tiny", "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        try:
            arguments = (url, server.pid, options.clients, options.seconds, options.pictures)
            return int(not asyncio.run(measure(*arguments)))
        finally:
            server.terminate()


if __name__ == "__main__":
    raise SystemExit(main())
