"""Recipe: everything that decides what a training run computes, as one JSON file."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from nanomolmo2.config import Config
from nanomolmo2.data.sources import SourceConfig
from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config
from nanomolmo2.processor.processor import LossWeighting
from nanomolmo2.training.lora import LoraConfig
from nanomolmo2.training.optim import PARTS, OptimConfig

DType = Literal["float32", "bfloat16"]
NEW_WORD = re.compile(r"[^\W\d_]{2,32}")  # letters
FrozenWeights = Literal["", "nf4", "int8"]


# Whose rate is "the" rate of a recipe: that of the first of these which learns.
LEADING = ("llm", "lora", "connector", "embeddings", "vision", "points")
VAL_LOSS, LAST = "val_loss", "last"


@dataclass(frozen=True)
class ValidationConfig(Config):
    """How a run is measured while it goes on. But for ``share``, which takes records away from the
    training, none of it changes a weight.

    Attributes:
        data: what it is measured on; nothing of it is learned from.
        share: in place of that, the share of the pictures of the training data that is held out.
        every: steps between two measurements; 0 = an eighth of the run, at most 500. There is one
            before the first step and one behind the last, too.
        limit: examples whose answers are scored; 0 = only the loss is measured, always on all.
        best: which checkpoint becomes the model: that of the least ``val_loss``, of the highest
            score of a task (its name), or the ``last``.
        patience: measurements in a row without a new best after which the run ends; 0 = never.
    """

    data: tuple[SourceConfig, ...] = ()
    share: float = 0.0
    every: int = 0
    limit: int = 32
    best: str = VAL_LOSS
    patience: int = 0

    def __post_init__(self) -> None:
        for name in ("every", "limit", "patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")
        if not 0 <= self.share < 1:
            raise ValueError(f"share is {self.share}, expected a share of the data, such as 0.1")
        if bool(self.data) == bool(self.share):
            found = "both" if self.data else "neither"
            raise ValueError(
                f"validation has {found} of data and share: give other data, or the share of the "
                f"training data that is held out"
            )
        if self.best == LAST and self.patience:
            raise ValueError("patience waits for a better value, and best is 'last': leave one out")
        if self.best not in (VAL_LOSS, LAST) and not self.limit:
            raise ValueError(f"best is {self.best!r}, a score, and limit is 0: no answer is scored")

    def steps_between(self, steps: int) -> int:
        """Steps between two measurements of a run of so many."""
        return self.every or min(500, -(-steps // 8))


@dataclass(frozen=True)
class Recipe(Config):
    """What is trained, on what, and how. S rows (packs) a step.

    Attributes:
        name: of the recipe, for logs and messages.
        model: whose weights training starts from: a folder, ``tiny``, ``base`` or a name on the
            hub; with ``architecture`` only its processor is used.
        architecture: sizes of a model that starts with fresh weights.
        vision, llm: with ``architecture``: checkpoints of these parts to start from, empty = fresh.
        data: sources and their sampling weights.
        steps: updates.
        batch_size: S, on all processes together.
        micro_batch_size: rows that pass the model at once on each process.
        sequence_length: tokens that a row holds.
        max_crops: crops that a row holds; images, where they are not cut.
        packing_buffer: examples that wait for a row of each slot; more waste less padding.
        replay: share of the examples drawn that comes from what the start model was trained on,
            where its processor says so (`training/replay.py`); 0 = none of it; None = likewise, and
            the run does not report what the model forgets.
        new_words: words that become tokens of a closed vocabulary (`training/new_words.py`); None =
            those that the data have, which are then written here.
        point_head: let a model that writes coordinates as text point by selecting what it sees
            (`training/point_head.py`); one that does stays as it is.
        photos: learn from each picture once for all questions about it, turned, mirrored, lit and
            sized otherwise every time (`data/photos.py`).
        find_weight: of what a model finds all at once, beside its answers, where its design has
            that (`training/find_terms.py`); nouns of the data are then found so. 0 = not at all.
            One that writes coordinates learns the nouns behind the last step, if this is not 0
            (`training/word_looks.py`).
        crop_weight: what a crop is worth beside a token when rows are packed.
        max_bad_fraction: share of examples that may be bad before the run stops.
        train: parts that learn: vision, connector, llm, embeddings, points (what selects visual
            tokens, of models that point so), lora.
        optimisers: rates of every part in ``train``.
        clip_norm: largest norm of the gradient of each part.
        lora: the matrices, if ``train`` has lora; they are merged when the run is done.
        frozen_weights: what the layers beside the matrices are rounded to: ``nf4`` (4.5 bits) or
            ``int8``; empty = ``dtype``.
        residual_dropout: share of what attention and MLP of the decoder add that is left out.
        dropout_at_targets: only at positions whose next token is learned.
        loss_weighting: see `Processor.encode_tree`.
        z_loss: weight of the squared log of the softmax's sum.
        seed: of fresh weights, of the data's order and of dropout.
        dtype: of the arithmetic and of what is frozen; what learns, and moments, are float32.
        gradient_checkpointing: compute activations a second time instead of keeping them.
        compile: torch.compile every block.
        feature_cache: folder for the features of a frozen vision encoder; empty = none.
        log_every, save_every, keep: steps between lines and checkpoints, and how many stay.
        validation: how the run is measured while it goes on; None = not at all.
    """

    RENAMED: ClassVar[dict[str, str]] = {"pool": "packing_buffer", "bad_share": "max_bad_fraction"}

    name: str
    model: str
    data: tuple[SourceConfig, ...]
    steps: int
    architecture: NanoMolmo2Config | None = None
    vision: str = ""
    llm: str = ""
    batch_size: int = 8
    micro_batch_size: int = 1
    sequence_length: int = 2048
    max_crops: int = 16
    packing_buffer: int = 48
    replay: float | None = None
    new_words: tuple[str, ...] | None = ()
    point_head: bool = False
    photos: bool = False
    find_weight: float = 0.0
    crop_weight: float = 1.0
    max_bad_fraction: float = 0.05
    train: tuple[str, ...] = ("connector", "llm")
    optimisers: dict[str, OptimConfig] = field(default_factory=dict)
    clip_norm: float = 1.0
    lora: LoraConfig | None = None
    frozen_weights: FrozenWeights = ""
    residual_dropout: float = 0.0
    dropout_at_targets: bool = False
    loss_weighting: LossWeighting = "token"
    z_loss: float = 0.0
    seed: int = 0
    dtype: DType = "float32"
    gradient_checkpointing: bool = False
    compile: bool = False
    feature_cache: str = ""
    log_every: int = 1
    save_every: int = 200
    keep: int = 2
    validation: ValidationConfig | None = None

    def __post_init__(self) -> None:
        self.check_positive(but=("seed",))
        kinds = {"loss_weighting": LossWeighting, "dtype": DType, "frozen_weights": FrozenWeights}
        for name, kind in kinds.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of "
                    f"{', '.join(get_args(kind))}"
                )
        if not 0 <= self.residual_dropout < 1:
            raise ValueError(
                f"residual_dropout is {self.residual_dropout}, expected 0 (off) to less than 1"
            )
        if self.replay is not None and not 0 <= self.replay < 1:
            raise ValueError(
                f"replay is {self.replay}, expected a share of the examples from 0 to below 1"
            )
        for word in self.new_words or ():
            if not NEW_WORD.fullmatch(word):
                raise ValueError(f"new_words has {word!r:.60}, expected words of 2 to 32 letters")
        if not 0 <= self.find_weight < float("inf"):
            raise ValueError(f"find_weight is {self.find_weight}, expected 0 (off) or more")
        if not 0 <= self.max_bad_fraction < 1:
            raise ValueError(
                f"max_bad_fraction is {self.max_bad_fraction}, expected a share from 0 to below 1"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}, expected 0 to {2**32 - 1}")
        unknown = [part for part in self.train if part not in PARTS]
        if unknown or not self.train:
            raise ValueError(f"train is {self.train}, expected at least one of {', '.join(PARTS)}")
        for part in self.train:
            if part not in self.optimisers:
                raise ValueError(
                    f"{part} is to be trained, but optimisers has only "
                    f"{', '.join(self.optimisers) or 'nothing'}: give its rates"
                )
        if ("lora" in self.train) != (self.lora is not None):
            raise ValueError(
                "lora and train disagree: name lora in train and give its LoraConfig, or neither"
            )
        if self.frozen_weights and self.lora is None:
            raise ValueError(
                f"frozen_weights is {self.frozen_weights!r}, but nothing stands beside them: name "
                f"lora in train and give its LoraConfig"
            )
        if "lora" in self.train and "llm" in self.train:
            raise ValueError("train names llm and lora: LoRA leaves the llm as it is, choose one")
        if self.feature_cache and "vision" in self.train:
            raise ValueError("feature_cache needs a frozen vision encoder: take it out of train")
        if self.point_head and self.architecture is not None:
            raise ValueError(
                "point_head is for a model that was trained, and architecture says the sizes of a "
                "fresh one: give that a point_config instead"
            )
        if (self.vision or self.llm) and self.architecture is None:
            raise ValueError("vision and llm are the parts of an architecture: give that too")

    @property
    def leading_part(self) -> str:
        """The part whose rate stands for all: the decoder, its LoRA, or what learns instead."""
        return next(part for part in LEADING if part in self.train)

    def differences(self, other: Recipe) -> list[str]:
        """Fields that would make ``other`` compute something else; lengths do not count here."""
        ignored = {"steps", "log_every", "save_every", "keep", "feature_cache", "max_bad_fraction"}
        ignored |= {"validation"}
        own, others = (
            dataclasses.replace(one, data=tuple(source.with_all_options() for source in one.data))
            for one in (self, other)
        )
        if self.new_words is None or other.new_words is None:  # they follow from the data
            ignored.add("new_words")
        shares = [one.validation.share if one.validation else 0.0 for one in (self, other)]
        return [
            f.name
            for f in dataclasses.fields(self)
            if f.name not in ignored and getattr(own, f.name) != getattr(others, f.name)
        ] + (["validation.share"] if shares[0] != shares[1] else [])
