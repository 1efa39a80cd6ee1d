"""Names, versions, aliases, and how light the package is to import."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import nanomolmo2

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "PIL", "tokenizers", "huggingface_hub", "safetensors", "rich")


def python(code: str) -> str:
    """Output of a fresh interpreter in the repository's root."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_resolves() -> None:
    for name in nanomolmo2.__all__:
        assert getattr(nanomolmo2, name) is getattr(nanomolmo2, name)
    assert set(nanomolmo2.__all__) <= set(dir(nanomolmo2))
    from nanomolmo2.models import NanoMolmo2

    assert nanomolmo2.NanoMolmo2 is NanoMolmo2


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'NanoMolmo3'"):
        _ = nanomolmo2.NanoMolmo3


def test_import_loads_nothing_heavy() -> None:
    loaded = python("import sys, nanomolmo2; dir(nanomolmo2); print(*sys.modules)").split()
    assert not set(HEAVY) & set(loaded)


@pytest.mark.parametrize("arguments", [["--help"], ["ask", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['nanomolmo2', *{arguments!r}]\n"
        "from nanomolmo2.cli import main\n"
        "code = main()\n"
        "print('LOADED', code, *sys.modules)"
    )
    _, _, loaded = python(code).partition("LOADED ")
    status, *modules = loaded.split()
    assert status == "0"
    assert "nanomolmo2.cli" in modules
    assert not set(HEAVY) & set(modules)


@pytest.mark.parametrize(
    "module", ["", "vision_encoder", "language_model", "connector", "nanomolmo2"]
)
def test_the_root_alias_holds_the_same_objects(module: str) -> None:
    alias = importlib.import_module(f"models.{module}" if module else "models")
    real = importlib.import_module("nanomolmo2.models")
    assert alias.__all__
    for name in alias.__all__:
        assert getattr(alias, name) is getattr(real, name)


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" not in project
    assert re.fullmatch(r"\d+\.\d+\.\d+", nanomolmo2.__version__)
    try:
        installed = importlib.metadata.version("nanomolmo2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed here, only importable")
    assert installed == nanomolmo2.__version__


def test_only_the_package_is_installed() -> None:
    """The root folder `models` is for checkouts: its name is too common for site-packages."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert setuptools["setuptools"]["packages"]["find"] == {"include": ["nanomolmo2*"]}


def test_ci_runs_what_people_run() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text(encoding="utf-8")


def test_make_refuses_an_interpreter_that_is_not_there(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "demo", "PYTHON=python0.0", f"VENV={tmp_path}/venv"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "python0.0 does not run or is older than 3.11" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_folders_of_tests_are_packages() -> None:
    """Two files of one name are refused otherwise, in the process that happens to read both."""
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(folders) > 5
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []
