"""`VLM` under the name that it had before."""

from nanomolmo2.generation.answer import Answer
from nanomolmo2.generation.question import Question
from nanomolmo2.generation.text_stream import TextStream
from nanomolmo2.generation.vlm import VLM as Pipeline

__all__ = ["Answer", "Pipeline", "Question", "TextStream"]
