"""What the server takes, as pydantic models: the OpenAPI schema is made of them and `replies`.

Numbers are numbers and texts texts: nothing is guessed from another type. Fields that are not known
are ignored, as OpenAI's servers do; those that ask for what this server can not do are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    AliasChoices,
    AliasPath,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

MAX_TOP_LOGPROBS = 20


class Loose(BaseModel):
    """An object of a request."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


def _whole(value: object) -> object:
    """5.0 is a whole number for JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
MaxTokens = Annotated[Whole, Field(ge=1, le=2**31 - 1, examples=[64])]
Temperature = Annotated[float, Field(ge=0, le=2, description="0 = the likeliest token")]
TopP = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[Whole, Field(ge=-(2**63), le=2**63 - 1)]
StopText = Annotated[str, Field(min_length=1)]
TokenId = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Crops = Annotated[
    Whole,
    Field(ge=1, le=64, description="most detail crops a picture, for models that read crops"),
]
Stop = StopText | Annotated[list[StopText], Field(max_length=16)]

# A picture or video as JSON can hold it.
Address = Annotated[
    str,
    Field(
        min_length=1,
        description="a data URL: data:image/png;base64,... or data:video/mp4;base64,...; an http "
        "or https address only where the server was started with --allow-remote-images",
    ),
]


# ---- messages ----


class TextPart(Loose):
    type: Literal["text", "input_text", "output_text"]
    text: str


class ImageUrl(Loose):
    url: Address = Field(validation_alias=AliasChoices("url", AliasPath("image_url", "url")))


Source = Address | ImageUrl
Sources = Source | list[Source]


def _named(*names: str, examples: list[str] | None = None) -> Any:
    """A field that may be missing, and the names by which clients send it, ours first."""
    return Field(None, validation_alias=AliasChoices(*names), examples=examples)


def _addresses(given: Sources | None) -> list[str]:
    several = given if isinstance(given, list) else [] if given is None else [given]
    return [one if isinstance(one, str) else one.url for one in several]


class ImagePart(Loose):
    type: Literal["image_url", "input_image", "image"]
    image_url: Source = Field(validation_alias=AliasChoices("image_url", "image"))

    @property
    def address(self) -> str:
        return _addresses(self.image_url)[0]


class VideoPart(Loose):
    type: Literal["video_url", "input_video", "video"]
    video_url: Source = Field(validation_alias=AliasChoices("video_url", "video"))

    @property
    def address(self) -> str:
        return _addresses(self.video_url)[0]


class PointPart(Loose):
    """A place that the question is about, in pixels."""

    type: Literal["point"]
    x: float
    y: float
    image: Annotated[Whole, Field(ge=1)] | None = None
    time: Annotated[float, Field(ge=0)] | None = None


_KINDS = {
    **dict.fromkeys(("text", "input_text", "output_text"), "text_part"),
    **dict.fromkeys(("image_url", "input_image", "image"), "image_part"),
    **dict.fromkeys(("video_url", "input_video", "video"), "video_part"),
    "point": "point_part",
}


def _kind_of(part: object) -> str | None:
    kind = part.get("type") if isinstance(part, Mapping) else getattr(part, "type", None)
    return _KINDS.get(kind) if isinstance(kind, str) else None


def _known_part(part: object) -> object:
    if not isinstance(part, Loose) and _kind_of(part) is None:
        kind = part.get("type") if isinstance(part, Mapping) else None
        named = f"the type {kind!r:.40}" if isinstance(kind, str) else "no type"
        raise ValueError(
            f"a part of a message has {named}, expected text, image_url, video_url or point: this "
            f"model reads text, pictures and a video"
        )
    return part


Part = Annotated[
    Annotated[TextPart, Tag("text_part")]
    | Annotated[ImagePart, Tag("image_part")]
    | Annotated[VideoPart, Tag("video_part")]
    | Annotated[PointPart, Tag("point_part")],
    Discriminator(_kind_of),
    BeforeValidator(_known_part),
]


class Message(Loose):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @model_validator(mode="before")
    @classmethod
    def _no_tools(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            if given.get("role") in ("tool", "function") or given.get("tool_calls"):
                raise ValueError(
                    "the messages hold a call of a tool, and this model calls none: leave messages "
                    "of tools and tool_calls out"
                )
            if given.get("audio"):
                raise ValueError(
                    "a message holds audio, which this model does not hear: leave it out"
                )
        return given


Messages = Annotated[list[Message], Field(min_length=1)]


# ---- requests ----


class Sampling(Loose):
    """How the answer is written: fields that all requests have."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Annotated[Whole, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    stream: bool | None = None
    max_crops: Crops | None = None
    well_formed_points: bool | None = Field(
        None, description="hold the model to the grammar of points"
    )

    def options(self) -> dict[str, Any]:
        """What of it `VLM.ask` takes, by its names."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")
        given = {name: getattr(self, name) for name in names}
        if self.stop == []:
            given["stop"] = None
        return {name: value for name, value in given.items() if value is not None}


class StreamOptions(Loose):
    include_usage: bool | None = None


class JsonSchema(Loose):
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(Loose):
    """``json_object`` and ``json_schema``: the answer's points and count as JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        schema = self.json_schema and self.json_schema.schema_
        if self.type == "json_schema" and schema is None:
            raise ValueError(
                "response_format is of type json_schema and lacks json_schema.schema: give it, or "
                "use the type json_object"
            )
        return self


