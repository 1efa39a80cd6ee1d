"""Build the package, install it into an empty environment, and use it from there.

    python scripts/check_package.py                          # make package
    python scripts/check_package.py --torch torch==2.13.0    # PyTorch is installed too, not linked

`python -m build` makes the sdist, and the wheel from that sdist, in an environment of its own: pip
needs an index, or a folder, to take setuptools from. The wheel is installed outside the checkout,
first with its core dependencies alone, where `demo` and `ask` run, then with the extra `serve`,
where a server answers. PyTorch, of several hundred MB, is linked from the environment that runs
this; pip then sees it, and installs what it needs.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
import venv
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 25_000_000
NEEDED = (  # without these it starts and then fails
    "nanomolmo2/__main__.py",
    "nanomolmo2/py.typed",
    "nanomolmo2/assets/tiny/model.safetensors",
    "nanomolmo2/assets/tiny/tokenizer.json",
    "nanomolmo2/assets/demo/scene.png",
    "nanomolmo2/assets/molmo2/chat_template.jinja",
    "nanomolmo2/serve/page/index.html",
    "nanomolmo2/serve/page/app.js",
    "nanomolmo2/serve/page/examples/examples.json",
)
QUESTION, ANSWER = "Is there a dog?", "No."  # about the bundled picture
LIMIT = 900.0  # seconds of one step that must not hang


# ---- what the files hold ----


def wheel_problems(wheel: Path) -> list[str]:
    """What is wrong with a wheel: too large, or files that are missing or do not belong there."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    problems = []
    if (size := wheel.stat().st_size) > MOST_BYTES:
        problems.append(f"{wheel.name} has {size:,} bytes, expected at most {MOST_BYTES:,}")
    problems += [f"{name} is missing" for name in NEEDED if name not in names]
    metadata = re.compile(r"nanomolmo2-[^/]+\.dist-info/")
    for name in sorted(names):
        inside = name.startswith("nanomolmo2/") or metadata.match(name)
        if not inside or "__pycache__" in name or name.endswith((".pyc", ".tmp")):
            problems.append(f"{name} does not belong into the wheel")
    return problems


def sdist_files(sdist: Path) -> set[str]:
    """The files of a source distribution, without its own folder's name."""
    with tarfile.open(sdist) as archive:
        return {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}


# ---- an environment ----


def run(command: Sequence[str | Path], folder: Path, environment: dict[str, str]) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    if done.returncode:
        raise SystemExit(
            f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}"
            f"{done.stderr}"
        )
    return done.stdout


def outside() -> dict[str, str]:
    """The environment's variables without those that lead back to this checkout."""
    ours = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
    return {name: value for name, value in os.environ.items() if name not in ours}


def link_torch(site: Path) -> None:
    """Let an environment have the PyTorch of this one, and nothing else of it."""
    installed = importlib.metadata.distribution("torch")
    for name in {file.parts[0] for file in installed.files or ()} - {"..", "__pycache__"}:
        source = Path(str(installed.locate_file(name)))
        if source.exists():
            (site / name).symlink_to(source.resolve())


def make_environment(folder: Path, torch: str | None) -> Path:
    """An environment with PyTorch alone; returns its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    if torch:
        pip_install(python, torch)
    else:
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        link_torch(Path(run([python, "-c", code], folder, outside()).strip()))
    return python


def pip_install(python: Path, *what: str) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-qq", *what]
    run(command, python.parent, outside())


# ---- the server ----


@contextlib.contextmanager
def serving(program: Path, folder: Path) -> Iterator[str]:
    """The address of a server with `tiny` on a free port; it must end by SIGTERM with code 0."""
    command = [str(program), "serve", "--model", "tiny", "--port", "0"]
    log = folder / "serve.log"
    with open(log, "w") as stream:
        server = subprocess.Popen(
            command, cwd=folder, env=outside(), stdout=stream, stderr=subprocess.STDOUT
        )
    try:
        yield _address(server, log)
        server.send_signal(signal.SIGTERM)
        if code := server.wait(60):
            raise SystemExit(f"{' '.join(command)} ended with {code}:\n{log.read_text()}")
    finally:
        server.kill()
        server.wait()


def _address(server: subprocess.Popen[bytes], log: Path) -> str:
    """Wait until the server says where it is, and answers there."""
    end = time.monotonic() + 120
    while time.monotonic() < end and server.poll() is None:
        if found := re.search(r"http://127\.0\.0\.1:[1-9]\d*", log.read_text()):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{found[0]}/health"):
                return found[0]
        time.sleep(0.1)
    raise SystemExit(f"the server did not say where it is:\n{log.read_text()}")


def post(address: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


# ---- the steps ----


def build(out: Path) -> tuple[Path, Path]:
    """The sdist and the wheel of this checkout, in ``out``; what is wrong with them ends it."""
    run([sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)], ROOT, outside())
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    if problems := wheel_problems(wheel):
        raise SystemExit("\n".join(problems))
    for path in (sdist, wheel):
        print(f"built {path.name}, {path.stat().st_size / 1e6:.1f} MB", flush=True)
    return sdist, wheel


def check_commands(python: Path, folder: Path) -> None:
    """`demo` and `ask` of an environment, from a folder that holds nothing of the checkout."""
    program, environment = python.parent / "nanomolmo2", outside()
    home = run([python, "-c", "import nanomolmo2; print(nanomolmo2.__file__)"], folder, environment)
    if not Path(home.strip()).is_relative_to(python.parents[1]):
        raise SystemExit(f"nanomolmo2 was imported from {home.strip()}, not from the environment")
    run([program, "demo"], folder, environment)
    if not (folder / "demo.png").is_file():
        raise SystemExit("nanomolmo2 demo wrote no demo.png")
    scene = Path(home.strip()).parent / "assets" / "demo" / "scene.png"
    said = run([program, "ask", scene, QUESTION], folder, environment).strip()
    if said != ANSWER:
        raise SystemExit(f"nanomolmo2 ask answered {said!r}, expected {ANSWER!r}")
    print("demo and ask run from the core dependencies", flush=True)


def check_server(python: Path, folder: Path) -> None:
    """`serve`: its page, and an answer."""
    scene = ROOT / "nanomolmo2" / "assets" / "demo" / "scene.png"
    picture = "data:image/png;base64," + base64.b64encode(scene.read_bytes()).decode()
    with serving(python.parent / "nanomolmo2", folder) as address:
        with urllib.request.urlopen(f"{address}/") as page:
            if b"<html" not in page.read():
                raise SystemExit("the server has no page at /")
        found = post(f"{address}/v1/point", {"image": picture, "object": "snail"})
    if len(found["points"]) != 1:
        raise SystemExit(f"the server pointed to {found['points']}, expected the one snail")
    print("serve answers from the extra `serve`", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--torch",
        metavar="SPEC",
        help="install PyTorch, in pip's words (default: link the one here)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="keep the sdist and the wheel there"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        out = (arguments.out or work / "dist").absolute()
        if list(out.glob("nanomolmo2-*")):
            raise SystemExit(f"{out} already holds a build: name another folder")
        _, wheel = build(out)
        python = make_environment(work / "environment", arguments.torch)
        pip_install(python, str(wheel))
        (empty := work / "empty").mkdir()
        check_commands(python, empty)
        pip_install(python, f"{wheel}[serve]")
        check_server(python, empty)
        run([python, "-m", "pip", "check"], empty, outside())


if __name__ == "__main__":
    main()
