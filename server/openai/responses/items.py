"""Items of a conversation: as clients send them or earlier responses hold them, and as messages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from server.http.request.body import Fields, NotUsed
from server.http.request.validation import Kinds, check_kind
from server.openai.request.conversation import CalledFunction, ChatMessage, TextPart, ToolCall
from server.openai.request.fields import HARMLESS
from server.openai.request.wording import Names

SHOWN = "the text of the conversation does not contain it."
SYSTEM = ("system", "developer")  # roles
# Kind of item -> fields that it must have, and further ones of its own.
KINDS: Kinds = {
    "message": (("role", "content"), ()),
    "function_call": (("call_id", "name", "arguments"), ()),
    "function_call_output": (("call_id", "output"), ()),
    "reasoning": ((), ("content", "summary", "encrypted_content")),
}


class ContentPart(Fields):
    """A part of a message, of reasoning or of a function's output: text."""

    type: Literal["input_text", "output_text", "reasoning_text", "summary_text"]
    text: str
    annotations: NotUsed[list[Any]] = Field(None, description=HARMLESS + SHOWN)
    logprobs: list[Any] | None = Field(None, description=HARMLESS + SHOWN)
    parsed: Any = Field(None, description=HARMLESS + SHOWN)
    prompt_cache_breakpoint: NotUsed[Any] = Field(
        None, description=HARMLESS + "equal prefixes are found without it."
    )


Content = str | Annotated[list[ContentPart], Field(fail_fast=True)]


class InputItem(Fields):
    """A message, a call of a function, its output, or reasoning. Items of earlier responses can be
    sent back as they came."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["developer", "system", "user", "assistant"] | None = Field(
        None, description="Of a message. `developer` is shown to the chat template as `system`."
    )
    content: Content | None = Field(None, description="Of a message or of reasoning.")
    call_id: str | None = Field(None, description="Joins a call and its output.")
    name: str | None = Field(None, description="Of the function that was called.")
    arguments: str | None = Field(None, description="Of a call: a JSON object.")
    output: Content | None = Field(None, description="What a function returned.")
    summary: Annotated[list[ContentPart], Field(fail_fast=True)] | None = Field(
        None, description="Of reasoning; used where it has no content."
    )
    encrypted_content: NotUsed[str] = Field(
        None, description=HARMLESS + "reasoning is not encrypted here."
    )
    id: str | None = Field(None, description=HARMLESS + "the order of the items counts.")
    status: Literal["in_progress", "completed", "incomplete"] | None = Field(
        None, description=HARMLESS + SHOWN
    )
    phase: str | None = Field(None, description=HARMLESS + SHOWN)
    parsed_arguments: Any = Field(None, description=HARMLESS + SHOWN)

    @model_validator(mode="after")
    def _fields_fit_the_type(self) -> InputItem:
        check_kind(self, KINDS)
        return self


def user_item(text: str) -> InputItem:
    """What a string as the whole input means."""
    return InputItem(type="message", role="user", content=text)


class Conversation:
    """Messages of a chat request, made of items."""

    def __init__(self) -> None:
        self._drafts: list[dict[str, Any]] = []
        self._paths: list[str] = []  # of the items that the messages come from
        self._reasoning: str | None = None  # of the assistant's message that follows
        self._names: list[tuple[str, str]] = []

    def instruct(self, text: str) -> None:
        """Begin with this system message."""
        self._add("instructions", role="system", content=text)

    def add(self, items: Iterable[InputItem], path: str) -> None:
        """Add items; `path` is the name of the field that holds them."""
        for index, item in enumerate(items):
            self._add_item(item, f"{path}[{index}]")

    def messages(self) -> list[ChatMessage]:
        self._flush()
        return [ChatMessage(**draft) for draft in self._drafts]

    def names(self) -> Names:
        """What errors about the messages must name instead."""
        of_messages = [(f"messages[{index}]", path) for index, path in enumerate(self._paths)]
        return [*self._names, *of_messages]

    def _add_item(self, item: InputItem, path: str) -> None:
        if item.type == "reasoning":
            self._flush()
            self._reasoning = text_of(item.content or item.summary or "")
        elif item.type == "function_call":
            self._add_call(item, path)
        elif item.type == "function_call_output":
            self._flush()
            at = f"messages[{len(self._drafts)}]"
            self._names.append((f"{at}.tool_call_id", f"{path}.call_id"))
            self._add(path, role="tool", content=_parts(item.output), tool_call_id=item.call_id)
        elif item.role == "assistant":
            self._add_answer(path, content=_parts(item.content))
        else:
            self._flush()
            self._add(path, role=item.role, content=_parts(item.content))

    def _add_call(self, item: InputItem, path: str) -> None:
        function = CalledFunction(name=item.name or "", arguments=item.arguments)
        call = ToolCall(id=item.call_id, type="function", function=function)
        last = self._drafts[-1] if self._drafts else {}
        if last.get("role") == "assistant" and self._reasoning is None:
            last.setdefault("tool_calls", []).append(call)
        else:
            self._add_answer(path, tool_calls=[call])
        number = len(self._drafts[-1]["tool_calls"]) - 1
        at = f"messages[{len(self._drafts) - 1}].tool_calls[{number}]"
        self._names.append((f"{at}.id", f"{path}.call_id"))

    def _add_answer(self, path: str, **fields: Any) -> None:
        reasoning, self._reasoning = self._reasoning, None
        self._add(path, role="assistant", reasoning_content=reasoning, **fields)

    def _flush(self) -> None:
        """Reasoning that nothing followed is a message of its own."""
        if self._reasoning is not None:
            self._add_answer("input", content="")

    def _add(self, path: str, **fields: Any) -> None:
        self._drafts.append(fields)
        self._paths.append(path)


def text_of(content: Content) -> str:
    """All text of a content."""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _parts(content: Content | None) -> str | list[TextPart]:
    if content is None or isinstance(content, str):
        return content or ""
    return [TextPart(type="text", text=part.text) for part in content] or ""
