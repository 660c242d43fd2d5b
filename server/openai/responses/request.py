"""POST /v1/responses and /v1/responses/input_tokens, field by field."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from server.http.request.body import Fields, NotUsed
from server.http.request.validation import broken_rule
from server.openai.request.fields import (
    HARMLESS,
    MAX_INT,
    CacheSalt,
    Fraction,
    Penalty,
    Seed,
    Stop,
    Temperature,
    TopP,
    Unsupported,
    UntracedSpeculation,
)
from server.openai.request.structured import Schema
from server.openai.request.tools import MAX_TOOLS, FunctionDefinition
from server.openai.responses.items import InputItem, user_item

LOGPROBS = "message.output_text.logprobs"
MAX_ID = 128


class FunctionTool(FunctionDefinition):
    """A function that the model may call."""

    type: Literal["function"]
    defer_loading: NotUsed[bool] = Field(
        None, description=HARMLESS + "the model is always told of it."
    )
    allowed_callers: NotUsed[list[Any]] = Field(
        None, description=HARMLESS + "only the model calls functions."
    )
    output_schema: NotUsed[Any] = Field(None, description=HARMLESS + "the model is not shown it.")


class TextFormat(Fields):
    """What the text must be."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, description="Required with `json_schema`.")
    schema_: Schema | None = Field(None, alias="schema", description="Required with `json_schema`.")
    description: NotUsed[str] = Field(None, description=HARMLESS + "the model is not shown it.")
    strict: bool | None = Field(None, description="The text always fits, also when false.")

    @model_validator(mode="after")
    def _schema_fits_the_type(self) -> TextFormat:
        for name, value in (("name", self.name), ("schema", self.schema_)):
            if value is None and self.type == "json_schema":
                raise broken_rule(name, f'{name} is missing: type "json_schema" requires it')
            if value is not None and self.type != "json_schema":
                raise broken_rule(name, f'{name} is only allowed with type "json_schema"')
        return self


class TextOptions(Fields):
    format: TextFormat | None = Field(None, description="Default: text.")
    verbosity: NotUsed[str] = Field(
        None, description=HARMLESS + "the model is asked as the chat template says."
    )


class NamedFunction(Fields):
    type: Literal["function"]
    name: str


class ChosenFunctions(Fields):
    """One function that must be called, or those that may be."""

    type: Literal["function", "allowed_tools"]
    name: str | None = Field(None, description="With `function`.")
    mode: Literal["auto", "required"] | None = Field(None, description="With `allowed_tools`.")
    tools: (
        Annotated[list[NamedFunction], Field(fail_fast=True, min_length=1, max_length=MAX_TOOLS)]
        | None
    ) = Field(None, description="With `allowed_tools`.")

    @model_validator(mode="after")
    def _has_what_its_type_says(self) -> ChosenFunctions:
        for name, kind in (
            ("name", "function"),
            ("mode", "allowed_tools"),
            ("tools", "allowed_tools"),
        ):
            if (getattr(self, name) is not None) != (self.type == kind):
                raise broken_rule(
                    name, f'tool_choice.{name} is required with the type "{kind}", and only there'
                )
        return self


class ResponseStreamOptions(Fields):
    include_obfuscation: NotUsed[bool] = Field(
        None, description=HARMLESS + "events are never padded."
    )


Input = str | Annotated[list[InputItem], Field(fail_fast=True, min_length=1)]
INPUT = "The user's text, or items: messages of text, calls, their outputs, reasoning."


class InputTokensRequest(Fields):
    """POST /v1/responses/input_tokens."""

    model: str | None = None
    input: Input | None = Field(None, description=INPUT)
    instructions: str | None = Field(
        None, description="A system message at the start; not kept for later responses."
    )
    previous_response_id: str | None = Field(
        None,
        max_length=MAX_ID,
        description="The conversation goes on after this response, which must still be stored.",
    )
    max_output_tokens: int | None = Field(
        None, ge=1, le=MAX_INT, description="Reasoning included. Default: the rest of the context."
    )
    text: TextOptions | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = (
        Field(None, description=f"Up to {MAX_TOOLS} functions that the model may call.")
    )
    tool_choice: Literal["none", "auto", "required"] | ChosenFunctions | None = Field(
        None, description="As in chat. Default auto."
    )
    parallel_tool_calls: bool | None = Field(
        None, description="False: a response ends after its first call. Default true."
    )
    truncation: Literal["auto", "disabled"] | None = Field(
        None,
        description="auto: if the conversation is too long, its oldest turns are left out, but not "
        "leading system messages. Default disabled: then it is an error.",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Further variables of the chat template."
    )
    reasoning: NotUsed[dict[str, Any]] = Field(
        None, description=HARMLESS + "the model is asked as the chat template says."
    )
    personality: NotUsed[str] = Field(
        None, description=HARMLESS + "the model is asked as the chat template says."
    )
    conversation: Unsupported = None

    @model_validator(mode="after")
    def _has_something_to_read(self) -> InputTokensRequest:
        if all(one is None for one in (self.input, self.instructions, self.previous_response_id)):
            raise broken_rule(
                "input",
                "input is missing: one of input, instructions and previous_response_id is required",
            )
        return self

    def not_used(self) -> Iterator[str]:
        if self.tools and self.tool_choice == "none":
            yield "tools"
        if self.parallel_tool_calls is not None and (not self.tools or self.tool_choice == "none"):
            yield "parallel_tool_calls"

    @property
    def items(self) -> Sequence[InputItem]:
        return [user_item(self.input)] if isinstance(self.input, str) else self.input or ()


