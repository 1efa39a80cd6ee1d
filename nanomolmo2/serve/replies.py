"""What the server answers, as the OpenAPI schema tells it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field


class ErrorFields(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorFields


class PointFields(BaseModel):
    """A point: in an image (its number, from 1) or at a time of the video (seconds).

    ``size``: of a thing that was found by example, its longer side in pixels, a guess.
    """

    x: float
    y: float
    x_share: Annotated[float, Field(description="of the width, 0 to 1")]
    y_share: float
    x_thousandths: int
    y_thousandths: int
    image: int | None = None
    time: float | None = None
    id: int | None
    label: str | None
    confidence: float | None = None
    size: float | None = None


class CachedTokens(BaseModel):
    cached_tokens: int


class UsageFields(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Size(BaseModel):
    width: int
    height: int


class VideoSize(Size):
    frame_times: list[float]


class PlainAnswer(BaseModel):
    """What the plain routes answer."""

    model: str
    text: str
    count: int | None
    points: list[PointFields]
    problems: list[str]
    confidence: float
    images: list[Size]
    video: VideoSize | None
    finish_reason: Literal["stop", "length"]
    usage: UsageFields
    input_tokens: int
    output_tokens: int
    reused_tokens: int
    timings: dict[str, float]


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class Logprobs(BaseModel):
    content: list[ContentLogprob]


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    points: list[PointFields]
    count: int | None


class Choice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: UsageFields


class OutputText(BaseModel):
    type: Literal["output_text"]
    text: str


class OutputMessage(BaseModel):
    """``points`` and ``count`` are our own."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: str
    content: list[OutputText]
    points: list[PointFields]
    count: int | None


class ResponseUsage(BaseModel):
    input_tokens: int
    output_tokens: int
    total_tokens: int


class ResponseObject(BaseModel):
    """What ``POST /v1/responses`` answers."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[OutputMessage]
    usage: ResponseUsage


class Abilities(BaseModel):
    video: bool
    points: Literal["text", "selected"]
    find: bool
    several_images: bool
    max_crops: int | None
    conversation: bool
    system: bool
    context: int


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    loaded: bool
    abilities: Abilities | None


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Example(BaseModel):
    """``image``: the picture that stands for it; ``images``: all of several, ``video``: a video."""

    name: str
    title: str
    image: str
    images: list[str] | None = None
    video: str | None = None
    questions: list[str]


class ExampleList(BaseModel):
    data: list[Example]


class Weights(BaseModel):
    rows: int
    cols: int
    weights: list[list[float]]
    share: float
    time: float | None = None


class Attention(BaseModel):
    """Where a token looked. ``tokens``: those of the answer; ``token``: which of them was meant."""

    images: list[Weights]
    to_images: float
    token: int
    tokens: list[str]
    note: str


class Health(BaseModel):
    status: Literal["ok", "draining"]
    models: list[str]
