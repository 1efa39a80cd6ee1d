"""Downloads against a hub on this machine: check, resume, convert, and say what went wrong."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from rich.console import Console
from safetensors import SafetensorError

from nanomolmo2.convert import hub as hub_module
from nanomolmo2.convert.hub import download, fetch
from nanomolmo2.models import LanguageModel, NanoMolmo2, VisionEncoder
from tests.convert.checkpoints import LLM, VISION, edit_json, make_nanomolmo2, make_qwen3
from tests.convert.fake_hub import COMMIT, FakeHub
from tests.convert.test_pretrained import assert_same_bits

ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def no_bars() -> Iterator[None]:
    disable_progress_bars()
    yield
    enable_progress_bars()


def weight_requests(hub: FakeHub) -> list[tuple[str | None, int]]:
    """(Range header, status) of every request for the content of a weight file."""
    return [
        (wanted, status)
        for method, path, wanted, status in hub.sent
        if method == "GET" and "/resolve/" in path and path.endswith(".safetensors")
    ]


# ---- download and convert ----


def test_download_makes_the_cache_files(fake_hub: FakeHub, tmp_path: Path) -> None:
    cache = tmp_path / "checkpoints"
    paths = download(cache_dir=cache, console=QUIET)
    assert [p.name for p in paths] == ["siglip2_so400m_384.pt", "qwen3_0.6b_base.pt"]
    assert sorted(p.name for p in cache.iterdir()) == [
        "qwen3_0.6b_base",
        "qwen3_0.6b_base.json",
        "qwen3_0.6b_base.pt",
        "siglip2_so400m_384",
        "siglip2_so400m_384.json",
        "siglip2_so400m_384.pt",
    ]
    record = json.loads((cache / "qwen3_0.6b_base.json").read_text())
    data = paths[1].read_bytes()
    assert record["size"] == len(data)
    assert record["sha256"] == hashlib.sha256(data).hexdigest()
    source = torch.load(paths[1], weights_only=True)["source"]
    assert source == record["source"]
    assert (source["repo"], source["revision"]) == ("Qwen/Qwen3-0.6B-Base", "main")
    assert source["commit"] == COMMIT
    folder = fake_hub.repositories["Qwen/Qwen3-0.6B-Base"]
    shards = sorted(folder.glob("*.safetensors"))
    for shard in shards:
        content = shard.read_bytes()
        assert source["files"][shard.name] == {
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    assert len(source["files"]) == len(shards) + 2  # config.json and the index

    asked = len(fake_hub.sent)
    vision = VisionEncoder.from_pretrained(cache_dir=cache)
    llm = LanguageModel.from_pretrained("Qwen/Qwen3-0.6B-Base", cache_dir=cache)
    assert len(fake_hub.sent) == asked  # loading does not ask the hub
    assert {p.dtype for p in vision.parameters()} == {torch.float32}
    assert {p.dtype for p in llm.parameters()} == {torch.bfloat16}
    assert_same_bits(llm, LanguageModel.from_pretrained(folder))
    siglip = fake_hub.repositories["google/siglip2-so400m-patch14-384"]
    assert_same_bits(vision, VisionEncoder.from_pretrained(siglip))


def test_intact_files_are_kept_and_damaged_ones_made_again(
    fake_hub: FakeHub, tmp_path: Path
) -> None:
    (path,) = download(["llm"], tmp_path, console=QUIET)
    content, asked = path.read_bytes(), len(fake_hub.sent)
    made = path.stat().st_mtime_ns
    download(["llm"], tmp_path, console=QUIET)
    assert (path.stat().st_mtime_ns, len(fake_hub.sent)) == (made, asked)

    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # same size, another sha256
    download(["llm"], tmp_path, console=QUIET)
    assert path.read_bytes() == content

    made = path.stat().st_mtime_ns
    download(["llm"], tmp_path, force=True, console=QUIET)
    assert path.stat().st_mtime_ns != made
    assert path.read_bytes() == content


def test_download_writes_the_same_weights_as_safetensors(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each folder stands for its ``.pt`` file, is kept while it is whole, and is made from that."""
    paths = download(cache_dir=tmp_path, console=QUIET)
    folders = [path.with_suffix("") for path in paths]
    for folder in folders:
        assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    made = [(folder / "model.safetensors").stat().st_mtime_ns for folder in folders]
    vision = VisionEncoder.from_pretrained(cache_dir=tmp_path)
    llm = LanguageModel.from_pretrained(cache_dir=tmp_path)
    assert_same_bits(vision, VisionEncoder.from_pretrained(folders[0]))
    assert_same_bits(llm, LanguageModel.from_pretrained(folders[1]))
    asked = len(fake_hub.sent)
    download(cache_dir=tmp_path, console=QUIET)
    assert made == [(folder / "model.safetensors").stat().st_mtime_ns for folder in folders]

    content = (folders[1] / "model.safetensors").read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    for damaged in (content[:-10], flipped):
        (folders[1] / "model.safetensors").write_bytes(damaged)
        download(["llm"], tmp_path, console=QUIET)
        assert (folders[1] / "model.safetensors").read_bytes() == content
    shutil.rmtree(folders[1])
    with monkeypatch.context() as patch:
        patch.setattr("nanomolmo2.convert.tensor_writer.save_file", _no_space)
        with pytest.raises(OSError, match=r"could not write .*qwen3.*No space.*is the disk full"):
            download(["llm"], tmp_path, console=QUIET)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".") or p == folders[1]]
    download(["llm"], tmp_path, console=QUIET)
    assert (folders[1] / "model.safetensors").read_bytes() == content

    for path in paths:
        path.unlink()
    assert_same_bits(vision, VisionEncoder.from_pretrained(cache_dir=tmp_path))
    assert_same_bits(llm, LanguageModel.from_pretrained(cache_dir=tmp_path))
    assert len(fake_hub.sent) == asked  # all of this without the hub
    edit_json(folders[1] / "config.json", max_position_embeddings=1024)
    with pytest.raises(ValueError, match=r"qwen3_0\.6b_base holds another model than llm of Qwen"):
        LanguageModel.from_pretrained(cache_dir=tmp_path)


