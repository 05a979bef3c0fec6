# SPDX-License-Identifier: Apache-2.0
"""Requests and responses of the API as types: OpenAI's chat completions, and what is added here.

Values are not converted: "16" is no number. Fields that are not listed are allowed; `fields.py`
refuses those that would change the answer. Lists fail at their first fault: the errors of millions
would take minutes, in which nobody is answered.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Auto = Literal["auto"]
Detail = Literal["low", "high", "auto"]
MOST_SEED = 2**32 - 1
MOST_STOPS = 16
MOST_MESSAGES = 512
MOST_PARTS = 512  # of a message


class Asked(BaseModel):
    """What a client sends."""

    model_config = ConfigDict(extra="allow", strict=True)


class Said(BaseModel):
    """What the server sends."""

    model_config = ConfigDict(protected_namespaces=())


class ImageUrl(Asked):
    """An image: a data URI, a handle of an earlier response, or https where that is allowed."""

    url: str
    detail: Detail | None = None


class TextPart(Asked):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImagePart(Asked):
    """An image between texts."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Asked):
    """One message of a conversation; images are in those of the user alone."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=MOST_PARTS, fail_fast=True)]


class StreamOptions(Asked):
    """With include_usage a last chunk has the counts of tokens."""

    include_usage: bool = False


class MMProcessorKwargs(BaseModel):
    """As in vLLM: the most visual tokens of an image. Nothing else is read, so nothing else may be
    here."""

    model_config = ConfigDict(extra="forbid", strict=True)

    max_soft_tokens: Annotated[int, Field(ge=1)] | Auto | None = None


class ChatRequest(Asked):
    """A request to /v1/chat/completions."""

    messages: Annotated[
        list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    ]
    model: str | None = Field(None, description="the served model; by default the one there is")
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = Field(
        None, description="0, the default, takes the likeliest token"
    )
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] | None = Field(
        None, description="of the draws; by default drawn, and given in the response"
    )
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[
            list[Annotated[str, Field(min_length=1)]], Field(max_length=MOST_STOPS, fail_fast=True)
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    n: int | None = None
    visual_tokens: Annotated[int, Field(ge=1)] | Auto | None = Field(
        None, description="V of each image; auto lets the server choose"
    )
    mm_processor_kwargs: MMProcessorKwargs | None = None
    deadline_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="the answer ends after this time; at most the server's own deadline"
    )


class ErrorOf(Said):
    """What is wrong, and the way out."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(Said):
    """The body of every response that is not an answer."""

    error: ErrorOf


class PromptDetails(Said):
    """The prompt's tokens, text and images apart, and those whose keys and values were kept from
    an earlier request."""

    text_tokens: int
    image_tokens: int
    cached_tokens: int


class Usage(Said):
    """Counts of tokens; prompt_tokens are text_tokens and image_tokens together.

    reused_image_tokens are those of images that were not encoded again.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    text_tokens: int
    image_tokens: int
    reused_image_tokens: int
    prompt_tokens_details: PromptDetails


class Budget(Said):
    """The visual tokens of each image: how many were taken, and why."""

    visual_tokens: int
    by: Literal["request", "detail", "law", "server", "model"]
    why: str
    warnings: list[str] = []
    predicted_error: float | None = None
    interval: tuple[float, float] | None = None
    p_best: float | None = None
    predicted_ms: float | None = None
    target_ms: float | None = None
    load: dict[str, float | None] | None = None
    new_tokens: int | None = None


class Extension(Said):
    """What vlm_jax says besides: the budget, the seed of the draws, times and cost.

    `finish_reason` is "deadline" where OpenAI's field says "length". `images` are handles, each of
    which may be sent as the url of an image in place of the image. `flops` are by phase. Times are
    from the arrival in the queue.
    """

    budget: Budget | None
    finish_reason: Literal["stop", "length", "deadline"]
    seed: int
    images: list[str]
    flops: dict[str, float]
    first_token_seconds: float | None
    seconds: float
    tokens_per_second: float | None


class TokenLogprob(Said):
    """A token with its logarithm of probability under the model."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[Any] = []


class Logprobs(Said):
    """Of every token of the answer."""

    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(Said):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(Said):
    """The one choice."""

    index: Literal[0] = 0
    message: AssistantMessage
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(Said):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    vlm_jax: Extension


class Delta(Said):
    """What a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Said):
    """The one choice of a chunk."""

    index: Literal[0] = 0
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Chunk(Said):
    """A piece of an answer; the last one that has a choice also has `vlm_jax`."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    vlm_jax: Extension | None = None


class Budgets(Said):
    """The visual tokens that can be asked for."""

    supported: list[int]
    default: int
    low: int
    high: int
    auto: str


class ModelCard(Said):
    """The served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vlm_jax"
    max_model_len: int
    compressor: str
    visual_tokens: Budgets


class ModelList(Said):
    """The models that are served: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(Said):
    """How the server is."""

    status: Literal["ok", "draining", "failed"]
    active: int
    waiting: int
    slots: int
