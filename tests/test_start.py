"""How `nanomolmo2 ask` starts and ends: what it does not load, what it leaves out at the end."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCENE = ROOT / "nanomolmo2" / "assets" / "demo" / "scene.png"
QUESTION, ANSWER = "Is there a dog?", "No.\n"

# Each with what is below it. torch loads some of itself that no answer needs; that is its own.
UNNEEDED = {
    *("rich", "huggingface_hub", "transformers", "requests", "httpx", "av", "matplotlib"),
    *("fastapi", "pydantic", "uvicorn", "prompt_toolkit", "numpy.testing", "numpy.ma", "sympy"),
    *("torch._dynamo", "torch._inductor", "torch.onnx", "torch.distributed.fsdp"),
    *("PIL.TiffImagePlugin", "PIL.WebPImagePlugin", "PIL.PdfImagePlugin", "PIL.ImageDraw"),
    *("nanomolmo2.data", "nanomolmo2.training", "nanomolmo2.recipes", "nanomolmo2.evaluation"),
    *("nanomolmo2.emoji", "nanomolmo2.demo", "nanomolmo2.serve"),
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )


def test_ask_loads_what_it_needs_alone() -> None:
    """One module of the command line, no bars, no other formats of pictures, no compiler."""
    code = (
        "import sys\n"
        "from nanomolmo2.cli import main\n"
        f"code = main(['ask', {str(SCENE)!r}, {QUESTION!r}])\n"
        "print('LOADED', code, *sys.modules)"
    )
    answer, _, loaded = run("-c", code).stdout.partition("LOADED ")
    status, *modules = loaded.split()
    assert (answer, status) == (ANSWER, "0")
    found = {m for m in modules if any(m == n or m.startswith(f"{n}.") for n in UNNEEDED)}
    assert not found
    commands = {m for m in modules if m.startswith("nanomolmo2.cli.")}
    shared = {f"nanomolmo2.cli.{name}" for name in ("options", "output", "loading", "answering")}
    assert commands - shared == {"nanomolmo2.cli.ask"}


WITNESS = """
import atexit, gc, sys
from nanomolmo2.__main__ import main

class Witness:
    def __del__(self, print=print):
        print("taken apart")

sys.argv = ["nanomolmo2", *{arguments!r}]
code = main()
print("collects", gc.isenabled(), gc.get_freeze_count() > 100_000)
atexit.register(print, "what else runs at the end")
witness = Witness()
witness.itself = witness
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (
            ["ask", str(SCENE), QUESTION],
            0,
            f"{ANSWER}collects True True\nwhat else runs at the end\n",
        ),
        (["ask", "nothing.png", QUESTION], 1, "collects False False\nwhat else runs at the end\n"),
        (["--version"], 0, "nanomolmo2 0.1.0\ncollects True False\nwhat else runs at the end\n"),
    ],
    ids=["answers", "refuses", "another command"],
)
def test_the_end_skips_the_teardown_alone(arguments: list[str], code: int, said: str) -> None:
    """All that is printed arrives, handlers run, the code is right; garbage is collected again."""
    ended = run("-c", WITNESS.format(arguments=arguments))
    assert ended.returncode == code
    torn_down = "taken apart\n" if arguments == ["--version"] else ""
    assert ended.stdout == said + torn_down


def test_a_full_disk_is_told_at_the_end_too() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "nanomolmo2", "ask", str(SCENE), QUESTION],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            check=False,
        )
    assert ended.returncode == 1
    assert "No space left on device" in ended.stderr


def test_the_command_line_names_its_commands() -> None:
    from nanomolmo2 import cli
    from nanomolmo2.cli.ask import Ask

    assert cli.Ask is Ask
    with pytest.raises(AttributeError, match="no attribute 'Asked'"):
        _ = cli.Asked


def test_a_server_collects_garbage() -> None:
    """`demo --serve` starts like the demo; going on so, a server would keep every cycle."""
    pytest.importorskip("fastapi")
    from nanomolmo2 import VLM
    from nanomolmo2.cli.serve import load_first
    from nanomolmo2.serve.store import ModelStore
    from tests.small_model import small_model, small_processor

    store = ModelStore({"small": lambda: VLM(small_model(), small_processor())})
    gc.disable()
    try:
        load_first(store)
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.enable()
        gc.unfreeze()
        store.close()
