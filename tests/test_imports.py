"""Imports point down only, and the heavy and optional packages stay out of the core.

Reads the source (AST), imports nothing.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

# A part may import the parts of lower layers and itself; parts of one layer do not see each other.
LAYERS = [
    {"files", "remote", "terminal"},
    {"checks"},
    {"config", "batch", "registry"},
    {"models", "processor"},
    {"accelerate"},
    {"convert"},
    {"generation", "data"},
    {"evaluation", "demo"},
    {"training"},
    {"recipes"},
    {"emoji", "serve"},
    {"things"},
    {"cli", "__init__"},
    {"__main__", "scripts"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
# Data meets the model in Batch.
FORBIDDEN = {("data", "models"), ("data", "accelerate"), ("data", "convert")}
# Methods of the nets that end a story elsewhere: from_pretrained, generate, quantize, use_cache.
FACE = "nanomolmo2.models.face"
UPWARD = {(FACE, part) for part in ("accelerate", "convert", "generation")}

CORE = {"torch", "numpy", "PIL", "safetensors", "tokenizers", "huggingface_hub", "tyro", "rich"}
# A whole part that an extra is for may import it anywhere; others import that part in functions.
OF_AN_EXTRA = {"serve": {"fastapi", "pydantic", "starlette", "uvicorn"}}
LIGHT = {
    "cli",
    "__init__",
    "__main__",
    "checks",
    "config",
    "files",
    "remote",
    "terminal",
}  # these load without torch


class Import(NamedTuple):
    """``source`` imports ``module``; ``lazy``: in a function, ``typing``: for types only."""

    source: str  # dotted name, such as nanomolmo2.models.connector
    module: str
    lazy: bool
    typing: bool
    line: int


def imports_of(path: Path) -> list[Import]:
    """Every import of one file, relative ones resolved."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    source = ".".join(parts)
    package = parts[:-1]

    def walk(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(source, alias.name, lazy, typing, child.lineno)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    above = package[: len(package) - child.level + 1]
                    base = ".".join([*above, *([base] if base else [])])
                for alias in child.names:
                    full = f"{base}.{alias.name}"
                    # `from package import module` and `from module import name` look the same.
                    is_module = is_ours(full) and exists(full)
                    yield Import(source, full if is_module else base, lazy, typing, child.lineno)
            else:
                inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                only_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
                yield from walk(child, lazy or inside, typing or only_types)

    return list(walk(ast.parse(path.read_text(encoding="utf-8")), False, False))


def is_ours(module: str) -> bool:
    return module.split(".")[0] in {"nanomolmo2", "models", "scripts"}


def exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def part_of(module: str) -> str:
    """The part of the house that a module belongs to."""
    names = module.split(".")
    if names[0] != "nanomolmo2":
        return names[0]
    return names[1] if len(names) > 1 else "__init__"


# What exports carry for other programs is no part of the package: see convert/test_remote_code.py.
FILES = sorted(
    path
    for folder in ("nanomolmo2", "scripts")
    for path in (ROOT / folder).rglob("*.py")
    if "assets" not in path.parts
)
IMPORTS = [found for path in FILES for found in imports_of(path)]
OF_THE_NETS = [found for found in IMPORTS if part_of(found.source) == "models"]


def describe(found: Import) -> str:
    return f"{found.source.replace('.', '/')}.py:{found.line} imports {found.module}"


def test_the_source_was_found() -> None:
    parts = {part_of(found.source) for found in IMPORTS}
    assert {"models", "accelerate", "generation", "emoji", "recipes", "cli"} <= parts
    assert parts <= set(LEVEL), "a new part of the package needs a place in LAYERS"


def test_imports_point_down_only() -> None:
    wrong = []
    for found in IMPORTS:
        if not is_ours(found.module):
            continue
        source, target = part_of(found.source), part_of(found.module)
        down = source == target or (
            LEVEL[target] < LEVEL[source] and (source, target) not in FORBIDDEN
        )
        listed = (found.lazy or found.typing) and (found.source, target) in UPWARD
        names_only = found.module == "nanomolmo2"  # __version__
        if not (down or listed or names_only or (found.typing and source == "__init__")):
            wrong.append(describe(found))
    assert not wrong, "\n".join(wrong)


def test_every_listed_upward_edge_is_used() -> None:
    """And inside a method, not only for types."""
    used = {(found.source, part_of(found.module)) for found in IMPORTS if found.lazy}
    assert used >= UPWARD


def test_the_nets_import_torch_config_and_batch_only() -> None:
    """Not even inside a function, but for the methods of face.py that lead to other folders: no
    files, no network, no tokenizer, no pictures."""
    allowed = {"torch", *sys.stdlib_module_names} - {"http", "urllib"}
    wrong = [
        describe(found)
        for found in OF_THE_NETS
        if (part_of(found.module) if is_ours(found.module) else found.module.split(".")[0])
        not in {"models", "config", "batch"} | allowed
        and not (
            found.source == FACE
            and (found.lazy or found.typing)
            and (FACE, part_of(found.module)) in UPWARD
        )
    ]
    assert not wrong, "\n".join(wrong)


def test_the_nets_can_be_read_without_their_face() -> None:
    """The face calls the nets, no net calls the face: the package exports it, that is all."""
    wrong = [
        describe(found)
        for found in OF_THE_NETS
        if found.module in {FACE, "nanomolmo2.models.forms"}
        and found.source not in {FACE, "nanomolmo2.models.__init__"}
    ]
    assert not wrong, "\n".join(wrong)


def test_acceleration_sits_on_the_nets_alone() -> None:
    """It exchanges modules of a model, and so knows nothing of files, prompts or training."""
    parts = {
        part_of(found.module)
        for found in IMPORTS
        if part_of(found.source) == "accelerate" and is_ours(found.module)
    }
    assert parts == {"accelerate", "models", "batch"}


def test_only_the_command_line_knows_the_world_of_emoji() -> None:
    """What lies below knows it by name: it must stand without that world."""
    found_in = {part_of(found.source) for found in IMPORTS if part_of(found.module) == "emoji"}
    assert found_in == {"emoji", "things", "cli", "scripts"}


def test_no_module_imports_itself_through_others() -> None:
    """Nor through imports inside functions, but for those of face.py."""
    graph: dict[str, set[str]] = {}
    for found in IMPORTS:
        source = found.source.removesuffix(".__init__")
        listed = found.lazy and (found.source, part_of(found.module)) in UPWARD
        if not is_ours(found.module) or found.typing or listed or found.module == "nanomolmo2":
            continue
        if source != found.module and not source.startswith(f"{found.module}."):
            graph.setdefault(source, set()).add(found.module)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_core_needs_only_the_core_dependencies() -> None:
    """What an extra installs is imported inside the function that uses it."""
    wrong = [
        describe(found)
        for found in IMPORTS
        if found.source.startswith("nanomolmo2.")
        and not is_ours(found.module)
        and not (found.lazy or found.typing)
        and found.module.split(".")[0]
        not in CORE | set(sys.stdlib_module_names) | OF_AN_EXTRA.get(part_of(found.source), set())
    ]
    assert not wrong, "\n".join(wrong)


def test_parts_of_an_extra_are_imported_where_they_are_used() -> None:
    """Without the extra, everything else works and tells its name."""
    wrong = [
        describe(found)
        for found in IMPORTS
        if is_ours(found.module)
        and part_of(found.module) in OF_AN_EXTRA
        and part_of(found.source) not in OF_AN_EXTRA
        and not (found.lazy or found.typing)
    ]
    assert not wrong, "\n".join(wrong)


def test_transformers_is_only_a_reference_for_tests() -> None:
    wrong = [describe(found) for found in IMPORTS if found.module.split(".")[0] == "transformers"]
    assert not wrong, "\n".join(wrong)


def test_light_modules_do_not_import_torch() -> None:
    wrong = [
        describe(found)
        for found in IMPORTS
        if part_of(found.source) in LIGHT
        and not found.lazy
        and not found.typing
        and found.module.split(".")[0] not in {"tyro"} | set(sys.stdlib_module_names)
        and part_of(found.module) not in LIGHT
    ]
    assert not wrong, "\n".join(wrong)


def test_the_model_can_be_read_in_one_sitting() -> None:
    """What models/nanomolmo2.py needs, imports inside functions included: at most 1,700 lines."""
    needed, todo = set(), {"nanomolmo2.models.nanomolmo2"}
    while todo:
        needed.add(module := todo.pop())
        todo |= {f.module for f in IMPORTS if f.source == module and is_ours(f.module)} - needed
    paths = [ROOT.joinpath(*module.split(".")).with_suffix(".py") for module in sorted(needed)]
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert sum(lines.values()) <= 1700, lines


def test_files_functions_and_signatures_of_the_package_are_short() -> None:
    """At most 600 lines, 60 without the docstring, and 10 parameters."""
    wrong = []
    for path in (ROOT / "nanomolmo2").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if (length := len(text.splitlines())) > 600:
            wrong.append(f"{path.name} has {length} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                start = node.body[0].end_lineno if ast.get_docstring(node) else node.lineno - 1
                body = (node.end_lineno or 0) - (start or 0)
                given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                names = [a.arg for a in given if a.arg not in ("self", "cls", "ctx")]
                if body > 60 or len(names) > 10:
                    where = f"{path.name}:{node.lineno} {node.name}"
                    wrong.append(f"{where} has {body} lines and takes {len(names)}")
    assert not wrong, "\n".join(wrong)
