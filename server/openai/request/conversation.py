"""The messages of a conversation: as clients send them, and as the chat template receives them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from server.http.errors import bad_value, invalid, shorten
from server.http.request.body import Fields, NotUsed, check_shape, too_deep
from server.http.request.validation import broken_rule
from server.openai.request.fields import HARMLESS, Unsupported
from server.openai.request.tools import Tool, Tools, check_names
from server.text.answer.forms import AnswerForm
from server.text.answer.instructions import as_shown, with_instructions, with_single_calls
from server.text.letters import Rendered
from server.text.template.chat_template import ChatTemplate
from server.text.template.rendering import Renderer

TO_TEMPLATE = "Handed to the chat template."
HERE = "the text of the conversation does not contain it."
FRAME = 8  # characters that stand around a text, at least


class TextPart(Fields):
    type: Literal["text", "input_text", "output_text"] = Field(
        description="The last two are what the Responses API calls them."
    )
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
    index: NotUsed[Any] = Field(None, description=HARMLESS + "the order of the calls counts.")

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
        description="Text, or text parts. A chat template that does not read parts gets their "
        "text, joined by newlines. Assistants and tools may leave it out.",
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

    def for_template(self, template: ChatTemplate) -> dict[str, Any]:
        """As transformers hands it to a template: without what is null. Only a template that tests
        for null content gets it, and one that cannot show calls gets empty text instead."""
        calls = self.tool_calls
        content: str | list[dict[str, str]] | None
        if isinstance(self.content, str):
            content = self.content
        else:
            content = [{"type": "text", "text": part.text} for part in self.content or ()] or None
        if content is None and not calls:
            content = ""
        reasoning = self.reasoning if self.reasoning_content is None else self.reasoning_content
        known: dict[str, Any] = {
            "role": self.role_for_template,
            "content": content,
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": reasoning,
            "reasoning": self.reasoning,
            "thinking": reasoning,
            "tool_calls": [call.for_template() for call in calls] if calls else None,
        }
        kept = {name: value for name, value in known.items() if value is not None}
        tests_null = content is None and template.tests_null_content
        return kept | ({"content": None} if tests_null else {})

    @property
    def size(self) -> int:
        """About the characters that a template writes for it."""
        texts = [self.content] if isinstance(self.content, str) else []
        texts += [part.text for part in self.content or () if isinstance(part, TextPart)]
        texts += [self.reasoning_content or self.reasoning or ""]
        calls = [str(call.function.arguments) for call in self.tool_calls or ()]
        return sum(len(text) + FRAME for text in (*texts, *calls))

    def last_words(self, template: ChatTemplate) -> str:
        """The text that a template shows last; empty where there is none."""
        if not isinstance(self.content, str) and self.role_for_template in template.part_roles:
            texts = [part.text for part in self.content or ()]
            return next((text for text in reversed(texts) if text.strip()), "")
        return self.text

    @property
    def text(self) -> str:
        """Its content; empty where there is none."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content or ())

    @property
    def role_for_template(self) -> str:
        return "system" if self.role == "developer" else self.role


class RenderingFields(Fields):
    """How messages become a prompt."""

    add_generation_prompt: bool | None = Field(
        None,
        description="Ask the chat template to open the assistant's turn. Default true, unless "
        "`continue_final_message` is.",
    )
    continue_final_message: bool | None = Field(
        None, description="Leave the last message open, so that the model continues it."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Further variables of the chat template."
    )
    tools: Tools = None

    @model_validator(mode="after")
    def _one_way_to_go_on(self) -> RenderingFields:
        if self.continue_final_message and self.add_generation_prompt:
            raise broken_rule(
                "continue_final_message",
                "continue_final_message and add_generation_prompt must not both be true",
            )
        return self

    @model_validator(mode="after")
    def _tools_are_told_apart(self) -> RenderingFields:
        check_names(self.tools or ())
        if self.tools and "tools" in (self.chat_template_kwargs or {}):
            raise broken_rule(
                "chat_template_kwargs", "chat_template_kwargs must not hold tools beside tools"
            )
        return self

    @property
    def shown_tools(self) -> Sequence[Tool]:
        """The tools that the model is told of."""
        return self.tools or ()

    @property
    def opens_a_turn(self) -> bool:
        """Whether the template is to open the assistant's turn."""
        return self.add_generation_prompt is not False and not self.continue_final_message


