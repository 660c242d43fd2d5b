"""A request for a message as a chat request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from engine.messages import EngineInfo
from engine.request import SamplingParams
from server.anthropic.request import (
    Block,
    CountTokensRequest,
    Message,
    MessagesRequest,
    MessageTool,
    MessageToolChoice,
    Texts,
)
from server.http.errors import invalid
from server.http.request.validation import validation_error
from server.openai.inputs.convert import Prompt, chat_params
from server.openai.request.conversation import CalledFunction, ChatMessage, TextPart, ToolCall
from server.openai.request.schema import ChatRequest
from server.openai.request.structured import JsonSchemaFormat, ResponseFormat
from server.openai.request.tools import ChosenTools, FunctionDefinition, NamedFunction, Tool
from server.openai.request.wording import Names, reworded

SAME = ("model", "chat_template_kwargs")
SAME_WHEN_GENERATING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "ignore_eos",
    "priority",
    "cache_salt",
    "speculation",
    "stream",
)
NAMES: Names = (
    ("response_format.json_schema", "output_config.format"),
    ("response_format", "output_config.format"),
)
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


@dataclass(frozen=True, slots=True)
class Asked:
    """A chat request, and what its errors must name instead."""

    chat: ChatRequest
    names: Names


def chat_request(request: CountTokensRequest) -> Asked:
    """ApiError 400 if fields contradict each other."""
    messages, paths = _messages(request)
    choice = request.tool_choice
    serial = choice is not None and choice.disable_parallel_tool_use
    fields: dict[str, Any] = {
        **{name: getattr(request, name) for name in SAME},
        "messages": messages,
        "tools": [_tool(tool) for tool in request.tools] if request.tools else None,
        "tool_choice": _choice(choice),
        "parallel_tool_calls": False if serial else None,
        "response_format": _format(request),
        "continue_final_message": _continues(request.messages),
    }
    if isinstance(request, MessagesRequest):
        fields |= {name: getattr(request, name) for name in SAME_WHEN_GENERATING}
        fields["stop"] = request.stop_sequences
    names = [*paths, *_names_of_tools(request.tools or ()), *NAMES]
    try:
        return Asked(ChatRequest.model_validate(fields), names)
    except ValidationError as error:
        raise reworded(validation_error(error, fields), names) from error


def message_params(chat: ChatRequest, prompt: Prompt, info: EngineInfo) -> SamplingParams:
    """The parameters, with no more tokens than the context has room for."""
    room = info.max_model_len - len(prompt.token_ids)
    limit = (
        min(chat.max_tokens or room, room) if room > 0 else None
    )  # None: the error is the prompt's
    return chat_params(chat.model_copy(update={"max_tokens": limit}), prompt, info)


def _messages(request: CountTokensRequest) -> tuple[list[ChatMessage], list[tuple[str, str]]]:
    """The messages, and the names of the client's fields that they come from."""
    found: list[ChatMessage] = []
    names: list[tuple[str, str]] = []

    def add(path: str, **fields: Any) -> None:
        names.append((f"messages[{len(found)}]", path))
        found.append(ChatMessage(**fields))

    if request.system:
        add("system", role="system", content=_texts(request.system))
    for index, message in enumerate(request.messages):
        path = f"messages[{index}]"
        if isinstance(message.content, str):
            add(path, role=message.role, content=message.content)
        elif message.role == "assistant":
            at_calls = [at for at, each in enumerate(message.content) if each.type == "tool_use"]
            for number, at in enumerate(at_calls):
                call = f"messages[{len(found)}].tool_calls[{number}]"
                names.append((call, f"{path}.content[{at}]"))
            add(path, **_answer(message.content))
        else:
            for at, block in enumerate(message.content):
                if block.type == "tool_result":
                    where = f"{path}.content[{at}]"
                    names.append((f"messages[{len(found)}].tool_call_id", f"{where}.tool_use_id"))
                    add(where, **_result(block))
            texts = [_part(block.text) for block in message.content if block.type == "text"]
            if texts or not message.content:
                add(path, role=message.role, content=texts or "")
    return found, names


def _answer(blocks: Sequence[Block]) -> dict[str, Any]:
    thoughts = [block.thinking or "" for block in blocks if block.type == "thinking"]
    calls = [
        ToolCall(
            id=block.id,
            type="function",
            function=CalledFunction(name=block.name or "", arguments=block.input),
        )
        for block in blocks
        if block.type == "tool_use"
    ]
    return {
        "role": "assistant",
        "content": [_part(block.text) for block in blocks if block.type == "text"] or None,
        "tool_calls": calls or None,
        "reasoning_content": "\n".join(thoughts) or None,
    }


def _result(block: Block) -> dict[str, Any]:
    content = _texts(block.content or "")
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}


def _texts(texts: Texts) -> str | list[TextPart]:
    return texts if isinstance(texts, str) else [_part(block.text) for block in texts] or ""


def _part(text: str | None) -> TextPart:
    return TextPart(type="text", text=text or "")


def _continues(messages: Sequence[Message]) -> bool | None:
    """Whether the model is to continue the last message. ApiError 400 if it has nothing that can
    be continued."""
    last = messages[-1]
    if last.role != "assistant":
        return None
    texts = [last.content] if isinstance(last.content, str) else [b.text or "" for b in last.blocks]
    has_calls = any(block.type == "tool_use" for block in last.blocks)
    if has_calls or not "".join(texts).strip():
        name = f"messages[{len(messages) - 1}]"
        raise invalid(
            f"{name} is the last message: an assistant's must be text, which is continued", name
        )
    return True


def _tool(tool: MessageTool) -> Tool:
    given = tool.model_dump(include={"name", "description", "strict"})
    function = FunctionDefinition.model_validate({**given, "parameters": tool.input_schema})
    return Tool(type="function", function=function)


def _names_of_tools(tools: Sequence[MessageTool]) -> Names:
    return [
        (f"tools[{index}].function.parameters", f"tools[{index}].input_schema")
        for index in range(len(tools))
    ]


def _choice(choice: MessageToolChoice | None) -> Any:
    if choice is None:
        return None
    if choice.name is None:
        return CHOICES[choice.type]
    return ChosenTools(type="function", function=NamedFunction(name=choice.name))


def _format(request: CountTokensRequest) -> ResponseFormat | None:
    form = None if request.output_config is None else request.output_config.format
    if form is None:
        return None
    schema = JsonSchemaFormat(schema=form.schema_)
    return ResponseFormat(type="json_schema", json_schema=schema)
