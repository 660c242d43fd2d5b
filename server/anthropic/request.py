"""POST /v1/messages, field by field."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from server.http.request.body import Fields, NotUsed
from server.http.request.validation import Kinds, broken_rule, check_kind
from server.openai.request.fields import (
    HARMLESS,
    MAX_INT,
    MAX_STOPS,
    CacheSalt,
    Fraction,
    Seed,
    StopString,
    Temperature,
    TopP,
    Unsupported,
    UntracedSpeculation,
)
from server.openai.request.structured import Schema
from server.openai.request.tools import MAX_TOOLS, FunctionName, ObjectSchema

CACHED = HARMLESS + "equal prefixes are found without it."
TEMPLATE = HARMLESS + "the model is asked as the chat template says."
SHOWN = HARMLESS + "the text of the conversation does not contain it."
KINDS: Kinds = {
    "text": (("text",), ()),
    "thinking": (("thinking",), ("signature",)),
    "tool_use": (("id", "name", "input"), ()),
    "tool_result": (("tool_use_id",), ("content",)),
}


class TextBlock(Fields):
    type: Literal["text"]
    text: str
    citations: NotUsed[list[Any]] = Field(None, description=SHOWN)
    cache_control: NotUsed[Any] = Field(None, description=CACHED)


Texts = str | Annotated[list[TextBlock], Field(fail_fast=True)]


class Block(Fields):
    """Text, a call of a tool, its result, or reasoning of an earlier answer."""

    type: Literal["text", "thinking", "tool_use", "tool_result"]
    text: str | None = None
    thinking: str | None = Field(None, description="Handed to the chat template.")
    signature: str | None = Field(None, description=SHOWN)
    id: str | None = Field(None, description="Of a call.")
    name: str | None = Field(None, description="Of the tool that was called.")
    input: dict[str, Any] | None = Field(None, description="Arguments of a call.")
    tool_use_id: str | None = Field(None, description="The call that has this result.")
    content: Texts | None = Field(None, description="What a tool returned.")
    is_error: NotUsed[bool] = Field(
        None, description=HARMLESS + "the text of a result says what happened."
    )
    citations: NotUsed[list[Any]] = Field(None, description=SHOWN)
    cache_control: NotUsed[Any] = Field(None, description=CACHED)
    caller: Any = Field(None, description=SHOWN)

    @model_validator(mode="after")
    def _fields_fit_the_type(self) -> Block:
        check_kind(self, KINDS)
        return self


class Message(Fields):
    """One message. Answers can be sent back as they came; if the last message is the assistant's,
    the model continues it."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(fail_fast=True)]

    @model_validator(mode="after")
    def _blocks_fit_the_role(self) -> Message:
        of_role = {"user": ("text", "tool_result"), "assistant": ("text", "thinking", "tool_use")}
        allowed = of_role.get(self.role, ("text",))
        for index, block in enumerate(self.blocks):
            if block.type not in allowed:
                raise broken_rule(
                    f"content[{index}].type",
                    f'content[{index}].type is "{block.type}": with the role {self.role} it must '
                    f"be {' or '.join(allowed)}",
                )
        return self

    @property
    def blocks(self) -> Sequence[Block]:
        return () if isinstance(self.content, str) else self.content


class MessageTool(Fields):
    """A tool that the model may call."""

    type: Literal["custom"] | None = None
    name: FunctionName
    description: str | None = Field(None, description="What the tool does and when to call it.")
    input_schema: ObjectSchema = Field(description="JSON schema of an object, the arguments.")
    strict: bool | None = Field(
        None,
        description="True: the input always fits the schema, and a keyword of it that cannot be "
        "ensured is an error. Else it fits as far as that can be ensured, with `any` and `tool` "
        "only. Llama 4's calls in Python are not ensured with auto.",
    )
    cache_control: NotUsed[Any] = Field(None, description=CACHED)
    input_examples: NotUsed[list[Any]] = Field(None, description=TEMPLATE)
    eager_input_streaming: NotUsed[bool] = Field(
        None, description=HARMLESS + "arguments are always sent as they come."
    )
    defer_loading: NotUsed[bool] = Field(
        None, description=HARMLESS + "the model is always told of it."
    )
    allowed_callers: NotUsed[list[Any]] = Field(
        None, description=HARMLESS + "only the model calls tools."
    )


class MessageToolChoice(Fields):
    """auto (default): the model decides; any: at least one tool is called; tool: the named one
    is; none: no tool is called, and tools are not shown to the model."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, description="With `tool`.")
    disable_parallel_tool_use: bool | None = Field(
        None, description="True: an answer ends after its first call."
    )

    @model_validator(mode="after")
    def _name_fits_the_type(self) -> MessageToolChoice:
        if (self.name is not None) != (self.type == "tool"):
            raise broken_rule(
                "name", 'tool_choice.name is required with the type "tool", and only there'
            )
        return self


class OutputFormat(Fields):
    type: Literal["json_schema"]
    schema_: Schema = Field(alias="schema", description="The text is JSON that fits it.")


class OutputConfig(Fields):
    format: OutputFormat | None = None
    effort: NotUsed[str] = Field(None, description=TEMPLATE)


class CountTokensRequest(Fields):
    """POST /v1/messages/count_tokens."""

    model: str
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    system: Texts | None = Field(None, description="Put in front as a system message.")
    tools: Annotated[list[MessageTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = Field(
        None, description=f"Up to {MAX_TOOLS} tools that the model may call."
    )
    tool_choice: MessageToolChoice | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Further variables of the chat template."
    )
    thinking: NotUsed[dict[str, Any]] = Field(None, description=TEMPLATE)
    cache_control: NotUsed[Any] = Field(None, description=CACHED)
    speed: NotUsed[str] = Field(None, description=HARMLESS + "there is one speed.")

    def not_used(self) -> Iterator[str]:
        if self.tools and self.tool_choice is not None and self.tool_choice.type == "none":
            yield "tools"


class MessagesRequest(CountTokensRequest):
    """POST /v1/messages."""

    max_tokens: int = Field(
        ge=1,
        le=MAX_INT,
        description="Where the context has less room, `stop_reason` is "
        "model_context_window_exceeded.",
    )
    temperature: Temperature = None
    top_p: TopP = None
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="0, -1 (default): off.")
    stop_sequences: (
        Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_STOPS)] | None
    ) = Field(None, description=f"Up to {MAX_STOPS} strings that end the text.")
    stream: bool | None = Field(None, description="Send events as they come. Default false.")
    min_p: Fraction | None = Field(None, description="Default 0: off.")
    seed: Seed = None
    ignore_eos: bool | None = Field(None, description="Continue after the model's end token.")
    priority: int | None = Field(
        None, ge=-(2**31), le=2**31 - 1, description="Lower runs first. Default 0."
    )
    cache_salt: CacheSalt = None
    speculation: UntracedSpeculation | None = Field(
        None, description="Speculative decoding. Changes speed only, never the text."
    )
    metadata: NotUsed[dict[str, Any]] = Field(
        None, description=HARMLESS + "end users are not distinguished."
    )
    service_tier: NotUsed[str] = Field(None, description=HARMLESS + "there is one tier.")
    inference_geo: NotUsed[str] = Field(None, description=HARMLESS + "there is one server.")
    diagnostics: NotUsed[Any] = Field(None, description=HARMLESS + "there are none.")
    context_management: NotUsed[Any] = Field(
        None, description=HARMLESS + "nothing is taken out of the conversation."
    )
    container: Unsupported = None
    mcp_servers: Unsupported = None
