"""axe-core, the checker of accessibility: fetched once, kept outside of the project."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nanomolmo2.files import atomic_path

if TYPE_CHECKING:
    from playwright.sync_api import Page

VERSION = "4.10.3"
DIGEST = "880970c081707360e64f34cea25ff91892f5bc95675b0776925b9709dd8a68bb"  # of axe.min.js
SERIOUS = ("serious", "critical")


def axe_source() -> str:
    """The script, from AXE_CORE (a file), the cache or npm; skips the test where none has it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept = Path(os.environ.get("AXE_CORE") or cache / "nanomolmo2-tests" / f"axe-{VERSION}.min.js")
    if not kept.is_file():
        if shutil.which("npm") is None:
            pytest.skip(f"axe-core is not at {kept}, and there is no npm to fetch it with")
        _fetch(kept)
    content = kept.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    assert found == DIGEST, f"{kept} is not axe-core {VERSION}: delete it"
    return content.decode("utf-8")


def _fetch(path: Path) -> None:
    command = ["npm", "pack", "--silent", "--fetch-retries=0", f"axe-core@{VERSION}"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=60, check=True
            )
        except subprocess.TimeoutExpired:
            pytest.skip("npm could not fetch axe-core within a minute")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"npm could not fetch axe-core: {error.stderr.strip()[-200:]}")
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            member = archive.extractfile("package/axe.min.js")
            assert member is not None
            with atomic_path(path) as temporary:  # other processes fetch it too
                temporary.write_bytes(member.read())


def serious_findings(page: Page, source: str) -> list[dict[str, Any]]:
    """What axe-core finds serious or critical: rule, help and the elements, one dict a finding."""
    page.evaluate(source)
    found = page.evaluate("axe.run(document, { resultTypes: ['violations', 'incomplete'] })")
    assert len(found["passes"]) > 10  # it has looked
    return [
        {
            "rule": one["id"],
            "help": one["help"],
            "at": [node["html"][:120] for node in one["nodes"]],
        }
        for one in found["violations"]
        if one["impact"] in SERIOUS
    ]
