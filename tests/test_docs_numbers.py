"""Numbers in the documentation that follow from the code: computed here, looked for there.

A claim is a sentence of a page with `{}` where its numbers stand, and the numbers. Where the code
changes one, the test says which sentence tells another. What was measured is not looked for here:
it stands once, with the command and the machine, and other pages refer to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from nanomolmo2.accelerate.flex import DENSE_LENGTH, QUERY_BLOCK
from nanomolmo2.emoji.benchmark import BENCHMARK_ROWS, BENCHMARK_SCENES
from nanomolmo2.emoji.clips import ClipConfig
from nanomolmo2.emoji.exam import ROWS, SCENE_TASKS
from nanomolmo2.emoji.model import GROWN_LAYERS
from nanomolmo2.emoji.plans import SCALES, SEVERAL
from nanomolmo2.emoji.scenes import SETTINGS, SceneConfig
from nanomolmo2.emoji.sprites import CATEGORIES, STYLE_GROUPS
from nanomolmo2.emoji.wordings import QUESTIONS, TEST_SHARE
from nanomolmo2.generation.invariant import ROW_BLOCK
from nanomolmo2.generation.prefix_cache import DEFAULT_BYTES
from nanomolmo2.models import (
    ConnectorConfig,
    LLMConfig,
    MultimodalConnector,
    NanoMolmo2,
    VisionConfig,
    preset,
)
from nanomolmo2.processor import MultiCrop, VideoConfig
from nanomolmo2.processor.video import MAX_VIDEO_BYTES, sample_times
from nanomolmo2.recipes import RECIPES, recipe
from nanomolmo2.training.loop import LoopConfig
from nanomolmo2.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "nanomolmo2" / "assets" / "tiny" / "model.safetensors"
WORDS = [*("no", "one", "two", "three", "four", "five", "six", "seven", "eight"), "nine", "ten"]
WORDS += ["eleven", "twelve"]
PARTS = ("vision_encoder", "connector", "llm")
STAGES = [name for name in vars(SCALES["full"]) if isinstance(getattr(SCALES["full"], name), int)]
STAGES = [name for name in STAGES if name not in ("batch_size", "compiled")]


class Claim(NamedTuple):
    page: str
    sentence: str
    numbers: tuple[str, ...]


def claim(page: str, sentence: str, *values: int | float | str) -> Claim:
    """Integers are written as the pages write them: 17,540. Those of shapes, 4304, come as text."""
    return Claim(page, sentence, tuple(f"{v:,}" if isinstance(v, int) else str(v) for v in values))


@cache
def parameters(name: str) -> dict[str, int]:
    """Of a preset: how many in each part, and in all."""
    with torch.device("meta"):
        model = NanoMolmo2(preset(name))
    counts = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in PARTS}
    return {**counts, "all": sum(p.numel() for p in model.parameters())}


def of_connector(kind: str) -> int:
    with torch.device("meta"):
        connector = MultimodalConnector(ConnectorConfig(connector_type=kind))  # type: ignore[arg-type]
    return sum(p.numel() for p in connector.parameters())


def steps(scale: str) -> dict[str, int]:
    """Of the stages that a scale of tiny's recipe has."""
    found = {name: getattr(SCALES[scale], name) for name in STAGES}
    return {name: count for name, count in found.items() if count}


def millions(count: int, digits: int = 1) -> str:
    return f"{count / 1e6:,.{digits}f}"


def gigabytes(count: int, digits: int = 1) -> str:
    return f"{count / 1e9:.{digits}f}"


def of_recipe(name: str) -> tuple[int, int, int]:
    made: Recipe = recipe(name)
    return made.steps, made.batch_size, made.sequence_length