def _no_space(*_: object, **__: object) -> None:
    raise SafetensorError("No space left on device")


def test_another_revision_is_another_file(fake_hub: FakeHub, tmp_path: Path) -> None:
    (path,) = download(["llm"], tmp_path, console=QUIET)
    made = path.stat().st_mtime_ns
    download(["llm"], tmp_path, revision=COMMIT, console=QUIET)  # the same commit by its name
    assert path.stat().st_mtime_ns == made
    with pytest.raises(ValueError, match="has no revision 'v9'"):
        download(["llm"], tmp_path, revision="v9", console=QUIET)
    with pytest.raises(ValueError, match="has no revision 'v9'"):
        LanguageModel.from_pretrained(cache_dir=tmp_path, revision="v9")
    with pytest.raises(ValueError, match="can not be meant for 2 repositories"):
        download(cache_dir=tmp_path, revision="main", console=QUIET)
    with pytest.raises(ValueError, match="can not be meant for two repositories"):
        NanoMolmo2.from_pretrained(revision="main")


def test_unknown_part(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown part.*choose from vision, llm"):
        download(["audio"], tmp_path)


# ---- interruptions and damage ----


def test_interrupted_download_goes_on(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process was killed half way; the library alone would start the file again."""

    class Killed(BaseException):
        pass

    def update_then_die(bar: object, count: float = 1) -> None:
        raise Killed

    repository = "google/siglip2-so400m-patch14-384"
    fake_hub.cut_after = 40_000
    with monkeypatch.context() as patch:
        patch.setattr(hub_module._Bar, "update", update_then_die)
        patch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 20_000)
        with pytest.raises(Killed):
            fetch(repository)
    (partial,) = (tmp_path / "hf").rglob("*.incomplete")
    partial.write_bytes(
        (fake_hub.repositories[repository] / "model.safetensors").read_bytes()[:30_000]
    )
    fake_hub.sent.clear()
    fake_hub.cut_after = None
    fetch(repository)
    assert weight_requests(fake_hub) == [("bytes=30000-", 206)]
    assert not list((tmp_path / "hf").rglob("*.incomplete"))
    folder = fake_hub.repositories[repository]
    loaded = VisionEncoder.from_pretrained(cache_dir=None)
    assert_same_bits(loaded, VisionEncoder.from_pretrained(folder))
    assert len(weight_requests(fake_hub)) == 1  # it came from the Hugging Face cache


def test_dropped_connection_is_taken_up(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 20_000)
    fake_hub.cut_after = 50_000
    download(["vision"], tmp_path, console=QUIET)
    first, second = weight_requests(fake_hub)
    assert first == (None, 200)
    assert second[1] == 206
    assert second[0] in ("bytes=20000-", "bytes=40000-")  # whole chunks before the cut


def test_damaged_download_does_not_enter_the_cache(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.tamper = True
    with pytest.raises(ValueError, match=r"arrived damaged: sha256 .* expected .*run it again"):
        download(["vision"], tmp_path / "checkpoints", console=QUIET)
    assert not (tmp_path / "checkpoints").exists()
    assert not [p for p in (tmp_path / "hf").rglob("*") if p.is_file() and p.stat().st_size > 9999]
    fake_hub.tamper = False
    download(["vision"], tmp_path / "checkpoints", console=QUIET)


def test_damage_in_the_hugging_face_cache_is_found(fake_hub: FakeHub, tmp_path: Path) -> None:
    folder = fetch("google/siglip2-so400m-patch14-384").directory
    blob = (folder / "model.safetensors").resolve()
    content = blob.read_bytes()
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged.*it was removed"):
        download(["vision"], tmp_path / "checkpoints", console=QUIET)
    download(["vision"], tmp_path / "checkpoints", console=QUIET)  # as the message says


def test_a_mirror_with_another_model(fake_hub: FakeHub, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(fake_hub.repositories["Qwen/Qwen3-0.6B-Base"], other)
    edit_json(other / "config.json", max_position_embeddings=1024)
    fake_hub.repositories["Qwen/Qwen3-0.6B-Base"] = other
    with pytest.raises(ValueError, match="max_position_embeddings is 1024, expected 512"):
        download(["llm"], tmp_path / "checkpoints", console=QUIET)
    assert not (tmp_path / "checkpoints").exists()


def test_full_disk(fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(payload: object, stream: BinaryIO) -> None:
        stream.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/7\nmore")

    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(OSError, match=r"could not write .*qwen3.*data/7\): is the disk full\?"):
        download(["llm"], tmp_path / "checkpoints", console=QUIET)
    assert not list((tmp_path / "checkpoints").iterdir())


# ---- straight from the hub ----


def test_cache_dir_none_never_touches_the_cache(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "qwen3_0.6b_base.pt").write_bytes(b"not a cache file")
    llm = LanguageModel.from_pretrained(cache_dir=None)
    assert_same_bits(
        llm, LanguageModel.from_pretrained(fake_hub.repositories["Qwen/Qwen3-0.6B-Base"])
    )
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["qwen3_0.6b_base.pt"]
    with pytest.raises(ValueError, match="not a weight cache"):
        LanguageModel.from_pretrained()


def test_whole_model_is_assembled(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"vocab_size": 151_700, "hidden_size": 8}  # the image token's id is 151655
    make_qwen3(tmp_path / "qwen3", dtype=torch.bfloat16, **sizes)
    fake_hub.repositories["Qwen/Qwen3-0.6B-Base"] = tmp_path / "qwen3"
    model = NanoMolmo2.from_pretrained(cache_dir=tmp_path)
    assert model.config.vision_config == VISION
    assert model.config.llm_config == dataclasses.replace(LLM, **sizes)
    assert_same_bits(model.vision_encoder, VisionEncoder.from_pretrained(cache_dir=None))
    assert_same_bits(model.llm, LanguageModel.from_pretrained(cache_dir=None))
    assert model.vision_encoder.frozen
    assert not any(p.requires_grad for p in model.vision_encoder.parameters())
    assert all(p.requires_grad for p in model.llm.parameters())
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert not list(tmp_path.glob("*.pt"))  # only download() fills the cache
    ids = torch.tensor([[model.config.image_token_id, 3, 4]])
    with torch.no_grad():  # float32 vision and connector meet a bfloat16 decoder
        logits = model(ids, pixel_values=torch.randn(1, 3, 42, 42))
    assert logits.shape == (1, 9 + 2, 151_700)
    assert logits.dtype == torch.bfloat16
    single = NanoMolmo2.from_pretrained(cache_dir=tmp_path, dtype=torch.float16)
    assert {p.dtype for p in single.parameters()} == {torch.float16}


def test_any_repository_by_name(fake_hub: FakeHub, tmp_path: Path) -> None:
    model = make_nanomolmo2()
    model.save_pretrained(tmp_path / "ours")
    make_qwen3(tmp_path / "big", tied=False)
    fake_hub.repositories |= {"me/ours": tmp_path / "ours", "Qwen/Qwen3-8B": tmp_path / "big"}
    assert_same_bits(NanoMolmo2.from_pretrained("me/ours"), model)
    assert LanguageModel.from_pretrained("Qwen/Qwen3-8B").lm_head is not None


def test_a_folder_comes_before_the_hub(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reference = make_qwen3(tmp_path / "Qwen" / "Qwen3-0.6B-Base", vocab_size=50)
    loaded = LanguageModel.from_pretrained("Qwen/Qwen3-0.6B-Base")
    assert loaded.config.vocab_size == reference.config.vocab_size == 50
    assert not fake_hub.sent


# ---- what can go wrong ----


def test_errors_say_what_to_do(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub.gated.add("meta/secret")
    fake_hub.repositories["me/empty"] = ROOT / "tests" / "convert"
    for name, message in (
        ("nobody/nothing", r"no folder nobody/nothing, and on the hub: .* has no repository"),
        ("meta/secret", r"meta/secret is gated: ask for access .*HF_TOKEN"),
        ("me/empty", r"holds no config\.json"),
        ("a/--b..c", "not a repository name"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            NanoMolmo2.from_pretrained(name)
        assert "\n" not in str(caught.value)


def test_no_network(fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch("Qwen/Qwen3-0.6B-Base")
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nowhere)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        nowhere + "/{repo_id}/resolve/{revision}/{filename}",
    )
    with pytest.raises(
        OSError, match=rf"could not get google/.* from {nowhere} .*check the network"
    ):
        download(["vision"], tmp_path, console=QUIET)
    download(["llm"], tmp_path, console=QUIET)  # what was fetched before is still there


def test_offline(fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch("Qwen/Qwen3-0.6B-Base")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(fake_hub.sent)
    with pytest.raises(OSError, match=r"not in the Hugging Face cache .* HF_HUB_OFFLINE is set"):
        download(["vision"], tmp_path, console=QUIET)
    (path,) = download(["llm"], tmp_path, console=QUIET)
    assert json.loads(path.with_suffix(".json").read_text())["source"]["commit"] == COMMIT
    assert len(fake_hub.sent) == asked


# ---- the script, in a process of its own ----


def run_script(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "download_model_weights.py", *arguments],
        cwd=tmp_path,
        env={**kept, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_script_honours_the_environment(fake_hub: FakeHub, tmp_path: Path) -> None:
    """It gets as far as the config, whose sizes are not those of the real model."""
    done = run_script(
        tmp_path, "--llm-only", "--cache-dir", "made", HF_ENDPOINT=fake_hub.url, HF_TOKEN="hf_x"
    )
    assert done.returncode == 1
    assert "error: Qwen/Qwen3-0.6B-Base holds another model" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "home" / "hub" / "models--Qwen--Qwen3-0.6B-Base").is_dir()
    assert not (tmp_path / "made").exists()


def test_script_help_is_quick_and_complete(tmp_path: Path) -> None:
    done = run_script(tmp_path, "--help")
    assert done.returncode == 0
    for option in ("--vision-only", "--llm-only", "--force", "--cache-dir", "--revision"):
        assert option in done.stdout


def test_no_room_for_a_download(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(OSError, match=r"could not write Qwen/.*No space.*set HF_HOME"):
        download(["llm"], tmp_path / "checkpoints", console=QUIET)
    assert not (tmp_path / "checkpoints").exists()
