"""The text for Prometheus, read back by its own grammar."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

from nanomolmo2.generation.scheduler import Stats
from nanomolmo2.serve.admission import Admission
from nanomolmo2.serve.metrics import Metrics
from nanomolmo2.serve.settings import ServeSettings
from nanomolmo2.serve.store import ModelStore

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = rf'{NAME}="(?:[^"\\\n]|\\[\\"n])*"'
SAMPLE = re.compile(rf"({NAME}(?:\{{{LABEL}(?:,{LABEL})*\}})?) (\+Inf|-?[0-9.]+)")


def samples(text: str) -> dict[str, float]:
    """``name{labels}`` -> value; all that Prometheus asks of the text is checked."""
    found: dict[str, float] = {}
    kinds: dict[str, str] = {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# HELP "):
            assert re.fullmatch(rf"# HELP {NAME} \S.*", line)
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in kinds
            kinds[name] = kind
        else:
            sample = SAMPLE.fullmatch(line)
            assert sample is not None, line
            assert sample[1] not in found
            name = sample[1].partition("{")[0]
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            kind = kinds.get(name) or kinds[base]  # under its heading
            assert kind in ("counter", "gauge", "histogram")
            assert (kind == "counter") == name.endswith("_total")
            found[sample[1]] = float(sample[2])
    return found


def fake_model(**stats: Any) -> Any:
    return SimpleNamespace(
        scheduler=SimpleNamespace(stats=Stats(**stats), max_rows=8),
        prefix_cache=SimpleNamespace(reused_images=3, nbytes=1000),
    )


def rendered(metrics: Metrics, **models: Any) -> dict[str, float]:
    store = ModelStore({name: lambda model=model: model for name, model in models.items()})
    for name in models:
        with store.use(name):
            pass
    return samples(metrics.render(store, Admission(ServeSettings(max_running=3, max_waiting=4))))


def test_requests_are_counted_by_route_and_status() -> None:
    metrics = Metrics()
    for status, seconds in ((200, 0.01), (200, 0.1), (429, 0.0), (200, 99.0)):
        metrics.observe_request("/v1/point", status, seconds)
    metrics.observe_request('/odd"\\\n', 404, 1.0)
    found = rendered(metrics, tiny=fake_model())
    assert found['nanomolmo2_requests_total{route="/v1/point",status="200"}'] == 3
    assert found['nanomolmo2_requests_total{route="/v1/point",status="429"}'] == 1
    assert found['nanomolmo2_requests_total{route="/odd\\"\\\\\\n",status="404"}'] == 1
    name = "nanomolmo2_request_seconds"
    assert found[f'{name}_count{{route="/v1/point"}}'] == 4
    assert found[f'{name}_sum{{route="/v1/point"}}'] == 99.11
    assert found[f'{name}_bucket{{route="/v1/point",le="0.025"}}'] == 2
    assert found[f'{name}_bucket{{route="/v1/point",le="0.05"}}'] == 2
    assert found[f'{name}_bucket{{route="/v1/point",le="0.1"}}'] == 3  # at most, not less than
    assert found[f'{name}_bucket{{route="/v1/point",le="60"}}'] == 3
    assert found[f'{name}_bucket{{route="/v1/point",le="+Inf"}}'] == 4


def test_the_time_to_the_first_token_is_a_histogram() -> None:
    metrics = Metrics()
    for seconds in (0.2, 0.3):
        metrics.observe_first_token(seconds)
    found = rendered(metrics, tiny=fake_model())
    name = "nanomolmo2_time_to_first_token_seconds"
    assert found[f"{name}_count"] == 2
    assert found[f"{name}_sum"] == 0.5
    assert [found[f'{name}_bucket{{le="{most}"}}'] for most in ("0.1", "0.25", "0.5", "+Inf")] == [
        *(0, 1, 2, 2)
    ]


def test_numbers_of_the_models_that_are_loaded() -> None:
    busy = fake_model(
        waiting=4,
        running=2,
        prompt_tokens=100,
        reused_tokens=60,
        output_tokens=30,
        requests={"stop": 5, "cancelled": 1},
        steps=40,
        step_seconds=0.25,
    )
    found = rendered(Metrics(), tiny=busy, large=fake_model())
    assert found["nanomolmo2_models_loaded"] == 2
    for name, value in {
        "queue_waiting": 4,
        "rows_running": 2,
        "rows_max": 8,
        "prompt_tokens_total": 100,
        "output_tokens_total": 30,
        "cache_hit_tokens_total": 60,
        "cache_hit_images_total": 3,
        "cache_bytes": 1000,
        "steps_total": 40,
        "step_seconds_total": 0.25,
    }.items():
        assert found[f'nanomolmo2_{name}{{model="tiny"}}'] == value
        assert f'nanomolmo2_{name}{{model="large"}}' in found
    assert found['nanomolmo2_answers_total{model="tiny",reason="stop"}'] == 5
    assert found['nanomolmo2_answers_total{model="tiny",reason="cancelled"}'] == 1


def test_numbers_of_the_queue() -> None:
    admission = Admission(ServeSettings(max_running=3, max_waiting=4))
    store = ModelStore({"tiny": fake_model})
    with admission.enter() as visit:
        visit.hold(10)
        found = samples(Metrics().render(store, admission))
    assert found["nanomolmo2_requests_inside"] == 1
    assert found["nanomolmo2_requests_inside_max"] == 7
    assert found["nanomolmo2_request_bytes_held"] == 10
    assert found["nanomolmo2_draining"] == 0
    assert found["nanomolmo2_models_loaded"] == 0  # none was asked for
    admission.drain()
    assert samples(Metrics().render(store, admission))["nanomolmo2_draining"] == 1
