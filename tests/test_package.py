"""What the sdist and the wheel hold. `make package` installs them and runs what is inside."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import nanomolmo2
from scripts.check_package import MOST_BYTES, NEEDED, sdist_files, wheel_problems

ROOT = Path(__file__).parents[1]
NAME = f"nanomolmo2-{nanomolmo2.__version__}"
# Without an environment of its own, and so without an index.
BACKEND = "import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"


def build(kind: str, folder: Path, out: Path) -> Path:
    """An sdist or a wheel of a source folder."""
    out.mkdir()
    command = [sys.executable, "-c", BACKEND.format(kind=kind), str(out)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = out.iterdir()
    return built


def package_files() -> set[str]:
    """The files of the package in this checkout."""
    files = (path for path in (ROOT / "nanomolmo2").rglob("*") if path.is_file())
    return {str(p.relative_to(ROOT)) for p in files if "__pycache__" not in p.parts}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout: building writes beside the sources."""
    work = tmp_path_factory.mktemp("sources")
    copy = work / "checkout"
    copy.mkdir()
    for name in ("nanomolmo2", "tests", "scripts", "benchmarks", "models", "docs"):
        shutil.copytree(ROOT / name, copy / name)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy)
    # What compiling leaves in folders of assets is no asset.
    (copy / "nanomolmo2" / "assets" / "tiny" / "__pycache__").mkdir()
    (copy / "nanomolmo2" / "assets" / "tiny" / "__pycache__" / "old.cpython-311.pyc").touch()
    return build("sdist", copy, work / "out")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist alone, as by `python -m build` and by pip."""
    work = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(work, filter="data")
    return build("wheel", work / NAME, work / "out")


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(f"{NAME}.dist-info/METADATA").decode())


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """Every module, every asset; no tests, scripts, benchmarks, documentation or compiled files."""
    about = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt")
    licences = ("licenses/LICENSE", "licenses/NOTICE")
    extra = {f"{NAME}.dist-info/{name}" for name in (*about, *licences)}
    assert names_in(wheel) == package_files() | extra
    assert set(NEEDED) <= package_files()
    assert wheel.name == f"{NAME}-py3-none-any.whl"
    assert wheel.stat().st_size <= MOST_BYTES == 25_000_000
    assert wheel_problems(wheel) == []


def test_what_is_wrong_with_a_wheel_is_told(wheel: Path, tmp_path: Path) -> None:
    """The check that `make package` stops for finds all three kinds of faults."""
    faulty = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(faulty, "w") as target:
        for entry in source.infolist():
            if entry.filename != "nanomolmo2/assets/tiny/tokenizer.json":
                target.writestr(entry, source.read(entry))
        target.writestr("tests/test_cli.py", "")
        target.writestr("nanomolmo2/__pycache__/batch.cpython-311.pyc", bytes(25_000_000))
    said = wheel_problems(faulty)
    assert said[0].endswith(" bytes, expected at most 25,000,000")
    assert said[1:] == [
        "nanomolmo2/assets/tiny/tokenizer.json is missing",
        "nanomolmo2/__pycache__/batch.cpython-311.pyc does not belong into the wheel",
        "tests/test_cli.py does not belong into the wheel",
    ]


def test_the_sdist_holds_what_the_wheel_is_built_from(sdist: Path) -> None:
    found = {f for f in sdist_files(sdist) if not f.startswith("nanomolmo2.egg-info/")}
    beside = {"LICENSE", "MANIFEST.in", "NOTICE", "PKG-INFO", "README.md"}
    assert found == package_files() | beside | {"pyproject.toml", "setup.cfg"}


def test_the_metadata(wheel: Path) -> None:
    found = metadata_of(wheel)
    assert found["Name"] == "nanomolmo2"
    assert found["Version"] == nanomolmo2.__version__
    assert found["Requires-Python"] == ">=3.11"
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Description-Content-Type"] == "text/markdown"
    assert found.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    needed = found.get_all("Requires-Dist") or []
    core = {text.split(">")[0].split("<")[0] for text in needed if "extra ==" not in text}
    assert core == {
        *("torch", "numpy", "pillow", "safetensors", "tokenizers", "huggingface-hub", "tyro"),
        "rich",
    }
    assert {"serve", "chat", "train", "video", "dev"} <= set(found.get_all("Provides-Extra") or [])


def test_the_extra_of_the_developers_installs_what_the_others_do(wheel: Path) -> None:
    """The tests use the server and the chat: `make dev` installs what these need."""
    needed = metadata_of(wheel).get_all("Requires-Dist") or []

    def of(extra: str) -> set[str]:
        return {t.split(";")[0].strip() for t in needed if f'extra == "{extra}"' in t}

    assert of("serve") and of("chat")
    assert of("serve") | of("chat") <= of("dev")


def test_the_containerfile_names_what_there_is() -> None:
    """No image is built here: its files are looked for, and its PyTorch is the Makefile's."""
    text = (ROOT / "Containerfile").read_text(encoding="utf-8")
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY ")]
    names = [name for line in copied for name in line if not name.startswith(("--", "/dist"))]
    assert {"pyproject.toml", "MANIFEST.in", "README.md", "nanomolmo2"} <= set(names)
    assert all((ROOT / name).exists() for name in names)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (version,) = re.findall(r"^TORCH \?= (torch==\S+)$", makefile, re.MULTILINE)
    assert f'ARG TORCH="{version} --index-url ' in text
