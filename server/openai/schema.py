"""The requests of the API, field by field. Every field is honoured, or described as having no
effect, or refused; an unknown field is an error."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from server.http.body import Fields
from server.http.errors import broken_rule
from server.openai.fields import (
    HARMLESS,
    MAX_INT,
    Fraction,
    LogitBias,
    OnlyNone,
    Penalty,
    Prompts,
    ResponseFormat,
    Seed,
    SpeculationOptions,
    Stop,
    StreamRequestOptions,
    Temperature,
    TokenId,
    TopP,
    Unsupported,
    UnsupportedList,
)


class TextPart(Fields):
    type: Literal["text"]
    text: str


class ChatMessage(Fields):
    """One message. Assistant messages of earlier replies can be sent back as they came."""

    role: Literal["developer", "system", "user", "assistant", "tool"] = Field(
        description="`developer` is shown to the chat template as `system`."
    )
    content: str | Annotated[list[TextPart], Field(fail_fast=True, min_length=1)] = Field(
        description="Text, or text parts. A chat template that does not read parts gets their "
        "text, joined by newlines. Null is refused: it needs "
        "tool calls, which are not supported yet."
    )
    name: str | None = Field(None, description="Handed to the chat template.")
    tool_call_id: str | None = Field(None, description="Required for `tool` messages.")
    refusal: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None
    tool_calls: UnsupportedList = None
    annotations: UnsupportedList = None

    @model_validator(mode="after")
    def _tool_messages_name_their_call(self) -> ChatMessage:
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise broken_rule(
                "tool_call_id", "tool_call_id is required with the role tool, and only there"
            )
        return self


class SamplingFields(Fields):
    """What chat and text completions have in common."""

    model: str
    n: int | None = Field(None, ge=1, le=MAX_INT, description="Choices per prompt. Default 1.")
    temperature: Temperature = None
    top_p: TopP = None
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="0, -1 (default): off.")
    min_p: Fraction | None = Field(None, description="Default 0: off.")
    frequency_penalty: Penalty = None
    presence_penalty: Penalty = None
    repetition_penalty: float | None = Field(None, ge=0.01, le=2, description="Default 1: off.")
    logit_bias: LogitBias = None
    seed: Seed = None
    stop: Stop = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=1024)] | None = Field(
        None, description="Token ids that end the text, besides the model's own."
    )
    include_stop_str_in_output: bool | None = Field(
        None, description="Keep the stop string at the end of the text. Default false."
    )
    min_tokens: int | None = Field(
        None,
        ge=0,
        le=MAX_INT,
        description="Only tokens after the first `min_tokens` may end the text, as an end token or "
        "by completing a stop string. Default 0.",
    )
    ignore_eos: bool | None = Field(None, description="Continue after the model's end token.")
    skip_special_tokens: bool | None = Field(
        None, description="Leave special tokens out of the text. Default true."
    )
    priority: int | None = Field(
        None, ge=-(2**31), le=2**31 - 1, description="Lower runs first. Default 0."
    )
    speculation: SpeculationOptions | None = Field(
        None, description="Speculative decoding. Changes speed only, never the text."
    )
    stream: bool | None = Field(None, description="Send the text as it comes. Default false.")
    stream_options: StreamRequestOptions | None = Field(None, description="Needs `stream`.")
    user: str | None = Field(None, description=HARMLESS + "end users are not distinguished.")

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise broken_rule(
                "stream_options", "stream_options is only allowed when stream is true"
            )
        return self

    @property
    def num_choices(self) -> int:
        """Per prompt."""
        return self.n or 1

    @property
    def num_sequences(self) -> int:
        """Choices of all prompts."""
        return self.num_choices

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def max_draft_nodes(self) -> int | None:
        """Per choice and step; None: the client sets no limit."""
        if self.speculation is None:
            return None
        return self.speculation.max_nodes if self.speculation.enabled else 0

    @property
    def include_draft_stats(self) -> bool:
        return self.speculation is not None and self.speculation.stats


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: int | None = Field(
        None, ge=1, le=MAX_INT, description="Default: the rest of the context."
    )
    max_tokens: int | None = Field(
        None, ge=1, le=MAX_INT, description="The older name; `max_completion_tokens` wins."
    )
    logprobs: bool | None = Field(
        None,
        description="Log-probability of each output token under the model, before temperature and "
        "the other sampling parameters. Minus infinity is written as -9999.",
    )
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="Alternatives per token; needs `logprobs`."
    )
    add_generation_prompt: bool | None = Field(
        None, description="Ask the chat template to open the assistant's turn. Default true."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Further variables of the chat template."
    )
    response_format: ResponseFormat = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True, min_length=1)] | None = (
        Field(None, description='Only ["text"].')
    )
    service_tier: Literal["auto", "default"] | None = Field(
        None, description=HARMLESS + "there is one tier. Other tiers are refused."
    )
    store: bool | None = Field(None, description=HARMLESS + "no completion is ever stored.")
    metadata: dict[str, str] | None = Field(
        None, description=HARMLESS + "it labels stored completions, and none is stored."
    )
    safety_identifier: str | None = Field(
        None, description=HARMLESS + "end users are not distinguished."
    )
    prompt_cache_key: str | None = Field(
        None, description=HARMLESS + "equal prefixes are found without a key."
    )
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = Field(
        None, description=HARMLESS + "prefixes stay cached as long as there is room."
    )
    parallel_tool_calls: bool | None = Field(
        None, description=HARMLESS + "it is about tools, which are refused."
    )
    tool_choice: OnlyNone = None
    function_call: OnlyNone = None
    tools: UnsupportedList = None
    functions: UnsupportedList = None
    audio: Unsupported = None
    moderation: Unsupported = None
    prediction: Unsupported = None
    prompt_cache_options: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise broken_rule("top_logprobs", "top_logprobs is only allowed when logprobs is true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per output token; None when no logprobs were asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> int | None:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: Prompts = Field(
        description="A text, several texts, token ids, or several lists of token ids."
    )
    max_tokens: int | None = Field(
        None, ge=0, le=MAX_INT, description="Default 16. 0 with `echo` scores a prompt."
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=20,
        description="Alternatives per token; log-probabilities are those under the model, before "
        "the sampling parameters. Minus infinity is written as -9999.",
    )
    echo: bool | None = Field(None, description="Put the prompt in front of the text.")
    best_of: int | None = Field(None, ge=1, le=MAX_INT, description="Only the value of `n`.")
    suffix: Unsupported = None

    @model_validator(mode="after")
    def _best_of_is_n(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.num_choices:
            raise broken_rule("best_of", f"best_of must equal n, which is {self.num_choices}")
        return self

    @property
    def num_sequences(self) -> int:
        return self.num_choices * len(self.prompts())

    def prompts(self) -> list[str] | list[list[int]]:
        """One entry per prompt, whichever of the four forms was sent."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TokenizeRequest(Fields):
    """POST /tokenize. Exactly one of `prompt` and `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)] | None = None
    add_special_tokens: bool | None = Field(
        None, description="Put BOS in front. Default: true for a prompt, false for messages."
    )
    add_generation_prompt: bool | None = Field(None, description="For messages. Default true.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="For messages.")

    @model_validator(mode="after")
    def _one_of_prompt_and_messages(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise broken_rule("prompt", "exactly one of prompt and messages is required")
        if self.messages is None and (self.add_generation_prompt or self.chat_template_kwargs):
            raise broken_rule(
                "messages", "add_generation_prompt and chat_template_kwargs need messages"
            )
        return self


class DetokenizeRequest(Fields):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
