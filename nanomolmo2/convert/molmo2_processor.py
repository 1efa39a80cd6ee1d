"""The processor files of Molmo2 folders <-> Processor.

A folder that we wrote also holds our own settings in ``nanomolmo2_processor.json``, which are read
first: Molmo2's files can not say everything that a processor of ours may do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from nanomolmo2.convert.folder import write_json
from nanomolmo2.convert.molmo2 import OFFICIAL_PROCESSOR_NAME, PREPROCESSOR_NAME, read_if_there
from nanomolmo2.convert.reference_config import from_table, require, square
from nanomolmo2.convert.remote_code import auto_map
from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config
from nanomolmo2.processor.config import PointTokens
from nanomolmo2.processor.crops import MultiCrop
from nanomolmo2.processor.processor import (
    TOKENIZER_FILE,
    Processor,
    ProcessorConfig,
    VideoConfig,
)
from nanomolmo2.processor.tokenizer import Tokenizer
from nanomolmo2.processor.visual import DETAILS_START, ROW_END

OWN_NAME = "nanomolmo2_processor.json"
VIDEO_NAME = "video_preprocessor_config.json"
TEMPLATE_NAME = "chat_template.jinja"
TEMPLATE = Path(__file__).parents[1] / "assets" / "molmo2" / TEMPLATE_NAME

BOS = "<|im_end|>"  # Molmo2 begins a prompt with the token that also ends an answer

# How the released models lay out their tokens, which a folder without the file is taken to be.
_LAYOUT = {
    "image_use_col_tokens": ((True,), "the high-resolution view has a column token a row"),
    "use_single_crop_col_tokens": ((False,), "the overview has no column tokens"),
    "use_single_crop_start_token": ((True,), "the overview has a start token of its own"),
    "video_use_col_tokens": ((False,), "frames have no column tokens"),
}
# What a file that is there means by leaving a field out; None is not what was released.
_LAYOUT_DEFAULTS = {
    "image_use_col_tokens": True,
    "use_single_crop_col_tokens": None,
    "use_single_crop_start_token": True,
    "video_use_col_tokens": False,
    "use_frame_special_tokens": True,
}
# Whether the tokens of an overview are others than those of the tiles, as in MolmoPoint.
OWN_OVERVIEW = "use_low_res_token_for_global_crops"
_BILINEAR = 2  # PIL's number
_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")


def read_molmo2_processor(
    directory: str | Path, points_of: Callable[[Tokenizer], PointTokens] | None = None
) -> Processor:
    """Read the processor of a Molmo2 folder, ours or an official one.

    points_of: how the model of an official MolmoPoint folder writes points.

    Raises: FileNotFoundError; ValueError for settings that are not built here.
    """
    directory = Path(directory)
    tokenizer = Tokenizer.from_file(directory / TOKENIZER_FILE)
    if (directory / OWN_NAME).exists():
        return Processor(ProcessorConfig.load(directory / OWN_NAME), tokenizer)
    points = None if points_of is None else points_of(tokenizer)
    processor = read_if_there(directory / OFFICIAL_PROCESSOR_NAME)
    image = processor.get("image_processor") or read_if_there(directory / PREPROCESSOR_NAME)
    if not image:
        raise FileNotFoundError(
            f"{directory} holds no {PREPROCESSOR_NAME}: copy the processor's files of the "
            f"checkpoint too, or load the model alone with NanoMolmo2.from_pretrained"
        )
    video = processor.get("video_processor") or read_if_there(directory / VIDEO_NAME)
    try:
        return Processor(_processor_config(processor, image, video, points), tokenizer)
    except ValueError as error:
        raise ValueError(f"the processor's files in {directory}: {error}") from None


# What is written: a constant, or what gives the value from the settings of images or videos.
_WRITTEN_BOTH: dict[str, Any] = {
    "processor_class": "Molmo2Processor",
    **dict.fromkeys(_STEPS, True),
    "size": lambda crops: {"height": crops.image_size, "width": crops.image_size},
    "resample": _BILINEAR,
    "rescale_factor": 1 / 255,
    "image_mean": lambda crops: list(crops.image_mean),
    "image_std": lambda crops: list(crops.image_std),
    "patch_size": attrgetter("patch_size"),
}
_WRITTEN_IMAGES: dict[str, Any] = {
    "max_crops": attrgetter("max_crops"),
    "overlap_margins": lambda crops: list(crops.overlap_margins),
    "pooling_size": lambda crops: [crops.pooling_size] * 2,
}
_WRITTEN_VIDEOS: dict[str, Any] = {
    "pooling_size": lambda video: [video.pooling_size] * 2,
    "num_frames": attrgetter("max_frames"),
    "max_fps": attrgetter("max_fps"),
    "sampling_fps": 2,
    "frame_sample_mode": "uniform_last_frame",
}
_WRITTEN_TOKENIZER: dict[str, Any] = {
    # Reads tokenizer.json as it is, in every version of transformers.
    "tokenizer_class": "PreTrainedTokenizerFast",
    "processor_class": "Molmo2Processor",
    "bos_token": BOS,
    "eos_token": BOS,
    "pad_token": attrgetter("pad_token"),
    "add_bos_token": False,
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "padding_side": "left",
}


def write_molmo2_processor(processor: Processor, directory: Path, config: NanoMolmo2Config) -> None:
    """Write the official files, as near as they can say it, and our own settings."""
    settings = processor.config
    crops = settings.multicrop or _nearest_crops(settings, config)
    video = settings.video or VideoConfig()
    if settings.multicrop is None:  # a frame is seen as a picture is
        video = replace(video, pooling_size=crops.pooling_size)
    both = from_table(_WRITTEN_BOTH, crops)
    images = from_table(_WRITTEN_IMAGES, crops)
    videos = from_table(_WRITTEN_VIDEOS, video)
    files = {
        PREPROCESSOR_NAME: {
            "image_processor_type": "Molmo2ImageProcessor",
            "auto_map": auto_map("AutoProcessor", "AutoImageProcessor"),
            **both,
            **images,
        },
        VIDEO_NAME: {
            "video_processor_type": "Molmo2VideoProcessor",
            "auto_map": auto_map("AutoProcessor", "AutoVideoProcessor"),
            **both,
            **videos,
        },
        OFFICIAL_PROCESSOR_NAME: {
            "processor_class": "Molmo2Processor",
            "auto_map": auto_map("AutoProcessor"),
            **{name: accepted[0] for name, (accepted, _) in _LAYOUT.items()},
            "use_frame_special_tokens": video.use_frame_special_tokens,
            **_overview(settings),
        },
        "tokenizer_config.json": {
            **from_table(_WRITTEN_TOKENIZER, settings),
            "model_max_length": config.llm_config.max_position_embeddings,
        },
    }
    processor.tokenizer.save(directory / TOKENIZER_FILE)
    settings.save(directory / OWN_NAME)
    for name, values in files.items():
        write_json(directory / name, values)
    (directory / TEMPLATE_NAME).write_text(TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")


def _overview(settings: ProcessorConfig) -> dict[str, bool]:
    """Molmo2's files do not know the setting."""
    points = settings.points
    return {} if points is None else {OWN_OVERVIEW: points.overview_token is not None}