def presets_claims() -> list[Claim]:
    base, tiny = parameters("nanomolmo2"), parameters("tiny")
    claims = [
        claim("models.md", f"| `{name}` | {rest} | {{}} |", parameters(name)["all"])
        for name, rest in {
            "nanomolmo2": "Qwen3-0.6B-Base, the base design above",
            "nanomolmo2-pooling": "Qwen3-0.6B-Base with 128 more tokens",
            "molmo2-4b": "Qwen3-4B-Instruct-2507",
            "molmo2-8b": "Qwen3-8B",
            "tiny": "the bundled model, [tiny.md](tiny.md)",
        }.items()
    ]
    rows = {"vision_encoder": "Vision Encoder | no", "llm": "Language Model | yes"}
    rows["connector"] = "Connector (linear) | yes"
    claims += [claim("models.md", f"| {row} | {{}} |", base[part]) for part, row in rows.items()]
    linear, mlp, resampler = map(of_connector, ("linear", "mlp", "resampler"))
    shapes = (millions(linear), millions(mlp), millions(resampler))
    vision, llm = VisionConfig(), LLMConfig()
    heads = (llm.num_attention_heads, llm.num_key_value_heads, llm.head_dim)
    queries = ConnectorConfig().num_query_tokens
    return [
        *claims,
        claim("models.md", "| **Total** | | **{}** |", base["all"]),
        claim("models.md", "So400m/14, {} M parameters", millions(base["vision_encoder"], 0)),
        claim("models.md", "Qwen3-0.6B-Base, {} M parameters", millions(base["llm"], 0)),
        claim("models.md", "linear {} M | mlp {} M | resampler {} M", *shapes),
        claim("models.md", "| `linear` | {} |", linear),
        claim("models.md", "| `mlp` | {} |", mlp),
        claim("models.md", "| `resampler` | {} | {} learned queries", resampler, queries),
        claim("models.md", "inner width {} |", str(ConnectorConfig().hidden_dim)),
        claim(
            "models.md",
            "| picture, patch, patches | {}, {}, {} x {} = {} |",
            vision.image_size,
            vision.patch_size,
            *[vision.patches_per_side] * 2,
            vision.num_patches,
        ),
        claim(
            "models.md",
            "| width, MLP, layers, heads | {}, {}, {}, {} |",
            str(vision.hidden_size),
            str(vision.intermediate_size),
            vision.num_hidden_layers,
            vision.num_attention_heads,
        ),
        claim("models.md", "| parameters | {} with the final norm", base["vision_encoder"]),
        claim(
            "models.md",
            "| width, MLP, layers | {}, {}, {} |",
            str(llm.hidden_size),
            str(llm.intermediate_size),
            llm.num_hidden_layers,
        ),
        claim("models.md", "width of a head | {}, {}, {} |", *heads),
        claim(
            "models.md",
            "RoPE base | {}, {}, {} |",
            llm.vocab_size,
            llm.max_position_embeddings,
            int(llm.rope_theta),
        ),
        claim("models.md", "| parameters | {}; the head shares", base["llm"]),
        claim(
            "models.md",
            "{} rows after the base vocabulary",
            preset("molmo2-4b").llm_config.additional_vocab_size,
        ),
        claim(
            "weights.md",
            "siglip2_so400m_384.pt {} GB, float32",
            gigabytes(4 * base["vision_encoder"], 2),
        ),
        claim("weights.md", "qwen3_0.6b_base.pt {} GB, bfloat16", gigabytes(2 * base["llm"], 2)),
        claim(
            "weights.md",
            "The 4B files are float32, {} GB",
            gigabytes(4 * parameters("molmo2-4b")["all"]),
        ),
        claim("tiny.md", "model of {} million parameters", millions(tiny["all"])),
        claim("tiny.md", "(bfloat16, {} MB)", millions(WEIGHTS.stat().st_size)),
    ]