# Fields that ask for what is not there, with the values that ask for nothing.
_UNSUPPORTED = {
    "tools": "calls no tools",
    "functions": "calls no functions",
    "audio": "speaks no audio",
    "web_search_options": "searches nothing",
}
_PENALTIES = ("frequency_penalty", "presence_penalty")


class ChatRequest(Sampling):
    """``POST /v1/chat/completions``."""

    model: Annotated[str, Field(min_length=1, examples=["tiny"])]
    messages: Messages
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    n: Annotated[Whole, Field(ge=1, le=128)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    logit_bias: dict[TokenId, Bias] | None = None
    response_format: ResponseFormat | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_there_is(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        for name, what in _UNSUPPORTED.items():
            if given.get(name):
                raise ValueError(f"{name} is not supported, this model {what}: leave it out")
        if given.get("modalities") not in (None, [], ["text"]):
            raise ValueError("modalities must be ['text']: this model answers with text alone")
        for name in _PENALTIES:
            if given.get(name):
                raise ValueError(
                    f"{name} is not supported: leave it out, or use repetition_penalty (1 to 1.3)"
                )
        return given

    @property
    def longest(self) -> int | None:
        """The tokens that are asked for; None = as many as is usual."""
        given = self.max_completion_tokens
        return self.max_tokens if given is None else given

    def options(self) -> dict[str, Any]:
        options = super().options()
        if self.logit_bias:
            options["logit_bias"] = {int(id): bias for id, bias in self.logit_bias.items()}
        if self.logprobs or self.top_logprobs:
            options["logprobs"] = self.top_logprobs or 0
        return options


class ResponseText(Loose):
    """``text.format``: as ``response_format``, with the schema beside its name."""

    class Format(Loose):
        type: Literal["text", "json_object", "json_schema"]
        name: str | None = None
        schema_: dict[str, Any] | None = Field(None, alias="schema")

    format: Format | None = None


class ResponsesRequest(Sampling):
    """``POST /v1/responses``: without a memory, so all that was said comes along."""

    model: Annotated[str, Field(min_length=1, examples=["tiny"])]
    input: Annotated[str, Field(min_length=1)] | Messages
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = None
    text: ResponseText | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_there_is(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            for name in ("previous_response_id", "conversation", "background", "prompt", "tools"):
                if given.get(name):
                    raise ValueError(
                        f"{name} is not supported: leave it out, and send the whole conversation "
                        f"as input"
                    )
        return given

    def as_chat(self) -> ChatRequest:
        """The same as a chat completion."""
        messages: list[Message] = []
        if self.instructions:
            messages.append(Message(role="system", content=self.instructions))
        if isinstance(self.input, str):
            messages.append(Message(role="user", content=self.input))
        else:
            messages += self.input
        form = None if self.text is None or self.text.format is None else self.text.format
        asked = self.model_dump(exclude={"input", "instructions", "max_output_tokens", "text"})
        if form is not None:
            named = {"name": form.name, "schema": form.schema_}
            schema = named if form.type == "json_schema" else None
            asked["response_format"] = {"type": form.type, "json_schema": schema}
        return ChatRequest.model_validate(
            {**asked, "messages": messages, "max_tokens": self.max_output_tokens}
        )


class PlainRequest(Sampling):
    """What the plain routes share: pictures or a video, and how to answer."""

    model: str | None = Field(None, description="none = the server's first")
    images: Sources | None = None
    image: Sources | None = _named("image", "image_url", "image_base64")
    video: Source | None = _named("video", "video_url")
    max_tokens: MaxTokens | None = _named("max_tokens", "max_new_tokens", "max_completion_tokens")

    @property
    def addresses(self) -> list[str]:
        """Of the pictures, in order."""
        return [*_addresses(self.image), *_addresses(self.images)]

    @property
    def video_addresses(self) -> list[str]:
        """Of the video, if there is one."""
        return _addresses(self.video)


class QueryRequest(PlainRequest):
    """``POST /v1/query``: a question, or a conversation."""

    question: str | None = _named(
        *("question", "prompt", "query", "text"), examples=["How many cups are there?"]
    )
    messages: Messages | None = None

    @model_validator(mode="after")
    def _one_question(self) -> QueryRequest:
        if (self.question is None) == (self.messages is None):
            found = "neither" if self.question is None else "both"
            raise ValueError(f"expected question or messages, found {found}: give one of them")
        return self


class AttentionRequest(QueryRequest):
    """``POST /v1/attention``: a question, the answer so far, and one of its tokens."""

    answer: Annotated[str, Field(max_length=20_000)]
    token: Annotated[Whole, Field(ge=0)] | None = Field(
        None, description="from 0 on; none = the last of the answer"
    )


class ObjectRequest(PlainRequest):
    """``POST /v1/point`` and ``/v1/count``: what to look for."""

    what: Annotated[str, Field(min_length=1, max_length=2000, examples=["cups"])] = Field(
        validation_alias=AliasChoices(
            *("object", "objects", "noun", "label", "target", "name"),
            *("query", "prompt", "question", "text"),
        )
    )


class CaptionRequest(PlainRequest):
    """``POST /v1/caption``."""


class PlaceFields(Loose):
    """A place as an object."""

    x: float
    y: float
    image: Annotated[Whole, Field(ge=1, le=2)] | None = Field(
        None, description="1 = the first picture shown (the reference, where there is one), 2 = ..."
    )


class Place(NamedTuple):
    """A place in pixels of picture number ``image``: 1 or 2; None where the request names none."""

    x: float
    y: float
    image: int | None


def _of_a_picture(given: list[float]) -> list[float]:
    if len(given) == 3 and given[2] not in (1, 2):
        raise ValueError(
            f"the third number of a place is {given[2]:g}, expected the number of its picture: 1 "
            f"or 2"
        )
    return given


Numbers = Annotated[
    list[float],
    Field(min_length=2, max_length=3, description="x, y in pixels, and maybe the picture's number"),
    AfterValidator(_of_a_picture),
]
Places = list[Numbers | PlaceFields]


def _place(given: Sequence[float] | PlaceFields) -> Place:
    if isinstance(given, PlaceFields):
        return Place(given.x, given.y, given.image)
    x, y, *number = given
    return Place(x, y, int(number[0]) if number else None)


class FindRequest(Loose):
    """``POST /v1/find``: examples, and the picture in which to find what is like them."""

    model: str | None = Field(None, description="none = the server's first")
    image: Sources | None = _named("image", "images", "image_url", "image_base64")
    reference: Source | None = Field(
        None, description="the picture that the examples lie in, where it is not the image"
    )
    like: Annotated[Places, Field(min_length=1, examples=[[[120, 80]]])]
    unlike: Places | None = None
    max_crops: Crops | None = None
    min_confidence: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="points below are left out; none = 0.5"
    )

    @property
    def examples(self) -> dict[str, list[Place]]:
        """The places by the names of their fields."""
        given = {"like": self.like, "unlike": self.unlike or []}
        return {name: [_place(one) for one in places] for name, places in given.items()}

    @property
    def addresses(self) -> list[str]:
        """Of the pictures to look in."""
        return _addresses(self.image)

    @property
    def all_addresses(self) -> list[str]:
        """Of those, and of the reference."""
        return [*self.addresses, *_addresses(self.reference)]


REQUESTS = (
    ChatRequest,
    ResponsesRequest,
    QueryRequest,
    ObjectRequest,
    CaptionRequest,
    AttentionRequest,
    FindRequest,
)
