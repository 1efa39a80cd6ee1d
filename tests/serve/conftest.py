"""A real server of `tiny` on a free port, and pictures as requests hold them."""

from __future__ import annotations

import base64
import contextlib
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from PIL import Image

import nanomolmo2
from nanomolmo2.generation.vlm import VLM
from nanomolmo2.serve.app import make_app
from nanomolmo2.serve.settings import ServeSettings
from nanomolmo2.serve.store import ModelStore
from scripts.page_screenshots import chromium, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SCENE = Path(nanomolmo2.__file__).parent / "assets" / "demo" / "scene.png"


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def file_url(path: Path, kind: str = "image/png") -> str:
    return data_url(path.read_bytes(), kind)


SCENE_URL = data_url(SCENE.read_bytes())


def picture_sizes(messages: list[Any]) -> list[tuple[int, int]]:
    """(width, height) of the decoded pictures of messages, in order."""
    parts = [part for message in messages for part in message["content"]]
    return [part["image"].size for part in parts if part["type"] == "image"]


@dataclass
class Running:
    """A server that runs in a thread; ``vlm`` is the model behind it."""

    url: str
    vlm: VLM

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)  # type: ignore[arg-type]

    def wait_until_idle(self) -> None:
        """Fails if rows are still taken after a minute."""
        deadline = time.monotonic() + 60
        stats = self.vlm.scheduler.stats
        while stats.running or stats.waiting:
            assert time.monotonic() < deadline, f"still {stats.running} rows"
            time.sleep(0.01)


@contextlib.contextmanager
def running(vlm: VLM, settings: ServeSettings | None = None) -> Iterator[Running]:
    app = make_app(ModelStore({"tiny": lambda: vlm}), settings or ServeSettings())
    with serving(app) as address:
        yield Running(address, vlm)


@pytest.fixture(scope="session")
def vlm() -> Iterator[VLM]:
    with VLM("tiny", device="cpu") as vlm:
        yield vlm


@pytest.fixture(scope="session")
def server(vlm: VLM) -> Iterator[Running]:
    with running(vlm) as found:
        yield found


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """For tests of the page. Playwright's event loop stands in the way of others while it runs."""
    with chromium() as started:
        yield started


@pytest.fixture(scope="session")
def clip_url() -> str:
    """Three frames, half a second each, as an animated GIF."""
    frames = [Image.new("RGB", (64, 48), color) for color in ("red", "green", "blue")]
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:], duration=500)
    return data_url(stream.getvalue(), "video/gif")
