"""People's input -> tensors, and ids -> text and points; numpy and PIL, no nets."""

from nanomolmo2.processor.chat import Message
from nanomolmo2.processor.collate import collate
from nanomolmo2.processor.config import PointTokens
from nanomolmo2.processor.crops import MultiCrop
from nanomolmo2.processor.grounding import points_from_ids, points_from_text
from nanomolmo2.processor.image import load_image, preprocess
from nanomolmo2.processor.point import PointsText, join_points
from nanomolmo2.processor.point_space import PointSpace
from nanomolmo2.processor.points import (
    Point,
    format_points,
    format_tracks,
    parse_count,
    parse_points,
    points_to_json,
)
from nanomolmo2.processor.processor import (
    Encoded,
    Processor,
    ProcessorConfig,
    VideoConfig,
    molmo2_processor,
    molmo_point_processor,
)
from nanomolmo2.processor.tokenizer import Tokenizer
from nanomolmo2.processor.video import Video, load_video

__all__ = [
    "Encoded",
    "Message",
    "MultiCrop",
    "Point",
    "PointSpace",
    "PointTokens",
    "PointsText",
    "Processor",
    "ProcessorConfig",
    "Tokenizer",
    "Video",
    "VideoConfig",
    "collate",
    "format_points",
    "format_tracks",
    "join_points",
    "load_image",
    "load_video",
    "molmo2_processor",
    "molmo_point_processor",
    "parse_count",
    "parse_points",
    "points_from_ids",
    "points_from_text",
    "points_to_json",
    "preprocess",
]
