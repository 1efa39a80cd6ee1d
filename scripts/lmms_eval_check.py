"""Our adapter and our scorers beside lmms-eval itself.

    make lmms-eval            # an environment of its own (some minutes, 3 GB), then this
    .venv-lmms/bin/python scripts/lmms_eval_check.py --answers 2000

Runs a made-up task through lmms-eval's own command with ``--model nanomolmo2`` and compares every
answer with what `Pipeline.ask` says; then scores random answers with lmms-eval's functions and with
ours. Differences that docs/benchmarks.md explains are counted apart; any other ends it with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TASK = """\
task: made_up
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: !function utils.question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 96
  temperature: 0
  do_sample: false
process_results: !function utils.score
metric_list:
  - metric: same_words
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """\
def pictures(doc):
    return [doc["image"].convert("RGB")]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def score(doc, results):
    return {"same_words": float(results[0].strip() == doc["answer"])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--answers", type=int, default=20_000, help="random answers for each score")
    parser.add_argument("--questions", type=int, default=24, help="of the made-up task")
    options = parser.parse_args()
    print(f"lmms-eval {version('lmms_eval')}")
    with tempfile.TemporaryDirectory() as folder:
        wrong = run_task(Path(folder), options.questions)
    wrong += compare_scores(options.answers)
    sys.exit(bool(wrong))


# ---- the adapter ----


def run_task(folder: Path, number: int) -> int:
    """Returns: how many answers differ from those of `Pipeline.ask`."""
    from nanomolmo2 import Pipeline

    asked = write_task(folder, number)
    command = [sys.executable, "-m", "lmms_eval", "--model", "nanomolmo2", "--batch_size", "8"]
    command += ["--model_args", "pretrained=tiny", "--include_path", str(folder / "task")]
    command += ["--tasks", "made_up", "--log_samples", "--output_path", str(folder / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    samples = sorted((folder / "out").rglob("*samples*made_up*.jsonl"))
    if done.returncode or not samples:
        print(done.stdout[-3000:], done.stderr[-6000:], sep="\n")
        print(f"lmms-eval ended with {done.returncode} and wrote {len(samples)} files of answers")
        return 1
    lines = [json.loads(line) for line in samples[0].read_text(encoding="utf-8").splitlines()]
    said = {line["doc_id"]: _first(line["filtered_resps"]) for line in lines}
    pipeline = Pipeline.from_pretrained("tiny")
    differ = 0
    for i, (image, question, _) in enumerate(asked):
        answer = pipeline.ask(image, question, max_new_tokens=96).text
        if said.get(i) != answer:
            differ += 1
            print(f"  {question!r}: lmms-eval got {said.get(i)!r}, ask says {answer!r}")
    (results,) = (folder / "out").rglob("*results.json")
    scores = json.loads(results.read_text(encoding="utf-8"))["results"]["made_up"]
    theirs = next(value for key, value in scores.items() if key.startswith("same_words"))
    ours = sum(said.get(i) == right for i, (*_, right) in enumerate(asked)) / len(asked)
    print(
        f"adapter: {len(asked)} questions through lmms-eval's evaluator, {differ} answers differ "
        f"from Pipeline.ask; its score {theirs:.4f}, ours {ours:.4f}"
    )
    return differ + (abs(theirs - ours) > 1e-9)


def _first(value: Any) -> str:
    while isinstance(value, list):
        value = value[0]
    return str(value)


def write_task(folder: Path, number: int) -> list[tuple[Any, str, str]]:
    """A task of lmms-eval with questions about scenes that ``tiny`` knows.

    Returns: (picture, question, answer) of each.
    """
    import datasets

    from nanomolmo2.data.sources import SourceConfig, open_source
    from nanomolmo2.processor.image import load_image

    source = open_source(SourceConfig("emoji", seed=5, options={"length": number}))
    asked = []
    for i in range(number):
        example = source[i]
        question, answer, *_ = (message["content"] for message in example.branches[0].messages)
        if len(example.images) == 1 and isinstance(question, str) and isinstance(answer, str):
            asked.append((load_image(example.images[0]), question, answer))
    columns = {
        "image": [image for image, _, _ in asked],
        "question": [question for _, question, _ in asked],
        "answer": [answer for _, _, answer in asked],
    }
    kinds = datasets.Features(
        image=datasets.Image(), question=datasets.Value("string"), answer=datasets.Value("string")
    )
    task = folder / "task"
    task.mkdir()
    file = folder / "test.parquet"
    datasets.Dataset.from_dict(columns, features=kinds).to_parquet(str(file))
    (task / "made_up.yaml").write_text(TASK.format(file=file), encoding="utf-8")
    (task / "utils.py").write_text(FUNCTIONS, encoding="utf-8")
    return asked


# ---- the scores ----

Compared = Iterator[tuple[str, float, float, str]]  # score, ours, theirs, why they may differ
WORDS = re.findall(
    r"\S+",
    "the answer is so could be B (A) (C) A. C D. 12 1,234 3.5e3 = . , final result cat a dog none "
    "red Yes no, two $ x ( ) ' it's don't dont: - -5 50% 0 .5 1000.00 half-open [x] /",
)
OPTIONS = ("cat", "a dog", "red", "12", "x", "1,234", "yes", "none of these", "b")


def compare_scores(number: int) -> int:
    """Returns: how many scores differ without a reason."""
    draw = random.Random(0)
    wrong = 0
    for compare in (_relaxed, _vqa, _anls, _mmmu, _clicks, _masks):
        counts: Counter[str] = Counter()
        name = ""
        for _ in range(number):
            for name, ours, theirs, why in compare(draw):
                if abs(ours - theirs) < 1e-9:
                    counts["equal"] += 1
                elif why:
                    counts[why] += 1
                else:
                    counts["DIFFERENT"] += 1
                    print(f"  {name}: ours {ours}, lmms-eval's {theirs}")
        print(f"{name}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))
        wrong += counts["DIFFERENT"]
    return wrong


def _text(draw: random.Random, most: int) -> str:
    return " ".join(draw.choice([*WORDS, "\n"]) for _ in range(draw.randint(0, most)))


def _relaxed(draw: random.Random) -> Compared:
    from lmms_eval.tasks.chartqa.utils import chartqa_process_results

    from nanomolmo2.evaluation.answers import relaxed_accuracy

    numbers = [f"{draw.uniform(0, 20):.2f}", "10", "50%", "0", _text(draw, 2).strip()]
    right, said = draw.choice(numbers), draw.choice(numbers)
    doc = {"type": "human_test", "answer": right}
    theirs = chartqa_process_results(doc, [said])["relaxed_overall"]
    yield "relaxed accuracy (ChartQA)", relaxed_accuracy(said, [right]), theirs, ""


def _people(draw: random.Random) -> tuple[str, list[str]]:
    references = [_text(draw, 3) for _ in range(10)]
    same = draw.randint(0, 6)
    references[:same] = references[:1] * same
    return draw.choice([draw.choice(references), _text(draw, 3)]), references


def _vqa(draw: random.Random) -> Compared:
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results

    from nanomolmo2.evaluation.answers import normalize_vqa, vqa_accuracy

    said, people = _people(draw)
    doc = {"answers": list(people), "question_id": 1}
    texts = textvqa_process_results(doc, [said])["exact_match"]
    named = [{"answer": answer, "answer_id": i} for i, answer in enumerate(people)]
    photos = vqav2_process_results({"answers": named, "question_id": 1}, [said])["exact_match"]
    # The mean over leaving one of the people out; ours is min(matches / 3, 1).
    m = sum(normalize_vqa(said) == normalize_vqa(answer) for answer in people)
    left_out = (m * min(1, max(0, m - 1) / 3) + (10 - m) * min(1, m / 3)) / 10
    ours, name = vqa_accuracy(said, people), "VQA accuracy (TextVQA, VQA v2)"
    why = "as it should be where they leave one of ten people out"
    for theirs in (texts, photos):
        yield name, ours, theirs, why if abs(theirs - left_out) < 1e-9 else ""


def _anls(draw: random.Random) -> Compared:
    from lmms_eval.api.metrics import anls as peer

    from nanomolmo2.evaluation.answers import anls

    # Surplus spaces are no part of these: lmms-eval removes them, and counts them all the same.
    said, references = (" ".join(text.split()) for text in (_text(draw, 3), _text(draw, 3)))
    said = draw.choice([said, references + draw.choice(["", "x", "zz"]), references[1:]])
    theirs = peer([references], [said])["anls"] if references or said else 1.0
    why = "half of the letters, which count nothing here" if abs(theirs - 0.5) < 1e-9 else ""
    yield "ANLS (DocVQA, InfographicVQA)", anls(said, [references]), theirs, why


def _mmmu(draw: random.Random) -> Compared:
    from lmms_eval.tasks.mmmu import utils

    from nanomolmo2.evaluation.public.scorers import named_option, open_answer

    said = _text(draw, 8)
    options = [draw.choice(OPTIONS) for _ in range(draw.randint(2, 5))]
    texts, letters = utils.get_multi_choice_info(options)
    with mock.patch("random.choice", return_value="nothing"):
        theirs = utils.parse_multi_choice_response(said, letters, texts)
    ours = named_option(said, options) or "nothing"
    name = "MMMU, options and open questions"
    yield name, 1.0, float(ours == theirs), ""
    references = [_text(draw, 2) for _ in range(draw.randint(1, 2))]
    right = utils.eval_open(references, utils.parse_open_response(said))
    yield name, open_answer(said, references), float(right), ""


def _clicks(draw: random.Random) -> Compared:
    from lmms_eval.tasks.screenspot_pro.utils import screenspot_pro_process_results

    from nanomolmo2.evaluation import SCORERS
    from nanomolmo2.evaluation.scorers import Shown

    size = draw.randint(200, 4000), draw.randint(200, 4000)
    x, y = draw.randint(0, 1000), draw.randint(0, 1000)
    box = [draw.randint(2, side - 1) for side in size]
    box += [draw.randint(low, side) for low, side in zip(box, size, strict=True)]
    doc = {"bbox": box, "img_size": list(size), "ui_type": "text"}
    said = f"({x / 1000}, {y / 1000})"
    theirs = screenspot_pro_process_results(doc, [said])["screenspot_pro_action_acc"]["correct"]
    answer = f'<points coords="1 1 {x:03d} {y:03d}">it</points>'
    ours = SCORERS["click"]({"boxes": [box]}, answer, Shown((size,)))
    at_edge = any(
        abs(place * side / 1000 - edge) < 1e-6
        for place, side, edges in ((x, size[0], box[::2]), (y, size[1], box[1::2]))
        for edge in edges
    )
    why = "on an edge, where shares of the sides round" if at_edge else ""
    yield "clicks (ScreenSpot-Pro)", ours, float(theirs), why


def _masks(draw: random.Random) -> Compared:
    import numpy as np
    from lmms_eval.tasks.pointbench.utils import _binary_score

    from nanomolmo2.data.labels.shapes import runs_of
    from nanomolmo2.evaluation import SCORERS
    from nanomolmo2.evaluation.scorers import Shown

    rng = np.random.default_rng(draw.randrange(2**32))
    width, height = 100 * draw.randint(1, 5), 100 * draw.randint(1, 5)
    mask = np.kron(rng.random((height // 50, width // 50)) < 0.5, np.ones((50, 50), bool))
    points = [
        (draw.randint(0, 100) * width // 100, draw.randint(0, 100) * height // 100)
        for _ in range(draw.randint(0, 3))
    ]
    theirs = _binary_score(np.array(points).reshape(-1, 2), mask, "counting", len(points))
    triples = " ".join(
        f"{i} {x * 1000 // width:03d} {y * 1000 // height:03d}"
        for i, (x, y) in enumerate(points, start=1)
    )
    answer = f'<points coords="1 {triples}">it</points>' if points else "There are none."
    ours = SCORERS["in_mask"]({"masks": [runs_of(mask)]}, answer, Shown(((width, height),)))
    yield "all points in the mask (Point-Bench)", ours, float(theirs), ""


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
