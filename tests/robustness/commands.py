"""Commands on what is hostile: what `ask`, `inspect`, `info`, `export`, `quantize` print and leave.

They run in this process, so that one takes a few hundredths of a second.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from PIL import Image

from tests.robustness import checkpoints, records, texts
from tests.robustness.judge import SECRET, Case, Surroundings, has_codes
from tests.robustness.mutate import ODD_NAMES

Printed = tuple[int, str, str]  # exit code, stdout, stderr


def run(*arguments: str) -> Printed:
    from nanomolmo2.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()


def check(printed: Printed) -> str | None:
    """Nothing that a terminal obeys, and of a failure one sentence."""
    code, out, err = printed
    for name, text in (("stdout", out), ("stderr", err)):
        if has_codes(text):
            return f"codes on {name}: {text[-300:]!r}"
        if SECRET[:8] in text:
            return f"content of a file outside on {name}: {text[-300:]!r}"
    if "Traceback" in err or "(unexpected; --debug" in err:
        return f"failed without a sentence of its own: {err[-400:]!r}"
    if code not in (0, 1, 2):
        return f"ended with code {code}"
    if code == 2 or (code and not out):
        lines = err.strip().splitlines()
        if not lines or not lines[-1].startswith("nanomolmo2: "):
            return f"ended with code {code} and said {err[-300:]!r}"
    return None


def check_json(printed: Printed) -> str | None:
    if printed[0] == 0:
        json.loads(printed[1])
    return check(printed)


def make(rng: random.Random, here: Path, around: Surroundings) -> Case:
    return rng.choice((_ask, _ask, _inspect, _inspect, _info, _converted))(rng, here, around)


def _ask(rng: random.Random, here: Path, around: Surroundings) -> Case:
    """A model that says something forged, about a picture of an odd name."""
    from nanomolmo2.generation.pipeline import Pipeline
    from tests.small_model import ScriptedModel

    said = texts.answer(rng)[:300].encode("utf-8", "ignore").decode()
    name = rng.choice(ODD_NAMES) if rng.random() < 0.3 else "a.png"
    path = here / name
    Image.new("RGB", (40, 30), "green").save(path, "PNG")
    wants_json, draws = rng.random() < 0.4, rng.random() < 0.4
    options = ["--json"] * wants_json + ["--draw", str(here / "out.png")] * draws

    def call() -> Printed:
        model = ScriptedModel(said)
        pipeline = Pipeline(model, model.processor)
        with mock.patch("nanomolmo2.cli.ask.load_pipeline", lambda *a, **k: pipeline):
            return run("ask", str(path), "Where?", "--max-new-tokens", "64", *options)

    of = check_json if wants_json else check
    return Case(f"ask {name!r} {said[:40]!r}", call, of, watched=False)


def _inspect(rng: random.Random, here: Path, around: Surroundings) -> Case:
    place = here / "data"
    path = records.some_file(rng, place, around)[0]
    options = rng.choice(([], ["--audit"], ["--json"], ["--audit", "--json"]))
    call = lambda: run("inspect", str(path), *options)  # noqa: E731
    return Case(f"inspect {' '.join(options)}", call, check, watched=False)


def _info(rng: random.Random, here: Path, around: Surroundings) -> Case:
    folder, what = checkpoints.some_folder(rng, here, around)
    return Case(f"info, {what}", lambda: run("info", str(folder)), check, watched=False)


def _converted(rng: random.Random, here: Path, around: Surroundings) -> Case:
    """A failed export or quantisation leaves nothing; one that is done can be read."""
    folder, what = checkpoints.some_folder(rng, here, around)
    command = rng.choice(("export", "quantize"))
    out = rng.choice(
        (here / "out", here / "out", folder, here / "link", here / "model" / "." / "x")
    )
    if out == here / "link":
        out.symlink_to(folder)
    before = sorted(path.name for path in folder.iterdir())

    def of(printed: Printed) -> str | None:
        if printed[0] and out.name == "out" and out.exists():
            return f"failed and left {[path.name for path in out.iterdir()]}"
        left = [path.name for path in here.iterdir() if "tmp" in path.name]
        if left:
            return f"left {left}"
        if out in (folder, here / "link"):
            if printed[0] == 0:
                return "wrote over what it read"
            if sorted(path.name for path in folder.iterdir()) != before:
                return "changed what it read"
        return check(printed)

    return Case(
        f"{command}, {what}", lambda: run(command, str(folder), str(out)), of, watched=False
    )


FOUND: dict[str, Callable[[Path, Surroundings], Case]] = {}
