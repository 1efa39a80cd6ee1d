"""Runs inputs in worker processes, and starts those anew that die or hang."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from tests.robustness.judge import Outcome

ROOT = Path(__file__).parents[2]
CPU_SECONDS = 12.0  # of one input, then its worker is ended
IDLE_SECONDS = 10.0  # in which none of its threads wants a processor: it waits for something
INPUTS_OF_A_WORKER = 4000  # then another begins: what leaks must not look like an input's need
AHEAD = 8  # names that wait in the pipe


class Worker:
    """One process; `run` gives outcomes in the order of the names."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._done = 0

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()
        self._said.close()

    def run(self, names: Iterable[str]) -> Iterator[Outcome]:
        """Judge inputs. One that takes too long or too much is tried a second time, alone."""
        for name in names:
            outcome = self._ask(name)
            if any("took" in problem for problem in outcome.problems):
                self._end()
                outcome = self._ask(name)
            yield outcome

    def _ask(self, name: str) -> Outcome:
        if self._done >= INPUTS_OF_A_WORKER:
            self._end()
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        self._done += 1
        cpu = _cpu_seconds(process.pid)
        try:
            process.stdin.write(json.dumps(name).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return self._died(name, "")
        idle_since, before = time.monotonic(), cpu
        while not select.select([process.stdout], [], [], 0.5)[0]:
            now = _cpu_seconds(process.pid)
            if now > before or _wants_a_processor(process.pid):
                idle_since, before = time.monotonic(), now
            if time.monotonic() - idle_since > IDLE_SECONDS:
                return self._died(name, "waits for ever")
            if now - cpu > CPU_SECONDS + (20 if self._done == 1 else 0):  # the first one imports
                return self._died(name, f"did not come back in {now - cpu:.0f} s")
        line = process.stdout.readline()
        if not line:
            return self._died(name, "")
        return Outcome(**json.loads(line))

    def _died(self, name: str, why: str) -> Outcome:
        process = self._process
        assert process is not None
        if why:
            process.send_signal(signal.SIGABRT)  # lets faulthandler say where it hangs
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        code = process.returncode
        self._said.seek(0)
        said = self._said.read().decode("utf-8", "replace")
        lines = [line.strip() for line in said.splitlines() if "File" in line or "rror" in line]
        where = " < ".join(lines[:6] + lines[-2:])[-900:]
        how = why or f"died by {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
        self._end()
        return Outcome(name, problems=[f"the process {how} [died] {where}"])

    def _start(self) -> None:
        self._said.seek(0)
        self._said.truncate()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.robustness.worker"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
        )
        self._done = 0

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _wants_a_processor(pid: int) -> bool:
    """Whether a thread runs or waits for a processor or a disk, however loaded the machine is."""
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            if stat.read_text().rpartition(")")[2].split()[0] in "RD":
                return True
        except OSError:  # it has ended
            continue
    return False


def run_inputs(names: Iterable[str], workers: int = 1, batch: int = 200) -> Iterator[Outcome]:
    """Judge inputs on several processes; outcomes come as they are ready."""
    if workers == 1:
        with Worker() as worker:
            yield from worker.run(names)
        return
    todo: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
    done: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()
    pile: list[str] = []
    for name in names:
        pile.append(name)
        if len(pile) == batch:
            todo.put(pile)
            pile = []
    todo.put(pile)

    def work() -> None:
        try:
            with Worker() as worker:
                while True:
                    try:
                        some = todo.get_nowait()
                    except queue.Empty:
                        return
                    for outcome in worker.run(some):
                        done.put(outcome)
        finally:
            done.put(None)

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work) for _ in range(workers)]
        running = workers
        while running:
            outcome = done.get()
            if outcome is None:
                running -= 1
            else:
                yield outcome
        for future in futures:
            future.result()
