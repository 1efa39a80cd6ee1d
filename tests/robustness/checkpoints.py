"""Checkpoints: folders of models and of trainings, spoilt -> `load`, `Checkpoints.newest`."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from tests.robustness.judge import Case, Planted, Surroundings
from tests.robustness.mutate import flip, hostile_values, some_bytes, some_json

# One place for folders that are copied for every input.
_TEMPLATES: dict[str, Path] = {}


def template(name: str, around: Surroundings, build: Callable[[Path], None]) -> Path:
    path = around.root / f"template-{name}"
    if name not in _TEMPLATES:
        build(path)
        _TEMPLATES[name] = path
    return path


@lru_cache(maxsize=2)
def tiny_model(seed: int = 0) -> Any:
    """A model so small that a folder of it is 60 kB, and its processor."""
    from nanomolmo2.models import NanoMolmo2
    from tests.small_model import small_config, small_processor

    processor = small_processor()
    config = small_config(processor)
    vision = replace(
        config.vision_config, hidden_size=16, intermediate_size=16, num_hidden_layers=1
    )
    connector = replace(config.connector, vision_dim=16, llm_dim=16, intermediate_size=16)
    llm = replace(
        config.llm_config, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8
    )
    config = replace(config, vision_config=vision, connector_config=connector, llm_config=llm)
    torch.manual_seed(seed)
    return NanoMolmo2(config).eval(), processor


def write_model(folder: Path, *, shards: bool = False, quantized: bool = False) -> None:
    model, processor = tiny_model()
    if quantized:
        from nanomolmo2.accelerate import quantize

        model = quantize(copy.deepcopy(model), "int8")
    model.save_pretrained(folder, processor=processor, max_shard_size=30_000 if shards else "5GB")


def write_cache(folder: Path) -> None:
    from nanomolmo2.convert.tensor_files import write_cache

    folder.mkdir()
    llm = tiny_model()[0].llm
    write_cache(
        folder / "llm.pt",
        component="llm",
        config=llm.config.to_dict(),
        source={"repo": "a/b", "revision": "0" * 40},
        state_dict=llm.state_dict(),
    )


def write_training(folder: Path) -> None:
    """Two checkpoints of a training, of other weights."""
    from nanomolmo2.training.checkpoint import Checkpoints, Position
    from tests.robustness.kills import optimizers, toy

    for step in (3, 6):
        net = toy(step)
        Checkpoints(folder).save(
            Position(0, step, step, {"drawn": step}, {"loss": 1.5, "count": 2}, 0.5),
            net,
            optimizers(net),
        )


def make(rng: random.Random, here: Path, around: Surroundings) -> Case:
    draw = rng.random()
    if draw < 0.25:
        return _training(rng, here, around)
    if draw < 0.35:
        return _cache_file(rng, here, around)
    folder, what = some_folder(rng, here, around)
    # The hub's cache is full of links, so they are followed; what they lead to is not quoted.
    closed = not what.endswith("link")
    kind, name = what.partition(",")[0], str(folder)
    if kind in ("plain", "shards", "int8"):
        return Case(what, lambda: load_model(name), check_model, (name,), closed)
    return Case(what, lambda: _READERS[kind](name), names=(name,), closed=closed)


def some_folder(rng: random.Random, here: Path, around: Surroundings) -> tuple[Path, str]:
    """A spoilt folder of a model, or a part of one, and what was done to it."""
    kind = rng.choice(("plain", "plain", "shards", "int8", "molmo2", "llm", "vision", "lora"))
    folder = here / "model"
    shutil.copytree(template(kind, around, _WRITERS[kind]), folder)
    return folder, f"{kind}, {_spoil(rng, folder, around)}"


def _write_part(folder: Path, kind: str) -> None:
    """In the format of its reference."""
    from nanomolmo2.convert.pretrained import save_pretrained
    from nanomolmo2.models import LanguageModel, VisionEncoder

    config = tiny_model()[0].config
    # In a model they differ at their ends from what the references have.
    if kind == "llm":
        part = LanguageModel(replace(config.llm_config, additional_vocab_size=0))
    else:
        part = VisionEncoder(config.vision_config)
    save_pretrained(part, folder)


def _write_molmo2(folder: Path) -> None:
    from tests.convert.molmo2_checkpoint import write_checkpoint

    folder.mkdir()
    write_checkpoint(folder)


def _write_lora(folder: Path) -> None:
    from nanomolmo2.training.lora import add_lora, save_lora

    folder.mkdir()
    llm = copy.deepcopy(tiny_model()[0].llm)
    save_lora(add_lora(llm), folder)


def _read_lora(folder: str) -> Any:
    from nanomolmo2.training.lora import load_lora

    return load_lora(copy.deepcopy(tiny_model()[0].llm), folder)


def _read_molmo2(folder: str) -> Any:
    from nanomolmo2.convert.pretrained import load_nanomolmo2

    return load_nanomolmo2(folder)


def _read_llm(folder: str) -> Any:
    from nanomolmo2.convert.pretrained import load_language_model

    return load_language_model(folder)


def _read_vision(folder: str) -> Any:
    from nanomolmo2.convert.pretrained import load_vision_encoder

    return load_vision_encoder(folder)


_READERS: dict[str, Callable[[str], Any]] = {
    "molmo2": _read_molmo2,
    "llm": _read_llm,
    "vision": _read_vision,
    "lora": _read_lora,
}
_WRITERS: dict[str, Callable[[Path], None]] = {
    "plain": lambda folder: write_model(folder),
    "shards": lambda folder: write_model(folder, shards=True),
    "int8": lambda folder: write_model(folder, quantized=True),
    "molmo2": _write_molmo2,
    "llm": lambda folder: _write_part(folder, "llm"),
    "vision": lambda folder: _write_part(folder, "vision"),
    "lora": _write_lora,
}


def load_model(folder: str) -> Any:
    from nanomolmo2.convert.pretrained import load

    return load(folder)


def check_model(loaded: Any) -> str | None:
    """What loads can be used, or says why not."""
    from nanomolmo2.generation.pipeline import Pipeline

    model, processor = loaded
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            return f"{name} was left without weights"
    try:
        Pipeline(model, processor).ask(None, "Is it?", max_new_tokens=1)
    except (ValueError, OSError) as error:
        from tests.robustness.judge import problems_of

        return "; ".join(problems_of(error)) or None
    return None


def _spoil(rng: random.Random, folder: Path, around: Surroundings) -> str:
    """Change one file of a model's folder. Returns: which."""
    files = sorted(path for path in folder.iterdir() if path.name != "README.md")
    weights = [1 + 2 * (path.suffix == ".json") for path in files]
    path = rng.choices(files, weights)[0]
    what = rng.random()
    if what < 0.04:
        path.unlink()
        odd = rng.randrange(5)
        if odd == 0:
            os.mkfifo(path)
        elif odd == 1:
            path.symlink_to(around.outside / "secret.json")
        elif odd == 2:
            path.symlink_to("/dev/zero")
        elif odd == 3:
            path.mkdir()
        return f"{path.name} is {('a pipe', 'a link', 'a device', 'a folder', 'gone')[odd]}"
    if what < 0.08:
        path.write_bytes(rng.choice(_replacements(str(around.marker))))
        return f"{path.name} replaced"
    if path.suffix == ".json" and what < 0.8:
        value = json.loads(path.read_text())
        if path.name == "tokenizer.json":
            value = _spoilt_tokenizer(rng, value)
        else:
            value = some_json(rng, value, _hostile)
        path.write_text(json.dumps(value))
    elif path.suffix == ".safetensors" and what < 0.7:
        path.write_bytes(spoilt_header(rng, path.read_bytes()))
    else:
        others = [file.read_bytes()[:2000] for file in files if file.is_file()]
        path.write_bytes(some_bytes(rng, path.read_bytes(), others))
    return path.name


def _hostile(rng: random.Random) -> Any:
    if rng.random() < 0.4:
        return hostile_values(rng)
    return rng.choice(
        [
            *(0, -1, 1, 2, 3, 7, 10**9, 3 * 10**8, 1 << 62, 1 << 64, 10**30, 0.1, 1e30, True, None),
            *("", "x", "model.safetensors", "../model.safetensors", "/dev/zero", "config.json"),
            *("../outside/secret.json", "model-00001-of-00002.safetensors", "nanomolmo2", "molmo2"),
            *([], {}, [0], [10**9], ["full_attention"] * 3, [0.5, 0.5, 0.5], [0, 0, 0], "float32"),
            *(
                {"rope_type": "yarn", "factor": 1e9},
                list(range(500)),
                {"mode": "int4"},
                "int4",
                "\0",
            ),
        ]
    )


def _spoilt_tokenizer(rng: random.Random, value: dict[str, Any]) -> Any:
    """Its parts, not its vocabulary of hundreds of entries."""
    small = {key: part for key, part in value.items() if key != "model"}
    model = dict(value["model"])
    if rng.random() < 0.5:
        changed = some_json(rng, small, _hostile)
        return {**changed, "model": model} if isinstance(changed, dict) else changed
    if rng.random() < 0.5:
        value[rng.choice(("normalizer", "pre_tokenizer", "decoder", "post_processor"))] = (
            rng.choice(
                [
                    {"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": "x" * 1000},
                    {"type": "Replace", "pattern": {"Regex": "("}, "content": ""},
                    {"type": "Replace", "pattern": {"Regex": ""}, "content": "xy"},
                    {"type": "Replace", "pattern": {"String": ""}, "content": "xy"},
                    {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 10**6},
                    {"type": "Prepend", "prepend": "y" * 10**6},
                    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
                    {"type": "Precompiled", "precompiled_charsmap": ""},
                    {
                        "type": "Split",
                        "pattern": {"Regex": "(?:)"},
                        "behavior": "Isolated",
                        "invert": True,
                    },
                    {"type": "Sequence", "normalizers": [{"type": "NFKC"}] * 9},
                    {"type": "Sequence", "pretokenizers": []},
                    {
                        "type": "Sequence",
                        "decoders": [{"type": "Strip", "content": "a", "start": 10**9, "stop": 1}],
                    },
                    {
                        "type": "ByteLevel",
                        "add_prefix_space": True,
                        "trim_offsets": True,
                        "use_regex": True,
                    },
                    {
                        "type": "Metaspace",
                        "replacement": "",
                        "prepend_scheme": "always",
                        "split": True,
                    },
                    {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
                    {"type": "FixedLength", "length": 0},
                    {"type": "Digits", "individual_digits": True},
                    {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
                    {"type": "WordPiece", "prefix": "", "cleanup": True},
                ]
            )
        )
        return value
    vocabulary = model.get("vocab")
    entries = list(vocabulary.items() if isinstance(vocabulary, dict) else vocabulary or [])
    few = entries[: rng.choice((0, 1, 300))]
    model["vocab"] = few if isinstance(vocabulary, list) else dict(few)
    if rng.random() < 0.6:
        model = {
            **some_json(rng, {k: v for k, v in model.items() if k != "vocab"}, _hostile),
            "vocab": vocabulary,
        }
    model["type"] = rng.choice((model.get("type"), "BPE", "WordPiece", "WordLevel", "Unigram", "x"))
    return {**value, "model": model}


def spoilt_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header says something else."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    what = rng.random()
    if what < 0.6:
        header = some_json(rng, header, _hostile)
        text = json.dumps(header).encode()
    elif what < 0.8:
        text = some_bytes(rng, data[8 : 8 + length], [b"{" * 5000, b'{"a":' * 5000])
    else:
        text = data[8 : 8 + length]
        lengths = (0, 1, length - 1, length + 1, 99_000_000, 100_000_001, (1 << 63), (1 << 64) - 1)
        return struct.pack("<Q", rng.choice(lengths)) + text + body
    return struct.pack("<Q", len(text)) + text + body


def _replacements(marker: str) -> list[bytes]:
    stream = io.BytesIO()
    torch.save({"format": "nanomolmo2", "a": Planted(marker)}, stream)
    return [
        *(b"", b"\0" * 100, b"null", b"[]", b"{}", b'"x"', b"1", b"NaN", b"[" * 100_000),
        *(b'{"a":' * 50_000, "{}".encode("utf-16"), b"\xff\xfe", b"\xef\xbb\xbf{}", b"9" * 100_000),
        *(
            pickle.dumps(Planted(marker)),
            stream.getvalue(),
            b"version https://git-lfs.github.com/x",
        ),
        *(b'{"__metadata__": {}}', struct.pack("<Q", 2) + b"{}", b"<html>not found</html>"),
    ]


# ---- the .pt files ----


def _cache_file(rng: random.Random, here: Path, around: Surroundings) -> Case:
    source = template("cache", around, write_cache)
    folder = here / "cache"
    shutil.copytree(source, folder)
    path = folder / "llm.pt"
    what = rng.random()
    if what < 0.5:
        path.write_bytes(some_bytes(rng, path.read_bytes(), [b"PK\x03\x04" * 9]))
        name = "bytes"
    elif what < 0.75:
        path.write_bytes(spoilt_zip(rng, path.read_bytes(), str(around.marker)))
        name = "a part of it"
    else:
        path.write_bytes(_odd_payload(rng, str(around.marker)))
        name = "payload"
    if rng.random() < 0.7:
        for record in folder.glob("*.json"):
            record.unlink()

    def call() -> Any:
        from nanomolmo2.convert.pretrained import load_language_model

        return load_language_model(str(path))

    return Case(f".pt, {name}", call, names=(str(path),), closed=True)


def spoilt_zip(rng: random.Random, data: bytes, marker: str) -> bytes:
    """Another pickle, or other bytes, inside of a right archive."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith("data.pkl"):
                content = rng.choice(
                    (
                        pickle.dumps(Planted(marker), protocol=2),
                        some_bytes(rng, content, [b"\x80\x02}"]),
                    )
                )
            elif rng.random() < 0.1:
                content = some_bytes(rng, content, [])
            if rng.random() < 0.95:
                new.writestr(info.filename, content)
    return out.getvalue()


def _odd_payload(rng: random.Random, marker: str) -> bytes:
    """What torch writes and reads, and is no model."""
    llm = tiny_model()[0].llm
    payload: dict[Any, Any] = {
        "format": "nanomolmo2",
        "format_version": 1,
        "component": "llm",
        "config": llm.config.to_dict(),
        "source": {"repo": "a/b", "revision": "0" * 40},
        "state_dict": dict(llm.state_dict()),
    }
    name = rng.choice(list(payload["state_dict"]))
    shape = payload["state_dict"][name].shape
    what = rng.randrange(8)
    if what == 0:
        payload["state_dict"][name] = torch.zeros(1).expand(shape)
    elif what == 1:
        payload["state_dict"][name] = torch.zeros(1).as_strided((1 << 20, 1 << 20), (0, 0))
    elif what == 2:
        payload["state_dict"][name] = rng.choice(
            (torch.zeros(shape).to_sparse(), torch.zeros(shape, dtype=torch.complex64), "x", None)
        )
    elif what == 3:
        payload["state_dict"][name] = torch.zeros(shape, device="meta")
    elif what == 4:
        payload["state_dict"][rng.choice((5, None, "x" * 5000, "\x1b[2J"))] = torch.zeros(3)
    elif what == 5:
        payload["config"] = some_json(rng, payload["config"], _hostile)
    elif what == 6:
        payload[rng.choice(list(payload))] = rng.choice(("x", 5, [], {}, None, "\x1b[2J" * 200))
    else:
        payload["state_dict"][name] = Planted(marker)
    stream = io.BytesIO()
    torch.save(payload, stream)
    return stream.getvalue()


# ---- checkpoints of a training ----


def _training(rng: random.Random, here: Path, around: Surroundings) -> Case:
    """The newest is spoilt: it is refused and the one before taken, or it is what was written."""
    folder = here / "run"
    shutil.copytree(template("training", around, write_training), folder)
    newest = folder / "checkpoints" / "000000006"
    about = newest / "about.json"
    what = rng.random()
    if what < 0.4:
        about.write_bytes(flip(rng, about.read_bytes()))
        name = "flips in about.json"
    elif what < 0.6:
        about.write_text(json.dumps(some_json(rng, json.loads(about.read_text()), _hostile)))
        name = "about.json"
    elif what < 0.7:
        about.write_bytes(rng.choice(_replacements(str(around.marker))))
        name = "about.json replaced"
    elif what < 0.85:
        file = newest / "checkpoint.pt"
        file.write_bytes(some_bytes(rng, file.read_bytes(), [about.read_bytes()]))
        name = "checkpoint.pt"
    else:
        name = _odd_file(rng, newest, around)
    return Case(
        f"training, {name}", lambda: resume(folder), check_resumed, (str(folder),), closed=True
    )


def _odd_file(rng: random.Random, newest: Path, around: Surroundings) -> str:
    path = newest / rng.choice(("about.json", "checkpoint.pt"))
    path.unlink()
    odd = rng.randrange(4)
    if odd == 0:
        os.mkfifo(path)
    elif odd == 1:
        path.symlink_to("/dev/zero")
    elif odd == 2:
        path.mkdir()
    return f"{path.name} is {('a pipe', 'a device', 'a folder', 'gone')[odd]}"


def resume(run: Path) -> Any:
    """(position, net, moments) as a resumed training gets them."""
    from nanomolmo2.training.checkpoint import Checkpoints
    from tests.robustness.kills import optimizers, toy

    state = random.getstate()
    net = toy(99)
    moments = optimizers(net)
    checkpoints = Checkpoints(run)
    try:
        position = checkpoints.newest()
        if position is not None:
            checkpoints.restore(position, net, moments)
    finally:
        random.setstate(state)
    return position, net, moments


def check_resumed(found: Any) -> str | None:
    from nanomolmo2.training.checkpoint import Position
    from tests.robustness.kills import toy

    position, net, _ = found
    expected = {
        step: Position(0, step, step, {"drawn": step}, {"loss": 1.5, "count": 2}, 0.5)
        for step in (3, 6)
    }
    if position is None:
        return "found no checkpoint and would begin anew in silence"
    if repr(position) != repr(expected.get(position.done)):
        return f"goes on from {str(position)[:200]}, which was never written"
    twin = toy(position.done)
    for name, tensor in twin.state_dict().items():
        if not torch.equal(tensor, net.state_dict()[name]):
            return f"{name} of step {position.done} is not what was written"
    return None


# ---- what was once found ----


def _flipped(find: bytes, put: bytes) -> Callable[[Path, Surroundings], Case]:
    def build(here: Path, around: Surroundings) -> Case:
        folder = here / "run"
        shutil.copytree(template("training", around, write_training), folder)
        about = folder / "checkpoints" / "000000006" / "about.json"
        text = about.read_bytes()
        assert find in text
        about.write_bytes(text.replace(find, put, 1))
        return Case("found before", lambda: resume(folder), check_resumed, (str(folder),))

    return build


def _edited(
    file: str, change: Callable[[Any], None], kind: str = "plain"
) -> Callable[[Path, Surroundings], Case]:
    def build(here: Path, around: Surroundings) -> Case:
        folder = here / "model"
        shutil.copytree(template(kind, around, _WRITERS[kind]), folder)
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))
        name = str(folder)
        if kind == "plain":
            return Case("found before", lambda: load_model(name), check_model, (name,))
        return Case("found before", lambda: _READERS[kind](name), names=(name,))

    return build


def _stride_zero(here: Path, around: Surroundings) -> Case:
    path = here / "llm.pt"
    llm = tiny_model()[0].llm
    payload = {
        "format": "nanomolmo2",
        "format_version": 1,
        "component": "llm",
        "config": {**llm.config.to_dict(), "vocab_size": 10**8},
        "source": {},
        "state_dict": {
            **llm.state_dict(),
            "embed_tokens.weight": torch.zeros(1).expand(10**8 + 16, 16),
        },
    }
    torch.save(payload, path)

    def call() -> Any:
        from nanomolmo2.convert.pretrained import load_language_model

        return load_language_model(str(path), dtype="float64")

    return Case("found before", call, names=(str(path),))


FOUND: dict[str, Callable[[Path, Surroundings], Case]] = {
    "another step": _flipped(b'"step": 6', b'"step": 7'),
    "another name of a file": _flipped(b'"sha256": {', b'"sha256": {}, "x": {'),
    "a thousand million image tokens": _edited(
        "processor_config.json", lambda value: value.update(image_tokens=10**9)
    ),
    "a number for the types of layers": _edited(
        "config.json", lambda value: value["llm_config"].update(layer_types=5)
    ),
    "no heads": _edited(
        "config.json", lambda value: value["llm_config"].update(num_attention_heads=0)
    ),
    "rope scaling of 300 million layers": _edited(
        "config.json",
        lambda value: value["text_config"].update(
            rope_scaling={"rope_type": "linear", "factor": 2.0},
            rope_scaling_layers=[1] * 300_000,
            num_hidden_layers=3 * 10**8,
        ),
        "molmo2",
    ),
    "a tensor of stride 0": _stride_zero,
}
