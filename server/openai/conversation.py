"""The messages of a conversation: as clients send them, and as the chat template receives them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from server.http.body import Fields, NotUsed
from server.http.errors import invalid, shorten
from server.http.validation import broken_rule
from server.openai.fields import HARMLESS, Unsupported
from server.text.chat_template import ChatTemplate

TO_TEMPLATE = "Handed to the chat template."
HERE = "the text of the conversation does not contain it."


class TextPart(Fields):
    type: Literal["text"]
    text: str
    cache_control: NotUsed[Any] = Field(
        None, description=HARMLESS + "equal prefixes are found without it."
    )


class CalledFunction(Fields):
    name: str
    arguments: str | dict[str, Any] | None = Field(
        None, description="An object, or its JSON as a string. The template gets the object."
    )


class ToolCall(Fields):
    """A call that an assistant made earlier."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction
    index: NotUsed[int] = Field(None, description=HARMLESS + "the order of the calls counts.")

    def for_template(self) -> dict[str, Any]:
        function = {"name": self.function.name, "arguments": _object(self.function.arguments)}
        return {"id": self.id, "type": "function", "function": function}


class ChatMessage(Fields):
    """One message. Assistant messages of earlier replies can be sent back as they came."""

    role: Literal["developer", "system", "user", "assistant", "tool"] = Field(
        description="`developer` is shown to the chat template as `system`."
    )
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = Field(
        None,
        description="Text, or text parts, which are joined by a newline. Assistants and tools may "
        "leave it out.",
    )
    name: str | None = Field(None, description=TO_TEMPLATE)
    tool_call_id: str | None = Field(None, description="Required for `tool` messages.")
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = Field(
        None, description="Calls of an assistant, handed to the chat template."
    )
    reasoning_content: str | None = Field(None, description=TO_TEMPLATE)
    reasoning: str | None = Field(None, description=TO_TEMPLATE)
    type: Literal["message", "text"] | None = Field(
        None, description=HARMLESS + "every entry is a message of text."
    )
    id: NotUsed[str] = Field(None, description=HARMLESS + HERE)
    refusal: NotUsed[str] = Field(None, description=HARMLESS + HERE)
    annotations: NotUsed[list[Any]] = Field(None, description=HARMLESS + HERE)
    cache_control: NotUsed[Any] = Field(
        None, description=HARMLESS + "equal prefixes are found without it."
    )
    audio: Unsupported = None
    function_call: Unsupported = None

    @model_validator(mode="after")
    def _fields_fit_the_role(self) -> ChatMessage:
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise broken_rule(
                "tool_call_id", "tool_call_id is required with the role tool, and only there"
            )
        if self.tool_calls and self.role != "assistant":
            raise broken_rule("tool_calls", "tool_calls are only allowed with the role assistant")
        if not self.content and self.content != "" and self.role not in ("assistant", "tool"):
            raise broken_rule(
                "content",
                f"content is {shorten(self.content)}: with the role {self.role} it must be a "
                "string or an array of at least one text part",
            )
        return self

    def text(self) -> str | None:
        """The content; None where there is none."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content) if self.content else None

    def for_template(self, shows_calls: bool) -> dict[str, Any]:
        """As transformers hands it to a template. A template that shows calls also knows messages
        without text; others would fail for null."""
        calls = [call.for_template() for call in self.tool_calls or ()] if shows_calls else []
        text = self.text()
        known: dict[str, Any] = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content,
            "reasoning": self.reasoning,
            "tool_calls": calls or None,
        }
        role = "system" if self.role == "developer" else self.role
        content = text if text is not None or calls else ""
        return {"role": role, "content": content} | {
            name: value for name, value in known.items() if value is not None
        }


def render_chat(
    template: ChatTemplate,
    messages: Sequence[ChatMessage],
    add_generation_prompt: bool | None,
    kwargs: dict[str, object] | None,
) -> str:
    """The prompt of a conversation. ApiError 400 when the template refuses it."""
    opens = add_generation_prompt is not False
    shown = [message.for_template(template.shows_tool_calls) for message in messages]
    try:
        return template.render(shown, opens, **(kwargs or {}))
    except ValueError as error:
        raise invalid(str(error), "messages", "chat_template_error") from error


def hidden_calls(template: ChatTemplate, messages: Sequence[ChatMessage]) -> list[str]:
    """Names of the calls that the template does not show."""
    if template.shows_tool_calls:
        return []
    return [
        f"messages[{index}].tool_calls (the chat template does not show them)"
        for index, message in enumerate(messages)
        if message.tool_calls
    ]


def _object(arguments: str | dict[str, Any] | None) -> Any:
    """Templates write arguments as JSON, so a string would be quoted twice. Text that is not a JSON
    object, such as that of a call cut off by the token limit, is shown as it is."""
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        value = json.loads(arguments) if arguments else {}
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments
