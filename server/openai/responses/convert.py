"""A request for a response as a chat request."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from engine.messages import EngineInfo
from server.http.context import ServerContext
from server.http.errors import ApiError
from server.http.request.validation import validation_error
from server.openai.inputs.conversion import CHAT, Conversion
from server.openai.inputs.convert import Prompt, chat_prompts
from server.openai.request.conversation import ChatMessage
from server.openai.request.schema import ChatRequest
from server.openai.request.structured import JsonSchemaFormat, ResponseFormat
from server.openai.request.tools import (
    AllowedTools,
    ChosenTools,
    FunctionDefinition,
    NamedTool,
    Tool,
)
from server.openai.request.tools import NamedFunction as ChatFunction
from server.openai.request.wording import Names, reworded
from server.openai.responses.items import SYSTEM, Conversation, InputItem
from server.openai.responses.request import (
    ChosenFunctions,
    FunctionTool,
    InputTokensRequest,
    ResponsesRequest,
)

SAME = ("chat_template_kwargs", "parallel_tool_calls")
SAME_WHEN_GENERATING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "ignore_eos",
    "priority",
    "cache_salt",
    "prompt_cache_key",
    "speculation",
    "stream",
    "top_logprobs",
)
NAMES: Names = (
    ("messages", "input"),
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
    ("max_completion_tokens", "max_output_tokens"),
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A chat request, and what its errors must name instead."""

    chat: ChatRequest
    names: Names


def chat_request(
    request: InputTokensRequest, model_name: str, earlier: Callable[[], Sequence[InputItem]]
) -> Asked:
    """`model_name`: the model of a request that names none; `earlier`: the items of the
    conversation before this request.

    Raises:
        ApiError: 400; fields contradict each other.
    """
    conversation = Conversation()
    if request.instructions is not None:
        conversation.instruct(request.instructions)
    conversation.add(earlier(), "previous_response_id")
    conversation.add(request.items, "input")
    fields: dict[str, Any] = {
        **{name: getattr(request, name) for name in SAME},
        "model": model_name if request.model is None else request.model,
        "messages": conversation.messages(),
        "max_completion_tokens": request.max_output_tokens,
        "response_format": _format(request),
        "tools": [_tool(tool) for tool in request.tools] if request.tools else None,
        "tool_choice": _choice(request.tool_choice),
    }
    if isinstance(request, ResponsesRequest):
        fields |= {name: getattr(request, name) for name in SAME_WHEN_GENERATING}
        fields["logprobs"] = request.scored or None
    names = [*conversation.names(), *NAMES]
    try:
        return Asked(ChatRequest.model_validate(fields), names)
    except ValidationError as error:
        raise reworded(validation_error(error, fields), names) from error


def _tool(tool: FunctionTool) -> Tool:
    function = {name: getattr(tool, name) for name in FunctionDefinition.model_fields}
    return Tool(type="function", function=FunctionDefinition(**function))


def _choice(choice: ChosenFunctions | Any) -> Any:
    if not isinstance(choice, ChosenFunctions):
        return choice
    if choice.name is not None:
        return ChosenTools(type="function", function=ChatFunction(name=choice.name))
    assert choice.mode is not None
    named = [
        NamedTool(type="function", function=ChatFunction(name=tool.name))
        for tool in choice.tools or ()
    ]
    allowed = AllowedTools(mode=choice.mode, tools=named)
    return ChosenTools(type="allowed_tools", allowed_tools=allowed)


def _format(request: InputTokensRequest) -> ResponseFormat | None:
    form = None if request.text is None else request.text.format
    if form is None:
        return None
    if form.schema_ is None:
        return ResponseFormat(type=form.type)
    kept = form.model_dump(include={"name", "schema_", "strict"}, by_alias=True)
    schema = JsonSchemaFormat.model_validate(kept)
    return ResponseFormat(type="json_schema", json_schema=schema)


def shortened_prompts(context: ServerContext, info: EngineInfo, body: ChatRequest) -> list[Prompt]:
    """The prompt with as many of the newest turns as leave room for the output, and the system
    messages at the start. A turn begins with a user's message; the last one always stays."""
    room = info.max_model_len - (body.token_limit or 1)
    turns = Turns(body.messages)
    lead = body.messages[: turns.starts[0]]

    def prompts(turn: int) -> list[Prompt]:
        return chat_prompts(context, info, _without(body, lead, turns.starts[turn]))

    def fits(turn: int) -> bool:
        try:
            (prompt,) = prompts(turn)
        except ApiError as error:
            if error.detail.code != "context_length_exceeded":
                raise
            return False
        return len(prompt.token_ids) <= room

    return prompts(turns.first_that(fits, room))


SHORTENED: Conversion[ChatRequest] = dataclasses.replace(CHAT, prompts=shortened_prompts)


class Turns:
    """The turns of a conversation after the system's messages at its start."""

    def __init__(self, messages: Sequence[ChatMessage]) -> None:
        lead = 0
        while lead < len(messages) - 1 and messages[lead].role in SYSTEM:
            lead += 1
        after = range(lead + 1, len(messages))
        # Where the messages after the leading ones begin, then every turn.
        self.starts = [lead, *(index for index in after if messages[index].role == "user")]
        self._sizes = [0]  # of the last i messages
        for message in reversed(messages):
            self._sizes.append(self._sizes[-1] + message.size)

    def first_that(self, fits: Callable[[int], bool], room: int) -> int:
        """The first turn from which on the conversation fits, or the last one. What does not fit is
        never much longer than what does, so that the time does not depend on what is left out.

        Args:
            fits: whether it fits from a turn on.
            room: characters that are tried first.
        """
        last = len(self.starts) - 1
        fewest, most = 0, last
        while fewest < most:  # `most` fits, or is the last turn
            tried = self._turn_of(room, fewest, most)
            if not fits(tried):
                fewest = tried + 1
                break
            most, room = tried, 2 * room
        if most == last and fewest < last and not fits(last):
            return last  # what always stays is too long
        while fewest < most:
            half = (self._size(fewest) + self._size(most)) // 2
            tried = self._turn_of(half, fewest, most)
            if fits(tried):
                most = tried
            else:
                fewest = tried + 1
        return fewest

    def _size(self, turn: int) -> int:
        """Characters from a turn on."""
        return self._sizes[len(self._sizes) - 1 - self.starts[turn]]

    def _turn_of(self, size: int, fewest: int, most: int) -> int:
        """The first turn, from `fewest` to before `most`, from which on there are at most so many
        characters; the last of them if all have more."""
        turns = range(fewest, most)
        return min(bisect_left(turns, -size, key=lambda turn: -self._size(turn)) + fewest, most - 1)


def _without(body: ChatRequest, lead: Sequence[ChatMessage], begin: int) -> ChatRequest:
    return body.model_copy(update={"messages": [*lead, *body.messages[begin:]]})
