"""People's input -> tensors, and ids -> text and points; numpy and PIL, no nets."""

from nanomolmo2.processor.chat import Message
from nanomolmo2.processor.collate import collate
from nanomolmo2.processor.image import load_image, preprocess
from nanomolmo2.processor.points import Point, format_points, parse_count, parse_points
from nanomolmo2.processor.processor import Encoded, Processor, ProcessorConfig
from nanomolmo2.processor.tokenizer import Tokenizer

__all__ = [
    "Encoded",
    "Message",
    "Point",
    "Processor",
    "ProcessorConfig",
    "Tokenizer",
    "collate",
    "format_points",
    "load_image",
    "parse_count",
    "parse_points",
    "preprocess",
]
