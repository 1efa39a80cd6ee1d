"""The adapter for lmms-eval, with stand-ins for it; `make lmms-eval` runs it in the real one."""

from __future__ import annotations

import importlib
import sys
import tomllib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from nanomolmo2.evaluation import lmms_eval
from nanomolmo2.evaluation.lmms_eval import Requests, options_of, question_of
from nanomolmo2.generation.pipeline import Pipeline

ROOT = Path(__file__).parents[2]
GREEDY = {"max_new_tokens": 16, "temperature": 0, "do_sample": False}
PICTURE = Image.new("RGB", (100, 100), "white")


class Request(NamedTuple):
    """As lmms-eval's `Instance`: what is asked is in ``args``."""

    args: tuple[str, dict[str, Any], Callable[[Any], list[Any]], int, str, str]


def request(text: str, number: int, settings: dict[str, Any] = GREEDY) -> Request:
    return Request((text, settings, lambda record: [record["image"]], number, "made_up", "test"))


class Base:
    """Stands in for lmms-eval's base class of models."""

    def __init__(self) -> None:
        self.task_dict = {"made_up": {"test": [{"image": PICTURE}] * 9}}
        self.kept: list[tuple[str, Any, str]] = []
        self.cache_hook = types.SimpleNamespace(
            add_partial=lambda kind, key, text: self.kept.append((kind, key, text))
        )


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class, on stand-ins of the modules that it imports."""
    modules = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": Base},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": lambda *a, **k: (a, k)},
    }
    for name, values in modules.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    lmms_eval._adapter.cache_clear()
    yield lmms_eval.Adapter
    lmms_eval._adapter.cache_clear()


def test_it_is_found_by_its_entry_point(adapter: type) -> None:
    """As lmms-eval does: load the entry point, call it, import the class by its path."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (found,) = project["entry-points"]["lmms_eval.models"].items()
    assert found[0] == "nanomolmo2"
    module, _, name = found[1].partition(":")
    (names, paths) = getattr(importlib.import_module(module), name)()
    assert names == ("nanomolmo2",)
    module, _, name = paths["simple_class_path"].rpartition(".")
    assert getattr(importlib.import_module(module), name) is adapter
    assert issubclass(adapter, Base) and adapter.is_simple
    with pytest.raises(AttributeError, match="has no attribute 'Other'"):
        _ = lmms_eval.Other


def test_answers_are_those_of_ask_in_the_order_of_the_requests(adapter: Any) -> None:
    model = adapter(pretrained="tiny", batch_size="2")
    texts = ["Describe this picture.", "How many cats are there?", "Is there a dog?"]
    short = {**GREEDY, "max_new_tokens": 2}
    found = model.generate_until(
        [*(request(text, i) for i, text in enumerate(texts)), request(texts[0], 3, short)]
    )
    pipeline = Pipeline.from_pretrained("tiny")
    expected = [pipeline.ask(PICTURE, text, max_new_tokens=16).text for text in texts]
    assert found == [*expected, pipeline.ask(PICTURE, texts[0], max_new_tokens=2).text]
    assert len(set(found)) > 1
    assert model.kept[1] == ("generate_until", (texts[1], GREEDY), found[1])
    assert model.device.type == "cpu"


def test_a_style_goes_before_every_question(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = adapter(style="vqa2"), []

    def ask_many(questions: Any, **_: Any) -> Any:
        for question in questions:
            asked.append(question.question)
            yield ValueError("its prompt has 9999 positions")

    monkeypatch.setattr(model.pipeline, "ask_many", ask_many)
    with pytest.warns(UserWarning, match="made_up, record 4 counts as not answered: its prompt"):
        assert model.generate_until([request("What?", 4)]) == [""]
    assert asked == ["vqa2: What?"]


def test_settings_of_generation() -> None:
    options = options_of({"max_new_tokens": 9, "until": ["\n\n", ""], "num_beams": 1, "top_p": 0.5})
    assert (options.max_new_tokens, options.sampling.stop) == (9, ("\n\n",))
    assert (options.sampling.temperature, options.sampling.top_p) == (0, 1)
    drawn = options_of({"temperature": 0.5, "top_p": 0.9, "do_sample": True, "until": "Q:"})
    assert (drawn.sampling.temperature, drawn.sampling.top_p) == (0.5, 0.9)
    assert (drawn.max_new_tokens, drawn.sampling.stop) == (1024, ("Q:",))
    assert options_of({"temperature": 0.5, "do_sample": False}).sampling.temperature == 0
    with pytest.raises(ValueError, match="asks for 5 beams, and there is no beam search here"):
        options_of({"num_beams": 5})


def test_pictures_or_one_video() -> None:
    assert question_of("Q", None).images == []
    assert question_of("Q", [PICTURE, PICTURE]).images == [PICTURE, PICTURE]
    assert question_of("Q", ["a.mp4"]).video == "a.mp4"
    for wrong in (["a.mp4", "b.mp4"], [PICTURE, "a.mp4"], [{"array": []}]):
        with pytest.raises(ValueError, match="expected pictures or one video"):
            question_of("Q", wrong)


def test_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="batch_size is 'auto', expected a number"):
        Requests(batch_size="auto")
    model = Requests.__new__(Requests)
    with pytest.raises(NotImplementedError, match="answers in words only"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="one question at a time"):
        model.generate_until_multi_round([])
