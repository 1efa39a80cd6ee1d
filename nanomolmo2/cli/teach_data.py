"""``nanomolmo2 teach --data``: a word, and others, from annotated photos."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanomolmo2.cli.loading import copy_model, load_pipeline, model_folder, precision
from nanomolmo2.cli.options import UsageError
from nanomolmo2.cli.output import note, progress_bars, say

if TYPE_CHECKING:
    from nanomolmo2.cli.train import Train
    from nanomolmo2.data.example import Source
    from nanomolmo2.evaluation.summary import Report
    from nanomolmo2.generation.pipeline import Pipeline
    from nanomolmo2.generation.words import Word, Words

RUN, PAGE = "run", "report.html"  # in the folder that is written


@dataclass(frozen=True)
class Lesson:
    """What is learned from annotated photos, and where it goes.

    Attributes:
        forms: of the word, as it is compared.
        before: words that the model was taught. shown: the word with its examples; None: none.
        pictures_of: the bytes of the examples' pictures, by their names beside the model.
        none: no words, and the nouns that the model knew ever.
        share: of the photos that is held out. minutes: how long it may take.
    """

    out: Path
    model: str
    data: tuple[str, ...]
    pictures: Path | None
    forms: tuple[str, ...]
    before: Words | None
    shown: Word | None
    pictures_of: Mapping[str, bytes]
    none: Words
    share: float
    minutes: float
    device: str | None
    cache_dir: Path

    def check(self) -> None:
        """Raises: UsageError for a folder that holds other things, and for data without records."""
        if self.out.is_file():
            raise UsageError(f"{self.out} is a file: name a folder to write")
        names = sorted(os.listdir(self.out)) if self.out.is_dir() else []
        if others := [name for name in names if name != RUN]:
            raise UsageError(
                f"{self.out} is not empty, it holds {others[0][:80]}: name a new or empty folder"
            )

    def run(self) -> None:
        """Train, measure on the photos that were held out, and write the model and the page."""
        self._say_labels()
        run = self.out / RUN
        if not self._learn_looks(run):
            self._train(run)
        pipeline = load_pipeline(
            str(run / "model"), self.cache_dir, **precision(None, None, self.device)
        )
        sources = held_out(run)
        report = self._measured(pipeline, sources)
        self._write(run, report, sources, pipeline.words)

    def _learn_looks(self, run: Path) -> bool:
        """Let the finder of a model learn the nouns of the data. Returns: whether that is all that
        they ask about; their language model then stays what it was.
        """
        import torch

        from nanomolmo2.convert.pretrained import load_config
        from nanomolmo2.training.checkpoint import FOLDER
        from nanomolmo2.training.run_folder import MODEL_FOLDER, RECIPE_FILE
        from nanomolmo2.training.split import open_split
        from nanomolmo2.training.word_looks import learns_words, take_words

        if (run / FOLDER).is_dir():
            return False  # a training that goes on
        recipe = replace(self._trainer(run), minutes=None, resume=False).recipe_in(run)
        if not learns_words(recipe, load_config(self.model)):
            return False
        shutil.rmtree(run, ignore_errors=True)
        (run / MODEL_FOLDER).mkdir(parents=True)
        copy_model(model_folder(self.model), run / MODEL_FOLDER)
        if self.before is not None:
            self.before.save(run / MODEL_FOLDER)
        split = open_split(recipe)
        dtype = getattr(torch, recipe.dtype)
        learned = take_words(run / MODEL_FOLDER, split, dtype, say, seed=recipe.seed)
        if learned is None or learned.others:
            shutil.rmtree(run)
            return False
        recipe.save(run / RECIPE_FILE)
        split.save(run)
        return True

    def _train(self, run: Path) -> None:
        from nanomolmo2.training.loop import Stopped

        train = self._trainer(run)
        train.check()
        try:
            train.train_into(run)
        except Stopped as stopped:
            note(f"nanomolmo2: {stopped}; the same command goes on")
            raise SystemExit(stopped.code) from None

    def _trainer(self, run: Path) -> Train:
        from nanomolmo2.cli.train import Train

        options: dict[str, Any] = {"val_share": self.share, "val_limit": 0}
        return Train(
            recipe="",
            data=self.data,
            pictures=self.pictures,
            model=self.model,
            minutes=self.minutes,
            out=run,
            resume=run.is_dir(),
            device=self.device,
            cache_dir=self.cache_dir,
            **options,
        )

    def _say_labels(self) -> None:
        """Say it where the data never point to the word."""
        from nanomolmo2.data.sources import SourceConfig, open_source
        from nanomolmo2.generation.words import key_of

        folder = str(self.pictures or "")
        sources = [open_source(SourceConfig(path, image_folder=folder)) for path in self.data]
        labels = pointed_labels(sources)
        if labels and not {key_of(label) for label in labels} & set(self.forms):
            found = ", ".join(list(labels)[:8])
            note(
                f"warning: nothing in {', '.join(self.data)} points to {self.forms[-1]}: its "
                f"labels are {found}"
            )

    def _measured(self, pipeline: Pipeline, sources: Sequence[Source]) -> Report:
        """The answers about what was held out: the model's own, or those by examples where they
        are better, which it then keeps.
        """
        from nanomolmo2.evaluation import evaluate

        with progress_bars() as bar:
            pipeline.words = learned = self._with_before(pipeline.words)
            report = evaluate(pipeline, [*sources], baselines=True, on_progress=bar("held out"))
            if self.shown is None:
                return report
            words = learned or self.none
            pipeline.words = words.with_word(self.shown, self.pictures_of)
            other = evaluate(pipeline, [*sources], baselines=True, on_progress=bar("by examples"))
        own, by_example = report.mean_score, other.mean_score
        better = by_example > own
        say(
            f"mean score on the photos held out: {own:.3f} as learned, {by_example:.3f} by the "
            f"examples; {'examples are' if better else 'what was learned is'} kept"
        )
        if not better:
            pipeline.words = learned
        return other if better else report

    def _with_before(self, learned: Words | None) -> Words | None:
        """What was learned, and what the model was taught before of other words."""
        if self.before is None:
            return learned
        words = self.before
        for word in () if learned is None else learned.words.values():
            words = words.with_word(word, learned.files if learned is not None else {})
        return words

    def _write(
        self, run: Path, report: Report, sources: Sequence[Source], words: Words | None
    ) -> None:
        from nanomolmo2.evaluation.every_answer import write_every_answer
        from nanomolmo2.generation.words import WORDS_FILE
        from nanomolmo2.training.checkpoint import FOLDER

        about = {"data": ", ".join(self.data), "model": self.model, "held out": f"{self.share:.0%}"}
        write_every_answer(
            self.out / PAGE, report, sources, title="What the model says now", about=about
        )
        (run / "model" / WORDS_FILE).unlink(missing_ok=True)
        if words is not None:
            words.save(self.out)
        names = sorted(os.listdir(run / "model"), key=lambda name: name == "config.json")
        for name in names:  # the last one makes a model of them
            os.replace(run / "model" / name, self.out / name)
        (run / "model").rmdir()
        shutil.rmtree(run / FOLDER, ignore_errors=True)
        say(report.table())
        quoted = shlex.quote(str(self.out))
        say(
            f"wrote {self.out}, and {self.out / PAGE} with every picture that was held out; try it "
            f'with: nanomolmo2 ask PICTURE "How many {self.forms[0]} are there?" --model {quoted}'
        )


def held_out(run: Path) -> list[Source]:
    """What a run did not learn from."""
    from nanomolmo2.training.recipe import Recipe
    from nanomolmo2.training.run_folder import RECIPE_FILE
    from nanomolmo2.training.split import open_split, read_split

    recipe = Recipe.load(run / RECIPE_FILE)
    return open_split(recipe, read_split(run, recipe)).validation


def pointed_labels(sources: Sequence[Source]) -> dict[str, int]:
    """What the records of some sources point to, and how often."""
    from nanomolmo2.data.preflight import some_rows
    from nanomolmo2.data.sources import RecordSource

    found: dict[str, int] = {}
    for source in sources:
        for row in some_rows(source) if isinstance(source, RecordSource) else ():
            branches = row.values.get("branches")
            for branch in branches if isinstance(branches, list) else [row.values]:
                answer = branch.get("answer") if isinstance(branch, Mapping) else None
                pointing = answer if isinstance(answer, Mapping) else branch
                label = pointing.get("label") if isinstance(pointing, Mapping) else None
                if isinstance(label, str) and pointing.get("points"):
                    found[label] = found.get(label, 0) + 1
    return found
