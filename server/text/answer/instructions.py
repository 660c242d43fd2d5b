"""Tells a model of tools where its chat template does not."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from server.text.answer.calls import Syntax
from server.text.answer.forms import OTHERS, SYNTAXES, AnswerForm
from server.text.template.chat_template import ChatTemplate, plain_text

INSTRUCTIONS = """You can call functions. These are their signatures, as JSON:
<tools>
{tools}
</tools>
To call functions, answer with nothing but calls of this form:
{example}
The next message then holds what they returned."""
EXAMPLE = ("function_name", {"argument_name": "value"})


def with_instructions(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], syntax: Syntax
) -> list[dict[str, Any]]:
    """The conversation with the tools in its system message, which is put in front if there is
    none."""
    text = INSTRUCTIONS.format(
        tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools),
        example=syntax.written([EXAMPLE]),
    )
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *map(dict, messages)]
    first, *others = map(dict, messages)
    return [_with_text(first, f"\n\n{text}"), *others]


def as_shown(message: dict[str, Any], template: ChatTemplate, form: AnswerForm) -> dict[str, Any]:
    """A message that a template shows whole: where it knows no calls, they are part of the text,
    and where it knows no results of tools, these come from the user."""
    if message.get("tool_calls") and not template.shows_tool_calls:
        return _with_written_calls(message, form.syntax or SYNTAXES[OTHERS])
    if message["role"] == "tool" and not template.shows_results:
        text = f"<tool_response>\n{plain_text(message.get('content'))}\n</tool_response>"
        return {"role": "user", "content": text}
    return message


def with_single_calls(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with one call in a message, each followed by its result, for templates that
    take no more."""
    found: list[dict[str, Any]] = []
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            found.append(message)
            continue
        results: dict[Any, list[dict[str, Any]]] = {}  # by the id of their call
        while at < len(messages) and messages[at]["role"] == "tool":
            results.setdefault(messages[at].get("tool_call_id"), []).append(messages[at])
            at += 1
        for number, call in enumerate(calls):
            words = {} if number == 0 or "content" not in message else {"content": ""}
            found.append({**message, **words, "tool_calls": [call]})
            found += results.pop(call["id"], ())
        found += itertools.chain.from_iterable(results.values())
    return found


def _with_written_calls(message: Mapping[str, Any], syntax: Syntax) -> dict[str, Any]:
    kept = {name: value for name, value in message.items() if name != "tool_calls"}
    functions = [call["function"] for call in message["tool_calls"]]
    calls = syntax.written([(each["name"], each["arguments"]) for each in functions])
    return _with_text(kept, ("\n" if kept.get("content") else "") + calls)


def _with_text(message: dict[str, Any], text: str) -> dict[str, Any]:
    content = message.get("content") or ""
    if isinstance(content, list):
        return {**message, "content": [*content, {"type": "text", "text": text.strip("\n")}]}
    return {**message, "content": content + text}
