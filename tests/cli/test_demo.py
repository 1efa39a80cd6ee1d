"""`nanomolmo2 demo --serve`: the demo in a browser."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
import webbrowser
from pathlib import Path

import pytest

from nanomolmo2 import cli, demo
from nanomolmo2.cli.serve import Serve
from nanomolmo2.serve import running


def test_the_page_is_served_until_ctrl_c(tmp_path: Path) -> None:
    """It says where; no picture is written, and no browser of the terminal is started."""
    with subprocess.Popen(
        [sys.executable, "-m", "nanomolmo2", "demo", "--serve", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if "DISPLAY" not in name},
    ) as process:
        assert process.stdout is not None
        found = re.fullmatch(
            r"serving tiny at (http://127\.0\.0\.1:\d+)\n", process.stdout.readline()
        )
        assert found
        with urllib.request.urlopen(f"{found[1]}/", timeout=60) as page:
            assert b"<html" in page.read()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_it_is_the_server_of_the_bundled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Serve] = []
    monkeypatch.setattr(Serve, "run", lambda self: served.append(self))
    assert cli.main(["demo", "--serve", "--device", "cpu", "--dtype", "float32"]) == 0
    assert served == [Serve(open=True, device="cpu", dtype="float32")]
    assert served[0].port == 8000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "8001"], "--port is of the page: add --serve, or leave it out"),
        (
            ["--serve", "--draw", "other.png"],
            "--draw is of the demo without --serve: the page saves pictures itself",
        ),
        (["--serve", "--port", "-1"], "--port must be 0 or more, found -1"),
    ],
)
def test_options_of_the_other_form(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", *arguments]) == 2
    assert capsys.readouterr().err == f"nanomolmo2: {said}\n"


@pytest.mark.parametrize(
    ("platform", "screens", "opens"),
    [
        ("linux", {}, False),
        ("linux", {"DISPLAY": ":0"}, True),
        ("linux", {"WAYLAND_DISPLAY": "wayland-0"}, True),
        ("darwin", {}, True),
    ],
)
def test_a_browser_is_opened_where_there_is_a_screen(
    monkeypatch: pytest.MonkeyPatch, platform: str, screens: dict[str, str], opens: bool
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setattr(sys, "platform", platform)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in screens.items():
        monkeypatch.setenv(name, value)
    before = set(threading.enumerate())
    running.open_page("http://127.0.0.1:8000")
    for thread in set(threading.enumerate()) - before:
        thread.join()
    assert opened == ["http://127.0.0.1:8000"] * opens


@pytest.mark.parametrize("has_server", [True, False])
def test_the_demo_names_the_page_where_it_can_be_served(
    monkeypatch: pytest.MonkeyPatch, has_server: bool
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: has_server or None)
    lines = demo.suggestions("Point to the snail.").splitlines()
    found = [line for line in lines if " demo --serve " in line]
    assert len(found) == has_server
    assert len(lines) == 4 + has_server
