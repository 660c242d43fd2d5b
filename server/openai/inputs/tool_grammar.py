"""The grammar of an answer that must call tools, or may call them instead of being JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from engine.request import Grammar
from server.http.context import ServerContext
from server.http.errors import bad_value, shorten
from server.openai.inputs.python_calls import call_rules, has_keywords, list_grammar
from server.openai.request.schema import ChatRequest
from server.openai.request.structured import MAX_SCHEMA, AskedGrammar, asked_grammar, json_rule
from server.openai.request.tools import Tool
from server.text.answer.calls import Syntax
from server.text.answer.forms import SYNTAXES
from server.text.answer.thinking import MARKS

MAX_CALLS = 16  # in one answer
NOTHING = {"properties": {}, "additionalProperties": False}
MAX_TEXT = 2 * MAX_SCHEMA  # characters of a grammar
HERE = "\0"  # stands for the arguments
# The beginning of a call up to its name, and what may stand before its arguments.
NAME = r'\{{\s*("type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"{name}"'
ARGUMENTS = r'\s*,\s*"(arguments|parameters)"\s*:\s*'
LINE_END = r"\n"
PYTHON = SYNTAXES["llama4_pythonic"]
JSON_SYNTAX = SYNTAXES["llama3_json"]  # where arguments have schemas that are not those of keywords


def chat_grammar(context: ServerContext, body: ChatRequest) -> AskedGrammar | None:
    """What an answer must match: calls, if it must be calls; else what the request asks for.

    Raises:
        ApiError: 400; two things are asked for that exclude each other.
    """
    asked, syntax = asked_grammar(body), context.answer_form.syntax
    if syntax is None or not body.shown_tools:
        return asked
    if body.must_call:
        if asked is not None:
            raise bad_value(
                "tool_choice", body.tool_choice, f'with {asked.field} only "auto" and "none" are'
            )
        form = forced_syntax(syntax, body.shown_tools)
        text = call_grammar(form, body.shown_tools, body.most_calls)
        return _checked(text, "tools", list(body.shown_tools), _parts(body))
    if asked is None:
        return _strict_calls(context, body, syntax)
    if asked.grammar.kind != "json_schema":
        raise bad_value("tools", list(body.shown_tools), f"not allowed with {asked.field}")
    form, schema = forced_syntax(syntax, body.shown_tools), json.loads(asked.grammar.text)
    text = call_grammar(form, body.shown_tools, body.most_calls, schema)
    return _checked(text, asked.field, asked.value, (asked, *_parts(body)))


def _strict_calls(context: ServerContext, body: ChatRequest, syntax: Syntax) -> AskedGrammar | None:
    """What an answer must match that may call functions, some of them strict."""
    tools = [tool for tool in body.shown_tools if tool.function.strict]
    if syntax is PYTHON and tools:
        tools = list(body.shown_tools)  # of one list
    if not tools or (syntax is PYTHON and not all(map(has_keywords, tools))):
        return None
    thought = MARKS if context.answer_form.thinks else ()
    specials = {
        mark: found
        for mark in (*syntax.marks, *thought)
        if (found := context.tokenizer.special_id(mark)) is not None
    }
    text = strict_grammar(syntax, tools, specials)
    return _checked(text, "tools", list(tools), _parts(body))


def _checked(text: str, field: str, value: Any, parts: tuple[AskedGrammar, ...]) -> AskedGrammar:
    if len(text) > MAX_TEXT:
        raise bad_value(field, value, f"the grammar of its calls has over {MAX_TEXT} characters")
    return AskedGrammar(Grammar("lark", text), field, value, parts=parts)


def _parts(body: ChatRequest) -> tuple[AskedGrammar, ...]:
    """The arguments of each function by themselves, to find those that no grammar can ensure."""
    shown = {tool.name for tool in body.shown_tools}
    return tuple(
        AskedGrammar(
            Grammar("lark", f"start: {_arguments(tool)}"),
            f"tools[{index}].function.parameters",
            tool.function.parameters,
            f"of the function {shorten(tool.name)}: ",
        )
        for index, tool in enumerate(body.tools or ())
        if tool.name in shown
    )


def forced_syntax(syntax: Syntax, tools: Sequence[Tool]) -> Syntax:
    """In which a grammar writes the calls of a model."""
    return syntax if syntax is not PYTHON or all(map(has_keywords, tools)) else JSON_SYNTAX


def call_grammar(
    syntax: Syntax, tools: Sequence[Tool], most: int | None, answer: Any = None
) -> str:
    """In llguidance's Lark: up to `most` calls, one after the other; or JSON that fits the schema
    `answer`."""
    if syntax is PYTHON:
        wanted = None if answer is None else json_rule(answer, lenient=False)
        return list_grammar(tools, MAX_CALLS if most is None else most, wanted)
    more = (MAX_CALLS if most is None else most) - 1
    further = f" (between call){{0,{more}}}" if more else ""
    rules = [
        f"start: call{further}" + (" | answer" if answer is not None else ""),
        "call: " + " | ".join(f"call_{index}" for index in range(len(tools))),
    ]
    if more:
        rules.append(f"between: {json.dumps(syntax.between)}")
    if answer is not None:
        rules.append(f"answer: {json_rule(answer, lenient=False)}")
    for index, tool in enumerate(tools):
        before, _, after = syntax.written([(tool.name, HERE)]).partition(HERE)
        rules.append(f"call_{index}: {json.dumps(before)} arguments_{index} {json.dumps(after)}")
        rules.append(f"arguments_{index}: {_arguments(tool)}")
    return "\n".join(rules)


def strict_grammar(syntax: Syntax, tools: Sequence[Tool], specials: Mapping[str, int]) -> str:
    """In llguidance's Lark: free text, in which the arguments of these functions fit their schemas.
    A call begins where a reader of this syntax may see one, up to its name: from there on nothing
    else may follow; in Python, up to the end of the list.

    Args:
        specials: the marks that are special tokens, and their ids. Free text has no others.
    """
    begin = _begin_of_call(syntax, specials)
    after = [number for mark, number in specials.items() if mark in syntax.markers]
    parts = [f"TEXT <[{number}]>" for number in specials.values()]
    rules = []
    for index, tool in enumerate(tools):
        head = _head(syntax, tool)
        if begin is not None:
            parts.append(f"begin_{index} rest_{index}")
            rules.append(f"begin_{index}[lazy]: /{begin}{head}/")
        if after and not syntax.line_marker:
            marks = " | ".join(f"<[{number}]>" for number in after)
            parts.append(f"TEXT ({marks}) marked_{index} rest_{index}")
            rules.append(f"marked_{index}[lazy]: /\\s*{head}/")
        if syntax is PYTHON:
            rules.append(f'rest_{index}: arguments_{index} ")" (", " call)* "]"')
            continue
        bare = "" if tool.function.parameters else " | /\\s*\\}/"
        rules.append(f"rest_{index}: /{ARGUMENTS}/ arguments_{index} /\\s*\\}}/{bare}")
        rules.append(f"arguments_{index}: {_arguments(tool)}")
    rules += call_rules(tools) if syntax is PYTHON else ()
    rules.append("part: " + " | ".join(parts))
    return "\n".join(["start: part* TEXT", "TEXT: /(.|\\n)*/", *rules])


def _head(syntax: Syntax, tool: Tool) -> str:
    """A regular expression for the begin of a call up to its name."""
    name = re.escape(tool.name)
    return rf"\[\s*{name}\(" if syntax is PYTHON else NAME.format(name=name)


def _begin_of_call(syntax: Syntax, specials: Mapping[str, int]) -> str | None:
    """A regular expression for free text up to a call; None: calls follow special tokens only."""
    marks = [re.escape(mark) for mark in syntax.markers if mark not in specials]
    if not syntax.line_marker:
        return rf"(.|\n)*({'|'.join(marks)})\s*" if marks else None
    return rf"((.|\n)*({'|'.join((LINE_END, *marks))}))?[\s{syntax.separators}]*"


def _arguments(tool: Tool) -> str:
    schema = {"type": "object", **(tool.function.parameters or NOTHING)}
    return json_rule(schema, lenient=not tool.function.strict)