def recipes_claims() -> list[Claim]:
    full, size = sum(steps("full").values()), SCALES["full"].batch_size
    loop = LoopConfig()
    tuned = recipe("finetune")
    claims = [
        claim("training.md", f"| `{name}` | {{.}} | {{.}} | {{}} x {{}} x {{}} |", *of_recipe(name))
        for name in RECIPES
        if name != "finetune"
    ]
    stages = [
        claim("tiny.md", f"| {name} | {{}} | {{}} {'crops' * crops}", count, size * 4**crops)
        for name, count in steps("full").items()
        for crops in [name in ("crops", "varied")]
    ]
    small = ", ".join(f"{name} {{}}" for name in steps("small"))
    return [
        *claims,
        *stages,
        claim("training.md", "| `tiny` | {.} | {.} | {} x {} pictures |", full, size),
        claim("training.md", "| {} x {} x {} (`tiny`) |", *of_recipe("finetune")),
        claim("training.md", "After {} steps, the default", tuned.steps),
        claim("training.md", "here to step {}", recipe("smoke").steps),
        claim("training.md", "`tiny` logs a mean every {} steps", loop.log_every),
        claim("training.md", "The newest {} checkpoints stay", WORDS[loop.keep]),
        claim("tiny.md", "all {} steps", full),
        claim(
            "tiny.md",
            f"{small} steps, of {{}} pictures",
            *steps("small").values(),
            SCALES["small"].batch_size,
        ),
        claim("tiny.md", "beyond {} tokens", SEVERAL.clip_capacity),
        claim(
            "tiny.md",
            "the decoder had {} layers. The {} that it grows",
            WORDS[preset("tiny").llm_config.num_hidden_layers - len(GROWN_LAYERS)],
            WORDS[len(GROWN_LAYERS)],
        ),
    ]


