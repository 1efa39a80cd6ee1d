"""A server of another program with an exported model: started, asked, ended."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def served(
    command: Sequence[str], url: str, log: Path, seconds: float, environment: Mapping[str, str]
) -> Iterator[None]:
    """Run a server until it answers at ``url``, and end it and its children afterwards.

    Raises: RuntimeError if it ends by itself or takes longer than ``seconds``.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **environment},
        )
    try:
        begin = time.monotonic()
        while not _answers(url):
            if process.poll() is not None:
                raise RuntimeError(f"it ended by itself: {_last_line(log)}")
            if time.monotonic() - begin > seconds:
                raise RuntimeError(f"it did not answer within {seconds:.0f} s")
            time.sleep(1)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ask(base: str, model: str, case: Mapping[str, Any], folder: Path, **options: Any) -> Any:
    """The answer to a case by the chat completions of OpenAI; pictures go along as data.

    Raises: RuntimeError with what the server says.
    """
    pictures = iter(case["images"])
    messages = [
        {
            **message,
            "content": [
                _picture(folder / next(pictures)) if item["type"] == "image" else item
                for item in message["content"]
            ],
        }
        for message in case["messages"]
    ]
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": case["max_new_tokens"],
        "stream": False,
        **options,
    }
    request = urllib.request.Request(
        f"{base}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"it answered {error.code} {error.reason}") from None


def _picture(path: Path) -> dict[str, Any]:
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"