def _nearest_crops(settings: ProcessorConfig, config: NanoMolmo2Config) -> MultiCrop:
    """What is nearest to one view of an image: an overview, and a single crop of the same."""
    return MultiCrop(
        max_crops=1,
        image_size=settings.image_size,
        patch_size=config.vision_config.patch_size,
        overlap_margins=(0, 0),
        pooling_size=config.connector.pooling_size,
        image_mean=settings.image_mean,
        image_std=settings.image_std,
    )


def what_official_files_cannot_say(processor: Processor) -> str | None:
    """How the images or prompts of a processor differ from Molmo2's; None if they do not."""
    settings = processor.config
    parts = []
    if settings.multicrop is None:
        side = settings.image_size
        parts.append(f"a picture is one view of {side} x {side} pixels without crops")
    if settings.chat_format != "molmo2":
        parts.append(f"the chat format is {settings.chat_format!r}")
    if settings.image_token != ProcessorConfig.molmo2().image_token:
        parts.append(f"the image token is {settings.image_token!r}")
    return " and ".join(parts) or None


def changed_layout(settings: ProcessorConfig, config: NanoMolmo2Config) -> str | None:
    """How other programs lay out a picture of a processor without crops; None if as it does."""
    if settings.multicrop is not None:
        return None
    crops = _nearest_crops(settings, config)
    rows = -(-crops.patches_per_side // crops.pooling_size)
    own = (settings.image_tokens or config.num_visual_tokens) + 2
    overview, tile = rows * rows + 2, rows * (rows + 1) + 2
    start, end = settings.image_start_token, settings.image_end_token
    return (
        f"they show it twice: as an overview (`{start}` to `{end}`), which is all that nanomolmo2 "
        f"shows, and once more as a tile (`{DETAILS_START}` to `{end}`) of {rows} rows that end "
        f"with `{ROW_END}`, {overview + tile} tokens for {own}; they shrink it without antialias; "
        f"and a frame of a video begins with `{DETAILS_START}` for `{start}`"
    )


def _processor_config(
    processor: Mapping[str, Any],
    image: Mapping[str, Any],
    video: Mapping[str, Any],
    points: PointTokens | None,
) -> ProcessorConfig:
    layout = {**_LAYOUT_DEFAULTS, **processor}
    if not processor:
        layout = {name: accepted[0] for name, (accepted, _) in _LAYOUT.items()}
    for name, (accepted, reason) in _LAYOUT.items():
        require(layout, name, accepted, reason)
    own_token = points is not None and points.overview_token is not None
    require(
        layout, OWN_OVERVIEW, (own_token, None), "config.json says which tokens an overview has"
    )
    _check_images(image)
    size = _side(image.get("size", {"height": 378, "width": 378}))
    frames: dict[str, Any] = {
        "use_frame_special_tokens": layout.get("use_frame_special_tokens", points is not None)
    }
    if video:
        _check_images(video)
        if _side(video.get("size", {"height": size, "width": size})) != size:
            raise ValueError(f"size: pictures have {size} pixels a side and frames other ones")
        frames |= _given(
            {"num_frames": "max_frames", "max_fps": "max_fps", "pooling_size": "pooling_size"},
            video,
        )
    crops = {
        "image_size": size,
        **_given(
            {
                name: name
                for name in (
                    *("max_crops", "patch_size", "overlap_margins", "pooling_size"),
                    *("image_mean", "image_std"),
                )
            },
            image,
        ),
    }
    return ProcessorConfig.molmo2(
        multicrop=MultiCrop.from_dict(crops),
        video=VideoConfig.from_dict(frames),
        points=points,
        stop_tokens=(BOS,),
    )


def _given(names: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a file has, by our names; both sides of a window are one number here."""
    found = {ours: values[theirs] for theirs, ours in names.items() if theirs in values}
    if "pooling_size" in found:
        found["pooling_size"] = square("pooling_size", found["pooling_size"])
    return found


def _check_images(values: Mapping[str, Any]) -> None:
    for name in _STEPS:
        require(values, name, (True, None), "every picture goes through all steps")
    require(values, "resample", (_BILINEAR, None), "pictures are resized bilinearly")
    factor = values.get("rescale_factor")
    if factor is not None and abs(factor * 255 - 1) > 1e-6:
        raise ValueError(f"rescale_factor is {factor}, expected 1/255")


def _side(size: object) -> object:
    """Side of a square; a wrong type is found where the settings are built."""
    if not isinstance(size, Mapping) or not size.get("height") or "width" not in size:
        raise ValueError(f"size is {size!r}, expected height and width in pixels")
    return square("size", [size["height"], size["width"]])
