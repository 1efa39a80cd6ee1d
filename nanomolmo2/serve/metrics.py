"""Numbers of a server, in the text that Prometheus reads."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nanomolmo2.serve.admission import Admission
from nanomolmo2.serve.store import ModelStore

if TYPE_CHECKING:
    from nanomolmo2.generation.vlm import VLM

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass
class _Histogram:
    """How many values were at most each of `SECONDS`, and above them."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(SECONDS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str, labels: Mapping[str, str] | None = None) -> Iterator[str]:
        labels, count = labels or {}, 0
        for most, here in zip((*map(_number, SECONDS), "+Inf"), self.counts, strict=True):
            count += here
            yield _sample(f"{name}_bucket", {**labels, "le": most}, count)
        yield _sample(f"{name}_sum", labels, self.total)
        yield _sample(f"{name}_count", labels, count)


class Metrics:
    """Counters of a server; any thread may call them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[tuple[str, int], int] = {}
        self._seconds: dict[str, _Histogram] = {}
        self._first_token = _Histogram()

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        """A request has ended. Called by `security.Guard`.

        Args:
            route: its template; paths of clients would be numbers without end.
        """
        with self._lock:
            self._requests[route, status] = self._requests.get((route, status), 0) + 1
            self._seconds.setdefault(route, _Histogram()).add(seconds)

    def observe_first_token(self, seconds: float) -> None:
        """The first piece of an answer was there so long after its request had arrived."""
        with self._lock:
            self._first_token.add(seconds)

    def render(self, store: ModelStore, admission: Admission) -> str:
        """All numbers, for ``GET /metrics``, of content type `CONTENT_TYPE`."""
        lines = [*self._of_requests(), *_of_admission(admission), *_of_models(store.loaded())]
        return "\n".join(lines) + "\n"

    def _of_requests(self) -> list[str]:
        with self._lock:
            name = "nanomolmo2_requests_total"
            lines = list(_head(name, "counter", "Requests that ended, by route and status."))
            for (route, status), count in sorted(self._requests.items()):
                lines.append(_sample(name, {"route": route, "status": str(status)}, count))
            name = "nanomolmo2_request_seconds"
            lines += _head(name, "histogram", "Time of requests from first to last byte.")
            for route, histogram in sorted(self._seconds.items()):
                lines += histogram.lines(name, {"route": route})
            name = "nanomolmo2_time_to_first_token_seconds"
            lines += _head(name, "histogram", "Time from a request to its answer's first piece.")
            return [*lines, *self._first_token.lines(name)]


def _of_admission(admission: Admission) -> Iterator[str]:
    for name, value, text in (
        ("requests_inside", admission.inside, "Requests that were let in and have not ended."),
        ("requests_inside_max", admission.most, "Most of them; others get 429."),
        ("request_bytes_held", admission.held_bytes, "Bytes of their bodies."),
        ("draining", int(admission.draining), "1 once the server shuts down."),
    ):
        yield from _head(f"nanomolmo2_{name}", "gauge", text)
        yield _sample(f"nanomolmo2_{name}", {}, value)


def _of_models(models: Mapping[str, VLM]) -> Iterator[str]:
    """Numbers of each model that is loaded; those of a model begin anew when it is loaded anew."""
    yield from _head("nanomolmo2_models_loaded", "gauge", "Models in memory.")
    yield _sample("nanomolmo2_models_loaded", {}, len(models))
    values = {name: _values(vlm) for name, vlm in models.items()}
    for metric, (kind, text) in _OF_A_MODEL.items():
        yield from _head(f"nanomolmo2_{metric}", kind, text)
        for name, found in values.items():
            yield _sample(f"nanomolmo2_{metric}", {"model": name}, found[metric])
    name = "nanomolmo2_answers_total"
    yield from _head(name, "counter", "Answers that ended, by reason.")
    for model, vlm in models.items():
        for reason, count in sorted(dict(vlm.scheduler.stats.requests).items()):
            yield _sample(name, {"model": model, "reason": reason}, count)


_OF_A_MODEL = {
    "queue_waiting": ("gauge", "Answers that wait for a row."),
    "rows_running": ("gauge", "Answers that are being written."),
    "rows_max": ("gauge", "Most answers that are written together."),
    "prompt_tokens_total": ("counter", "Tokens of prompts, reused ones included."),
    "output_tokens_total": ("counter", "Tokens of answers."),
    "cache_hit_tokens_total": ("counter", "Tokens of prompts that were not computed again."),
    "cache_hit_images_total": ("counter", "Pictures that were not encoded again."),
    "cache_bytes": ("gauge", "What is kept for later prompts."),
    "steps_total": ("counter", "Steps of the decoder, each a token or more for all rows."),
    "step_seconds_total": ("counter", "Their time."),
}


def _values(vlm: VLM) -> dict[str, float]:
    """The numbers of `_OF_A_MODEL`."""
    stats, cache = vlm.scheduler.stats, vlm.prefix_cache
    return {
        "queue_waiting": stats.waiting,
        "rows_running": stats.running,
        "rows_max": vlm.scheduler.max_rows,
        "prompt_tokens_total": stats.prompt_tokens,
        "output_tokens_total": stats.output_tokens,
        "cache_hit_tokens_total": stats.reused_tokens,
        "cache_hit_images_total": cache.reused_images,
        "cache_bytes": cache.nbytes,
        "steps_total": stats.steps,
        "step_seconds_total": stats.step_seconds,
    }


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    return f"{name}{{{inside}}} {_number(value)}" if inside else f"{name} {_number(value)}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