def render_chat(
    renderer: Renderer, form: AnswerForm, messages: Sequence[ChatMessage], how: RenderingFields
) -> Rendered:
    """The prompt of a conversation. ApiError 400 when the template refuses it, or results of tools
    follow no call."""
    check_results(messages)
    template, kwargs = renderer.template, how.chat_template_kwargs or {}
    shown = [as_shown(message.for_template(template), template, form) for message in messages]
    if template.takes_one_call:
        shown = with_single_calls(shown)
    tools = [tool.for_template() for tool in how.shown_tools]
    if tools and form.syntax is None:
        raise bad_value("tools", how.tools, "this server's model.tool_parser is none")
    if tools and template.shows_tools:
        kwargs = {**kwargs, "tools": tools}
    elif tools and form.syntax is not None:
        shown = with_instructions(shown, tools, form.syntax)
    try:
        prompt = renderer.render(shown, how.opens_a_turn, kwargs)
    except ValueError as error:
        raise invalid(str(error), "messages", "chat_template_error") from error
    if not how.continue_final_message:
        return prompt
    end = _end_of(messages[-1], prompt, renderer.template)
    return Rendered(prompt.text[:end], prompt.letters)


def _end_of(last: ChatMessage, prompt: Rendered, template: ChatTemplate) -> int:
    """Where the text of the last message ends in `prompt`, so that the model continues it.
    Templates may strip messages; white space at the end stays if the template wrote it. Special
    tokens of the template are no text of a message, if those in messages are letters."""
    shown = _without(prompt.text, template.specials_in_content)
    text = Rendered(shown, prompt.letters).plain()
    words = last.last_words(template)
    begin = text.rfind(words.strip())
    if not words.strip() or begin < 0:
        raise invalid(
            "continue_final_message is true: the last message must have text that the chat "
            "template shows as it is",
            "continue_final_message",
        )
    kept = words.lstrip()
    return begin + len(kept if text.startswith(kept, begin) else words.strip())


def _without(text: str, parts: Sequence[str]) -> str:
    """`text`, as long as before, with other characters in the place of `parts`."""
    pattern = "|".join(map(re.escape, sorted(parts, key=len, reverse=True)))
    return re.sub(pattern, lambda found: "\0" * len(found.group()), text) if pattern else text


def check_results(messages: Sequence[ChatMessage]) -> None:
    """ApiError 400 for the result of a tool that answers no call of the assistant before it, or
    for calls that their ids do not tell apart."""
    ids: dict[str | None, None] = {}  # of the calls before; a message may have very many
    for index, message in enumerate(messages):
        if message.role != "tool":
            ids = _ids_of(message.tool_calls or (), f"messages[{index}]")
            continue
        if message.tool_call_id not in ids and None not in ids:
            some = itertools.islice(ids, 8)
            known = ", ".join(shorten(known) for known in some) or "there is none"
            raise bad_value(
                f"messages[{index}].tool_call_id",
                message.tool_call_id,
                f"it must be the id of a call in the assistant message before it: {known}",
            )


def _ids_of(calls: Sequence[ToolCall], place: str) -> dict[str | None, None]:
    """In order. ApiError 400 if two calls have the same."""
    seen: dict[str | None, None] = {}
    for index, call in enumerate(calls):
        if call.id is not None and call.id in seen:
            allowed = "another call of this message has this id; they must differ"
            raise bad_value(f"{place}.tool_calls[{index}].id", call.id, allowed)
        seen[call.id] = None
    return seen


def _object(arguments: str | dict[str, Any] | None) -> Any:
    """Templates write arguments as JSON, so a string would be quoted twice. Text that is not a JSON
    object, such as that of a call cut off by the token limit, is shown as it is."""
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        value = json.loads(arguments) if arguments else {}
    except RecursionError as error:
        raise too_deep("arguments") from error
    except ValueError:
        return arguments
    check_shape(value, "arguments")
    return value if isinstance(value, dict) else arguments
