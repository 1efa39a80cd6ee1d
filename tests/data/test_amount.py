"""How much data there is: rows, steps and epochs, against the steps of the loader itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanomolmo2.data.amount import Amount, count_pictures, measure
from nanomolmo2.data.example import BadExample, Branch, Example
from nanomolmo2.data.loader import PackedLoader, RowPlan
from nanomolmo2.data.mixture import Mixture
from nanomolmo2.data.sources import SourceConfig, open_mixture, open_source
from nanomolmo2.processor import Encoded


class Texts:
    """Examples whose answers have as many tokens as their number says."""

    def __init__(self, lengths: list[int], name: str = "texts") -> None:
        self.lengths, self.name = lengths, name

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Example:
        if self.lengths[i] == 0:
            raise BadExample("bad record", f"{self.name}, example {i}")
        return Example([], [Branch([{"role": "assistant", "content": str(self.lengths[i])}])])


def encode(example: Example) -> Encoded:
    content = example.branches[0].messages[0]["content"]
    assert isinstance(content, str)
    ids = np.ones(int(content), dtype=np.int64)
    return Encoded(ids, np.arange(len(ids)), labels=ids, subsegment_ids=np.zeros_like(ids))


def rows(batch_size: int = 1, max_tokens: int = 10, buffer: int = 2) -> RowPlan:
    return RowPlan(batch_size, max_tokens, max_crops=4, pad_token_id=0, packing_buffer=buffer)


def test_an_epoch_of_examples_of_one_length() -> None:
    """Two of five tokens fill a row of ten: six examples are three rows."""
    amount = measure(Mixture([Texts([5] * 6)]), encode, rows())
    assert amount == Amount(6, None, 2.0, 1.0, made_up=True)
    assert amount.steps(1, batch_size=1) == 3
    assert amount.steps(1, batch_size=3) == 1
    assert amount.steps(2.5, batch_size=2) == 4  # 15 examples of 4 a step
    assert amount.epochs(6, batch_size=2) == 4


def test_what_is_left_out_was_seen_too() -> None:
    """One of three cannot be read, one is too long: of each three one is learned."""
    amount = measure(Mixture([Texts([10, 0, 11])]), encode, rows(buffer=1))
    assert amount.examples_per_row == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_steps_are_those_in_which_the_loader_draws_so_many(batch_size: int) -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 40, 30).tolist()
    mixture, plan = Mixture([Texts(lengths)], seed=3), rows(batch_size, 64, buffer=8)
    steps = measure(mixture, encode, plan).steps(4, batch_size)
    loader = iter(PackedLoader(mixture, encode, plan))
    drawn = sum(next(loader).counts["examples"] for _ in range(steps))
    assert drawn == pytest.approx(4 * len(lengths), rel=0.1)


def test_scenes_that_are_made_up_do_not_count_beside_records(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    lines = [{"image": "a.png", "question": f"{n}?", "answer": "5"} for n in range(4)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def five_tokens(example: Example) -> Encoded:
        return encode(Example([], [Branch([{"role": "assistant", "content": "5"}])]))

    own = SourceConfig(str(tmp_path / "my.jsonl"), sampling_weight=0.75)
    scenes = SourceConfig("emoji", sampling_weight=0.25, options={"length": 100_000})
    amount = measure(open_mixture([own, scenes]), five_tokens, rows())
    assert amount == Amount(records=4, pictures=1, examples_per_row=2.0, share=0.75)
    assert amount.epochs(8, batch_size=1) == 3  # of 16 examples, 12 are of the 4


def test_nothing_that_can_be_learned() -> None:
    with pytest.raises(ValueError, match="none of the 2 examples looked at of texts"):
        measure(Mixture([Texts([0, 11])]), encode, rows())


def test_pictures_are_counted_once(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [
        {"image": name, "question": "?", "answer": "!"} for name in "aab"
    ]
    lines.append({"images": ["b", "c"], "question": "?", "answer": "!"})
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert count_pictures([open_source(path)]) == 3
    assert count_pictures([Texts([1])]) is None
