"""Every code block of the documentation runs, or is at least read by what it addresses.

    python    run, block after block of a page, in a folder that looks like a checkout
    bash      `nanomolmo2 ...` is run, training for two steps at most; `make ...` is planned
              (`make -n`), not carried out
    no-run    needs the network or hours: Python is compiled, the flags of commands are checked
    in-order  likewise here; a test of the page runs all of them in one folder
    console   what is typed (behind `$` and `>`) shows what stands below it: tests/cli/test_chat.py

`< FILE` behind a command is its standard input; without it, that is empty.

Pages that load SigLIP 2 and Qwen3 find small random checkpoints under their names instead: two
layers, width 32, on the same 27 x 27 grid and with the same vocabulary.
"""

from __future__ import annotations

import dataclasses
import io
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from nanomolmo2 import accelerate, cli
from nanomolmo2.convert import pretrained
from nanomolmo2.convert.parts import LLM, VISION
from nanomolmo2.convert.tensor_files import write_cache
from nanomolmo2.models import LLMConfig, VisionConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

SMALL_VISION = VisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
)
SMALL_LLM = LLMConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)
# Tools of others, which only blocks that are not run may call.
TOOLS = {
    "curl",
    "git",
    "lmms-eval",
    "pip",
    "pre-commit",
    "pytest",
    "python3",
    "source",
    "torchrun",
    "transformers",
    "vllm",
}


class Block(NamedTuple):
    page: str
    line: int
    language: str
    run: bool
    code: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page.name,
            text[: found.start()].count("\n") + 1,
            found["language"],
            "no-run" not in found["info"] and "in-order" not in found["info"],
            found["code"],
        )
        for found in re.finditer(
            r"^```(?P<language>\w+)(?P<info>.*)\n(?P<code>[\s\S]*?)^```$", text, re.MULTILINE
        )
    ]


BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = [
    pytest.param(block, shlex.split(line, comments=True), id=f"{block.page}:{block.line + n + 1}")
    for block in BLOCKS
    if block.language == "bash"
    for n, line in enumerate(block.code.splitlines())
    if shlex.split(line, comments=True)
]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the checkout's files in it, as working folder."""
    for name in ("nanomolmo2", "models", "scripts", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small_checkpoints(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small random checkpoints in ``checkpoints/``, in place of the downloaded ones."""
    torch.manual_seed(0)
    for name, part, config in (("VISION", VISION, SMALL_VISION), ("LLM", LLM, SMALL_LLM)):
        write_cache(
            checkout / "checkpoints" / part.cache_name,
            component=part.component,
            config=config.to_dict(),
            source={"repo": part.repository},
            state_dict=part.build(config).state_dict(),
        )
        monkeypatch.setattr(pretrained, name, dataclasses.replace(part, config=config))


def test_the_blocks_are_found() -> None:
    assert {"python", "bash"} <= {block.language for block in BLOCKS}
    assert sum(block.run for block in BLOCKS) > len(BLOCKS) / 2


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if any(b.language == "python" for b in blocks(p))],
    ids=lambda p: p.name,
)
def test_python(page: Path, small_checkpoints: None) -> None:
    names: dict[str, Any] = {"__name__": page.name}
    for block in blocks(page):
        if block.language == "python":
            # Line numbers of a traceback are those of the page.
            code = compile("\n" * block.line + block.code, str(page), "exec")
            if block.run:
                exec(code, names)


def run_script(script: list[str], flags: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """As ``python *script *flags``, but in this process: a new one takes seconds to load torch."""
    monkeypatch.setattr(sys, "argv", [script[-1], *flags])
    try:
        if script[0] == "-m":
            runpy.run_module(script[1], run_name="__main__")
        else:
            runpy.run_path(script[0], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize(("block", "words"), COMMANDS)
def test_command(
    block: Block,
    words: list[str],
    checkout: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variables = []
    while re.fullmatch(r"[A-Z0-9_]+=.*", words[0]):
        variables.append(words.pop(0))
    tool, *arguments = words
    tool = tool.removeprefix(".venv/bin/")
    stdin: Any = io.StringIO()
    if "<" in arguments:
        *arguments, _, source = arguments[: arguments.index("<") + 2]
        stdin = open(source, encoding="utf-8") if block.run else stdin  # noqa: SIM115
    monkeypatch.setattr(sys, "stdin", stdin)
    if tool == "nanomolmo2" and block.run:
        if arguments[0] == "train" and "--max-steps" not in arguments:
            arguments += ["--max-steps", "2"]  # the command works: its steps are tested elsewhere
        assert cli.main(arguments) == 0, capsys.readouterr().err
    elif tool == "nanomolmo2":
        cli.parse(arguments)
    elif tool == "make":
        plan = ["make", "-n", *arguments, *variables]
        done = subprocess.run(plan, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout
    elif tool == "python" and re.match(r"(-m benchmarks\.|scripts/)", " ".join(arguments)):
        split = 2 if arguments[0] == "-m" else 1
        script, flags = arguments[:split], arguments[split:]
        assert run_script(script, flags if block.run else ["--help"], monkeypatch) == 0
        said = capsys.readouterr().out
        for flag in flags:
            assert not flag.startswith("--") or flag in said, f"{script[-1]} has no {flag}"
    else:
        assert tool in TOOLS, f"{tool} is not known here"
        assert not block.run, "mark the block `no-run`"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, _ = target.partition("#")
        if path and not re.match(r"https?:", path):
            assert (page.parent / path).exists(), f"{page.name} links to {target}"


def test_the_reading_list_tells_how_long_it_is() -> None:
    """To the hundred, so that not every change of the core is one of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, reading = text.partition("Read these six files in this order, about ")
    told = int(reading.split(" lines")[0].replace(",", ""))
    files = re.findall(r"^\d\. \[`[\w./]+`\]\((nanomolmo2/[\w./]+\.py)\)", reading, re.MULTILINE)
    assert len(files) == 6
    lines = sum(len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in files)
    assert told == round(lines, -2), f"the six files have {lines} lines"


def test_the_walk_through_the_model_stays_in_its_files() -> None:
    """Until its last section: so far the model can be read without anything around it."""
    text = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    walk, heading, _ = text.partition("\n## What lies around the model\n")
    assert heading
    for name in re.findall(r"[\w/]+\.(?:py|md)\b", walk):
        assert re.fullmatch(r"(/?nanomolmo2/)?(batch|models/\w+)\.py", name), name
    for module in re.findall(r"(?:from|import) (nanomolmo2[\w.]*)", walk):
        assert re.fullmatch(r"nanomolmo2(\.batch|\.models(\.\w+)?)?", module), module


def test_the_page_of_acceleration_has_a_row_for_every_function() -> None:
    text = (ROOT / "docs" / "accelerate.md").read_text(encoding="utf-8")
    for name in set(accelerate.__all__) - {"defaults"}:
        assert f"| `{name}` |" in text, name


def test_the_readme_tells_of_every_folder_and_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    folders = {path.parent.name for path in (ROOT / "nanomolmo2").glob("*/__init__.py")}
    for folder in folders - {"models"}:
        assert f"| `{folder}/` |" in text, folder
    for page in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{page.name}" in text, f"no link leads to docs/{page.name}"
