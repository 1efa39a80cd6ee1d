"""What a record says before anything of it is decoded: which of its fields nobody reads, and how
much of a row its pictures and texts need at the least.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from nanomolmo2.processor import Processor

UNREAD_PICTURE = "picture field that is not read"

# ---- fields that are read, and those that are not ----

_IMAGES = frozenset({"image", "images"})
# What evaluation wants to know of the right answer; see docs/evaluation.md.
TRUTH = ("answers", "choices", "boxes", "masks", "radius", "count", "categories", "pair", "scorer")
_BRANCH = frozenset(
    {"messages", "question", "answer", "caption", "task", "truth", *TRUTH}
    | {"points", "label", "mode", "points_scale", "like", "unlike"}
)
FIELDS: dict[str, frozenset[str]] = {
    "own": _IMAGES | _BRANCH | {"video", "branches"},
    "llava": _IMAGES | {"video", "conversations"},
    "cauldron": _IMAGES | {"texts"},
    "pixmo_cap": frozenset({"image", "image_url", "image_sha256", "caption", "transcripts"}),
    "pixmo_points": frozenset(
        {"image", "image_url", "image_sha256", "points", "label", "count", "collection_method"}
    ),
    "cosyn_point": frozenset({"image", "questions", "answer_points", "names"}),
}
READ = frozenset().union(*FIELDS.values())
# What documented data has beside its examples; see docs/emoji-data.md.
_KNOWN = frozenset({"id", "width", "height", "objects", "counts", "truths"})

# Parts of a record by the field that holds them, and what is read of each.
_PARTS = {
    "branches": _BRANCH,
    "messages": frozenset({"role", "content"}),
    "conversations": frozenset({"from", "value"}),
    "texts": frozenset({"user", "assistant"}),
}

_NAME = re.compile(
    r"im(?:age|g)s?(?![a-z])|picture|pictures|photo|pixel|frames?(?![a-z])|videos?(?![a-z])|movie"
    r"|^clips?$|^pics?$|^files?$|file_?(?:name|path)|^paths?$|screenshot|thumbnail",
    re.IGNORECASE,
)
_FILE = re.compile(
    r"(?:\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif|heic|heif|jp2|jxl|ppm|pgm|svg"
    r"|mp4|m4v|mov|webm|mkv|avi|mpe?g|wmv|flv|mts|m2ts|ts|ogv|3gp)(?:[?#]\S*)?\s*$)"
    r"|^data:(?:image|video)/",
    re.IGNORECASE,
)
# Where an object holds the picture that it describes.
_HOLDERS = (
    *("bytes", "path", "url", "src", "file", "filename", "file_name"),
    *("image", "images", "image_url", "image_path", "video"),
)
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\x00", b"MM\x00*", b"RIFF")


def unread_fields(values: Mapping[str, Any], layout: str) -> tuple[list[str], list[str]]:
    """(fields that look like pictures and are not read, other fields that are not read).

    By the name alone a field looks like a picture only where the record shows none.
    """
    known = FIELDS[layout]
    has_picture = any(values.get(name) for name in known & {"image", "images", "video"})
    has_picture |= bool(values.get("image_url")) and "image_url" in known
    shown = [values.get(name) for name in known & {"image", "video"}]
    pictures, others = [], []
    for name, value in values.items():
        if name in known:
            continue
        if isinstance(value, str) and value in shown:  # such as an id that is the path
            others.append(name)
            continue
        if holds_picture(value) or (not has_picture and _NAME.search(name) and _says(value)):
            pictures.append(name)
        elif name not in _KNOWN:
            others.append(name)
    for holder in known & _PARTS.keys():
        for part in _mappings(values.get(holder)):
            for name, value in part.items():
                named = _NAME.search(str(name)) and _says(value) and not has_picture
                if name not in _PARTS[holder] and (named or holds_picture(value)):
                    pictures.append(f"{holder}.{name}")
    return list(dict.fromkeys(pictures)), others


def holds_picture(value: Any) -> bool:
    """Whether a value is, or names, a picture or video, by its ending or its first bytes."""
    if isinstance(value, str):
        return (len(value) < 4096 and bool(_FILE.search(value))) or value[:11] == "data:image/"
    if isinstance(value, (bytes, bytearray)):
        return bytes(value[:12]).startswith(_MAGIC) or bytes(value[4:8]) == b"ftyp"
    if isinstance(value, Mapping):
        return any(holds_picture(value.get(name)) for name in _HOLDERS)
    return isinstance(value, list) and bool(value) and holds_picture(value[0])


def _says(value: Any) -> bool:
    return value is not None and value is not False and value not in ("", [], {}, 0)


def _mappings(values: Any) -> Iterator[Mapping[str, Any]]:
    for value in values if isinstance(values, list) else ():
        if isinstance(value, Mapping):
            yield value


# ---- what a record needs ----

_TEXTS = ("branches", "messages", "content", "text", "question", "answer", "caption")
_TEXTS_OF_OTHERS = ("conversations", "value", "texts", "user", "assistant", "questions")
_LABELS = ("points", "label", "names", "transcripts")


@dataclass(frozen=True)
class Needs:
    """What a record shows and says, by what it declares: pictures, frames listed, a video file."""

    pictures: int
    frames: int
    has_video: bool
    characters: int


def declared(values: Mapping[str, Any], layout: str) -> Needs:
    """What a record needs, without opening anything."""
    images, one, video = (values.get(name) for name in ("images", "image", "video"))
    shown = images if images is not None else one
    pictures = len(shown) if isinstance(shown, list) else int(shown is not None)
    if not pictures and layout.startswith("pixmo"):
        pictures = 1
    frames = video.get("frames") if isinstance(video, Mapping) else None
    known = FIELDS[layout]
    texts = {name: value for name, value in values.items() if name in known}
    return Needs(
        pictures,
        len(frames) if isinstance(frames, list) else 0,
        isinstance(video, str) and "video" in known,
        _characters(texts),
    )


def texts_of(values: Mapping[str, Any], layout: str) -> Iterator[str]:
    """What a record asks and says, and what its points are called, without opening anything."""
    known = FIELDS[layout]
    read = {name: value for name, value in values.items() if name in known}
    return _strings(read, (*_TEXTS, *_TEXTS_OF_OTHERS, *_LABELS))


def _characters(value: Any) -> int:
    return sum(map(len, _strings(value, (*_TEXTS, *_TEXTS_OF_OTHERS))))


def _strings(value: Any, fields: Sequence[str]) -> Iterator[str]:
    """The texts of a value: itself, its items, and those fields of its objects."""
    todo = [value]
    while todo:
        value = todo.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            todo += reversed(value)
        elif isinstance(value, Mapping):
            todo += [value[name] for name in reversed(fields) if name in value]


@dataclass(frozen=True)
class RowLimits:
    """What one row of a training holds, to refuse what can never fit before it is decoded.

    Attributes:
        max_tokens, max_crops: of a row.
        image_tokens, image_crops: that a picture has at the least; ``frame_tokens`` of a frame.
        max_frames: that are taken of a video file; 0: the processor takes none.
        token_length: characters of the longest token.
    """

    max_tokens: int
    max_crops: int
    image_tokens: int = 1
    image_crops: int = 1
    frame_tokens: int = 1
    token_length: int = 1000

    @classmethod
    def of(
        cls,
        processor: Processor | None,
        max_tokens: int,
        max_crops: int,
        visual_tokens: int = 1,
    ) -> Self:
        """Those of a processor; ``visual_tokens``: what the model makes of one image token."""
        if processor is None:
            return cls(max_tokens, max_crops)
        config, crops = processor.config, processor.config.multicrop
        longest = max(map(len, processor.tokenizer.backend.get_vocab()), default=1)
        if crops is None:
            tokens = (config.image_tokens or 1) * visual_tokens
            return cls(max_tokens, max_crops, tokens, 1, tokens, longest)
        side = -(-crops.patches_per_side // crops.pooling_size)
        pooled = config.video.pooling_size if config.video is not None else crops.patches_per_side
        frame = (-(-crops.patches_per_side // pooled)) ** 2
        # An overview and a tile at least.
        return cls(max_tokens, max_crops, side**2, 2, frame, longest)

    def refuse(self, needs: Needs) -> str | None:
        """Why a record can never fit into a row; None if it may."""
        tokens = needs.pictures * self.image_tokens + needs.frames * self.frame_tokens
        crops = needs.pictures * self.image_crops + needs.frames
        what = f"{needs.frames} frames" if needs.frames else f"{needs.pictures} pictures"
        if crops > self.max_crops:
            return f"{what} are at least {crops} crops, and a row holds {self.max_crops}"
        if tokens > self.max_tokens:
            return f"{what} are at least {tokens} tokens, and a row holds {self.max_tokens}"
        if needs.characters > (self.max_tokens - tokens) * self.token_length:
            return (
                f"its texts have {needs.characters:,} characters, more than the "
                f"{self.max_tokens} tokens of a row can hold"
            )
        return None
