"""The folder of an evaluation: every prediction as it comes, and what was evaluated.

    evaluation.json      the data, the options and the model, to tell whether one may go on
    predictions.jsonl    one line an answer, in the order of the questions; those of a model that is
                         compared with it are in predictions-untrained.jsonl
    report.json          with table.md, index.html and its pictures/

An evaluation that was ended, by whatever, goes on behind its last whole line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from nanomolmo2.checks import written
from nanomolmo2.evaluation.questions import Question
from nanomolmo2.evaluation.summary import Prediction, judge
from nanomolmo2.files import open_regular
from nanomolmo2.generation.pipeline import Pipeline

ABOUT, PREDICTIONS = "evaluation.json", "predictions.jsonl"
SAMPLED = 4096  # values of a weight that its digest looks at
MOST_LINE = 32 * 2**20  # bytes


class Refused(ValueError):
    """An answer in place of which there is an error: the question could not be asked."""


class Store:
    """Predictions of one model in a folder; those of an earlier call are not asked for again."""

    def __init__(self, path: Path, questions: Sequence[Question]) -> None:
        """
        Args:
            path: a file of predictions; what is there must be about the same questions.
        Raises: ValueError if it is about others.
        """
        self.path = path
        self.known: list[Prediction | Refused] = []
        whole = 0  # bytes
        if path.exists():
            with open_regular(path) as stream:
                while (line := stream.readline(MOST_LINE)).endswith(b"\n"):
                    self.known.append(self._read(line, questions))
                    whole = stream.tell()
        self._stream: IO[bytes] = path.open("ab")
        self._stream.truncate(whole)  # the line that was being written at the end

    def _read(self, line: bytes, questions: Sequence[Question]) -> Prediction | Refused:
        number = len(self.known)
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if number >= len(questions) or not isinstance(found, dict):
            raise ValueError(
                f"{self.path}, line {number + 1} is no answer to these questions: name a new folder"
            )
        question = questions[number]
        expected = json.loads(json.dumps(judge(question, "").to_dict()))
        same = ("number", "task", "scorer", "question", "truth")
        if any(found.get(name) != expected[name] for name in same):
            raise ValueError(
                f"{self.path}, line {number + 1} answers another question than these data ask "
                f"there: they have changed; name a new folder"
            )
        if found.get("error") is not None:
            return Refused(str(found["error"]))
        return judge(question, str(found["answer"]), bool(found["complete"]))

    def add(self, question: Question, answer: Prediction | Refused) -> None:
        """Write a line."""
        if isinstance(answer, Refused):
            values = {**judge(question, "").to_dict(), "answer": None, "score": None}
            values["error"] = str(answer)
        else:
            values = answer.to_dict()
        line = json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"
        self._stream.write(line.encode("utf-8", "replace"))
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def open_folder(folder: Path, about: Mapping[str, Any]) -> None:
    """Make the folder of an evaluation, or go on in it.

    Args:
        about: what is evaluated and how, as plain JSON.
    Raises: ValueError for a folder that holds something else, or another evaluation.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder for the evaluation")
    about = json.loads(json.dumps(about))
    if (folder / ABOUT).is_file():
        try:
            before = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        except ValueError:
            before = {}
        changed = [name for name, value in about.items() if before.get(name) != value]
        if changed:
            what = ", ".join(name.replace("_", " ") for name in changed)
            raise ValueError(
                f"{folder} holds an evaluation that differs in: {what}. Give the same data, model "
                f"and options to go on with it, or name a new folder"
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty and holds no evaluation: name a new or empty folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with written(folder / ABOUT) as temporary:
        temporary.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def digest_of(pipeline: Pipeline) -> str:
    """The same for the same model and processor: their configs, and some of every weight."""
    digest = hashlib.blake2b(digest_size=12)
    for config in (pipeline.model.config, pipeline.processor.config):
        digest.update(json.dumps(config.to_dict(), sort_keys=True, default=str).encode())
    for name, weight in _weights(pipeline):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // SAMPLED)].cpu()
        digest.update(np.ascontiguousarray(some.contiguous().view(torch.uint8)).tobytes())
    return digest.hexdigest()


def _weights(pipeline: Pipeline) -> Iterator[tuple[str, torch.Tensor]]:
    for name, weight in sorted(pipeline.model.state_dict().items()):
        if isinstance(weight, torch.Tensor) and weight.numel():
            yield name, weight