class ResponsesRequest(InputTokensRequest):
    """POST /v1/responses."""

    model: str
    input: Input = Field(description=INPUT)
    store: bool | None = Field(
        None,
        description="Keep the response in memory, as long as there is room, for requests that name "
        "it. Default true, where the server keeps responses.",
    )
    background: bool | None = Field(
        None,
        description="Answer at once; the response can be fetched while it is made. Not with "
        "`stream`, and only where it is stored.",
    )
    temperature: Temperature = None
    top_p: TopP = None
    include: list[str] | None = Field(
        None,
        description=f'"{LOGPROBS}": text comes with log-probabilities. Others have no effect: '
        "reasoning is always sent as it is, and the rest is about what no response contains.",
    )
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="Alternatives per token; above 0 they are included."
    )
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = Field(None, description="Up to 16 labels, which the response shows.")
    stream: bool | None = Field(None, description="Send events as they come. Default false.")
    stream_options: ResponseStreamOptions | None = Field(None, description="Needs `stream`.")
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="0, -1 (default): off.")
    min_p: Fraction | None = Field(None, description="Default 0: off.")
    frequency_penalty: Penalty = None
    presence_penalty: Penalty = None
    repetition_penalty: float | None = Field(None, ge=0.01, le=10, description="Default 1: off.")
    seed: Seed = None
    stop: Stop = None
    ignore_eos: bool | None = Field(None, description="Continue after the model's end token.")
    priority: int | None = Field(
        None, ge=-(2**31), le=2**31 - 1, description="Lower runs first. Default 0."
    )
    cache_salt: CacheSalt = None
    speculation: UntracedSpeculation | None = Field(
        None, description="Speculative decoding. Changes speed only, never the text."
    )
    max_tool_calls: NotUsed[int] = Field(
        None, description=HARMLESS + "it limits built-in tools, and there is none."
    )
    user: NotUsed[str] = Field(None, description=HARMLESS + "end users are not distinguished.")
    safety_identifier: NotUsed[str] = Field(
        None, description=HARMLESS + "end users are not distinguished."
    )
    service_tier: NotUsed[str] = Field(None, description=HARMLESS + "there is one tier.")
    prompt_cache_key: str | None = Field(
        None,
        description="Names a session. Where there are several engines, requests of one session go "
        "to the same one; equal prefixes are found without a key.",
    )
    prompt_cache_retention: NotUsed[str] = Field(
        None, description=HARMLESS + "prefixes stay cached as long as there is room."
    )
    prompt_cache_options: NotUsed[dict[str, Any]] = Field(
        None, description=HARMLESS + "prefixes stay cached as long as there is room."
    )
    prompt: Unsupported = None
    moderation: Unsupported = None
    context_management: Unsupported = None

    @model_validator(mode="after")
    def _rules(self) -> ResponsesRequest:
        if self.stream_options is not None and not self.stream:
            raise broken_rule(
                "stream_options", "stream_options is only allowed when stream is true"
            )
        if self.background and (self.stream or self.store is False):
            other = "stream" if self.stream else "store"
            raise broken_rule(
                "background",
                f"background is true: not with {other} {str(getattr(self, other)).lower()}",
            )
        return self

    def not_used(self) -> Iterator[str]:
        yield from InputTokensRequest.not_used(self)
        for index, name in enumerate(self.include or ()):
            if name != LOGPROBS:
                yield f"include[{index}]"

    @property
    def scored(self) -> bool:
        """Whether text comes with log-probabilities."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)