def emoji_claims() -> list[Claim]:
    tiny = preset("tiny")
    vision, connector, llm = tiny.vision_config, tiny.connector, tiny.llm_config
    counts = [len(wordings) for wordings in QUESTIONS.values()]
    goals = sum(len(row.goals) for row in ROWS.values())
    scene = SceneConfig()
    settings = [
        claim(
            "emoji-data.md",
            f"| `{name}` | {{}} px | {{}} to {{}} of {{}} to {{}} px |",
            one.size,
            one.min_objects,
            one.max_objects,
            int(one.min_px),
            int(one.max_px),
        )
        for name, one in SETTINGS.items()
        if name not in ("clutter", "photos")  # "as `easy`"
    ]
    for name in ("clutter", "photos"):
        same = {"size", "min_objects", "max_objects", "min_px", "max_px"}
        assert all(getattr(SETTINGS[name], s) == getattr(SETTINGS["easy"], s) for s in same)
    cluttered = SETTINGS["clutter"].clutter
    return [
        *settings,
        claim(
            "emoji-data.md",
            "overlap by up to half; {} % of each thing",
            round(100 * SETTINGS["occluded"].min_visible),
        ),
        claim("emoji-data.md", "{} to {} shapes, lines", cluttered // 2, cluttered),
        claim("emoji-data.md", "on {} test scenes of seed 0", BENCHMARK_SCENES),
        claim("emoji-data.md", "out for all {}", BENCHMARK_SCENES),
        claim("emoji-data.md", "of {} tasks", WORDS[len(SCENE_TASKS)]),
        claim("emoji-data.md", "the mean of {} rows", WORDS[len(BENCHMARK_ROWS)]),
        claim("emoji-data.md", "has the {} styles of `seen`", WORDS[len(STYLE_GROUPS["seen"])]),
        claim(
            "tiny.md",
            "{} kinds of things, as emoji, {} to {} in a picture",
            len(CATEGORIES),
            WORDS[scene.min_objects],
            WORDS[scene.max_objects],
        ),
        claim("tiny.md", "has {} to {} wordings", min(counts), max(counts)),
        claim("tiny.md", "One in {} is kept out", WORDS[TEST_SHARE]),
        claim("tiny.md", "| seen | {} styles", WORDS[len(STYLE_GROUPS["seen"])]),
        claim("tiny.md", "| extra | {} styles", WORDS[len(STYLE_GROUPS["extra"])]),
        claim("tiny.md", "of {} goals are met", goals),
        claim(
            "tiny.md",
            "{} scenes of one to six emoji in each art group, {} pairs, {} videos of {} frames",
            1000,
            500,
            100,
            ClipConfig().max_frames,
        ),
        claim(
            "tiny.md",
            "| picture, or frame of a video | {} x {}, patches of {}: {} |",
            vision.image_size,
            vision.image_size,
            vision.patch_size,
            vision.num_patches,
        ),
        claim(
            "tiny.md",
            "| vision encoder | width {}, {} layers, {} heads |",
            vision.hidden_size,
            vision.num_hidden_layers,
            vision.num_attention_heads,
        ),
        claim(
            "tiny.md",
            "attention pooling over {} x {} patches: {} visual tokens",
            connector.pooling_size,
            connector.pooling_size,
            tiny.num_visual_tokens,
        ),
        claim(
            "tiny.md",
            "| language model | width {}, {} layers, {} query and {} key/value heads |",
            llm.hidden_size,
            llm.num_hidden_layers,
            llm.num_attention_heads,
            llm.num_key_value_heads,
        ),
    ]


def readme_claims() -> list[Claim]:
    """Its counts, and what it repeats of other pages."""
    base, tiny = parameters("nanomolmo2"), parameters("tiny")
    rows = re.findall(
        r"\| (count exact, all|point F1)[^|]*\|([^|]+)\|[^|]+\|([^|]+)", text_of("tiny.md")
    )
    scores = {name: (seen.split()[0][1:], openmoji.split()[0][1:]) for name, seen, openmoji in rows}
    (count, other_count), (points, other_points) = scores["count exact, all"], scores["point F1"]
    return [
        claim("README.md", "trained model of {} M parameters", millions(tiny["all"])),
        claim("README.md", "`tiny` knows {} kinds of emoji", len(CATEGORIES)),
        claim(
            "README.md",
            "base design: {} M parameters, of which the {} M",
            millions(base["all"], 0),
            millions(base["vision_encoder"], 0),
        ),
        claim("README.md", "count for .{} of the questions", count),
        claim("README.md", "with an F1 of .{}. On", points),
        claim("README.md", "these are .{} and .{}.", other_count, other_points),
        claim(
            "README.md",
            "{} of transformers' time for an image, {} for a prompt of 793 tokens and {} for a",
            measured("vision, one picture, float32"),
            measured("prefill of 793 tokens, float32"),
            measured("decode at 793 tokens, float32"),
        ),
        claim(
            "README.md",
            "With int8 weights these are {}, {} and {}.",
            measured("vision, one picture, int8"),
            measured("prefill of 793 tokens, int8"),
            measured("decode at 793 tokens, int8"),
        ),
        claim(
            "README.md",
            "A training step takes {} of the time and {} of the memory",
            measured("training step of 857 tokens, 127 learned, AdamW"),
            measured("training step of 857 tokens, 127 learned, AdamW: peak"),
        ),
    ]


def accelerate_claims() -> list[Claim]:
    return [
        claim("accelerate.md", "Rows of more than {} positions", DENSE_LENGTH),
        claim("accelerate.md", "elsewhere blocks of {} queries", QUERY_BLOCK),
    ]


def measured(row: str) -> str:
    """The ratio to transformers on 1 thread, from the table of docs/performance.md."""
    cells = text_of("performance.md").partition(f"| {row} |")[2]
    ratio = re.search(r"\*\*([\d.]+)\*\*", cells)
    assert ratio is not None, row
    return ratio[1]


def processor_claims() -> list[Claim]:
    cut, video = MultiCrop(), VideoConfig()
    side = cut.image_size // cut.patch_size
    a_frame = (side // video.pooling_size) ** 2
    with_time = a_frame + 2 + 5  # the marks, and four to six tokens of time
    ten = len(sample_times(10.0))
    held = MAX_VIDEO_BYTES // (3 * 1920 * 1080)
    llm = LLMConfig()
    numbers = 2 * llm.num_hidden_layers * llm.num_key_value_heads * llm.head_dim
    return [
        claim("processor.md", "tiles of {} x {} pixels", cut.image_size, cut.image_size),
        claim("processor.md", "pools {} x {} patches", cut.pooling_size, cut.pooling_size),
        claim("processor.md", "# (crops, {}, {}) float32", side * side, 3 * cut.patch_size**2),
        claim("processor.md", "- {} crops are the budget", cut.max_crops),
        claim("processor.md", "`<im_start>`, {} tokens (windows of {} x {})", a_frame, 3, 3),
        claim("video.md", "more than `max_frames` ({})", video.max_frames),
        claim("video.md", "`max_fps` ({}) sets the step", video.max_fps),
        claim("video.md", "a frame is {} image tokens", a_frame),
        claim("video.md", "about {} together: ten seconds are {} frames", with_time, ten),
        claim("video.md", "frames or {} tokens, {} frames", round_to(ten * with_time, 50), 384),
        claim("video.md", "{} frames about {}", 384, round_to(384 * with_time, 1000)),
        claim("video.md", "cuts frames to {} x {}", cut.image_size, cut.image_size),
        claim("video.md", "fit into {} GB ({} frames of", gigabytes(MAX_VIDEO_BYTES), held),
        claim("generation.md", "in blocks of {} rows", ROW_BLOCK),
        claim("generation.md", "({} GiB; 0 turns it off)", DEFAULT_BYTES >> 30),
        claim("generation.md", "takes {} kB in float32", round(4 * numbers / 1e3)),
        claim("quantisation.md", "Qwen3-0.6B has {})", numbers),
    ]


def round_to(number: int, unit: int) -> int:
    return round(number / unit) * unit


MAKERS: list[Callable[[], list[Claim]]] = [
    readme_claims,
    presets_claims,
    recipes_claims,
    emoji_claims,
    accelerate_claims,
    processor_claims,
]


@cache
def text_of(page: str) -> str:
    """A page of docs/, or the README, in one line: sentences go on where a line ends."""
    path = ROOT / page if page in ("README.md", "CONTRIBUTING.md") else ROOT / "docs" / page
    return " ".join(path.read_text(encoding="utf-8").split())


def found_in(page: str, sentence: str) -> list[tuple[str, ...]]:
    """The numbers where the sentence stands. ``{}`` is one of them, ``{.}`` a cell of a table."""
    pattern = re.escape(" ".join(sentence.split())).replace(r"\{\.\}", "[^|]*")
    pattern = pattern.replace(r"\{\}", r"(\d[\d,.]*\d|\w+)")
    found = re.findall(pattern, text_of(page))
    return [one if isinstance(one, tuple) else (one,) for one in found]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_pages_tell_what_the_code_says(make: Callable[[], list[Claim]]) -> None:
    wrong = []
    for page, sentence, wanted in make():
        found = found_in(page, sentence)
        if not found:
            wrong.append(f"{page} does not say {sentence!r} any more: change the claim with it")
        wrong += [f"{page}: {sentence!r} has {one}, not {wanted}" for one in found if one != wanted]
    assert not wrong, "\n".join(wrong)


def test_the_hours_of_training_are_the_sum_of_their_table() -> None:
    """Three pages once told three durations: now one does, and it follows from its own table."""
    before, _, _ = text_of("tiny.md").partition("### Finding")
    table = re.findall(r"\| (\w+) \| ([\d,]+) \| [\w ,]+ \| ([\d.]+) [|(]", before)
    measured = {stage: float(seconds) for stage, _, seconds in table}
    assert list(measured) == list(steps("full"))
    hours = sum(count * measured[stage] for stage, count in steps("full").items()) / 3600
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    told = {
        (page.name, number)
        for page in pages
        if page.name != "log.md"
        for number in re.findall(r"([\w.]+) hours?\b", text_of(page.name))
        if re.fullmatch(r"[\d.]+|" + "|".join(WORDS), number)
    }
    assert told == {("tiny.md", f"{hours:.1f}")}
