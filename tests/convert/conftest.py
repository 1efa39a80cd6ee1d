"""A hub for the tests of ``convert``; nothing here needs the network."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanomolmo2.convert import hub as hub_module
from nanomolmo2.convert import pretrained
from tests.convert.checkpoints import LLM, VISION, make_qwen3, make_siglip
from tests.convert.fake_hub import FakeHub


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole SigLIP checkpoint (both towers)."""
    folder = tmp_path_factory.mktemp("siglip")
    make_siglip(folder, whole=True)
    return folder


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Qwen3 checkpoint in bfloat16, in several shards."""
    import torch

    folder = tmp_path_factory.mktemp("qwen3")
    make_qwen3(folder, dtype=torch.bfloat16, max_shard_size="30KB")
    return folder


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two parts have their names and repositories, but the sizes of the test checkpoints."""
    vision = dataclasses.replace(hub_module.VISION, config=VISION)
    llm = dataclasses.replace(hub_module.LLM, config=LLM)
    for module in (hub_module, pretrained):
        monkeypatch.setattr(module, "VISION", vision)
        monkeypatch.setattr(module, "LLM", llm)
    monkeypatch.setattr(hub_module, "PARTS", {"vision": vision, "llm": llm})


@pytest.fixture
def fake_hub(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    siglip_folder: Path,
    qwen3_folder: Path,
    small_parts: None,
) -> Iterator[FakeHub]:
    """A running hub that has the two small checkpoints, and an empty Hugging Face cache."""
    from huggingface_hub import constants

    with FakeHub().running() as hub:
        hub.repositories["google/siglip2-so400m-patch14-384"] = siglip_folder
        hub.repositories["Qwen/Qwen3-0.6B-Base"] = qwen3_folder
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub
