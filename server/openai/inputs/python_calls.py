"""Grammars of calls in Python: [f(a=1), g(b="x")]. Values are JSON, which a reader of such calls
takes, too; only switches and nothing are written as Python has them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from server.openai.request.structured import json_rule
from server.openai.request.tools import Tool
from server.text.answer.llama4_pythonic import MAX_NAME

NAME = re.compile(rf"[A-Za-z0-9_.-]{{1,{MAX_NAME}}}")
# What may stand beside the properties: a schema with anything else is more than its arguments.
BESIDE = frozenset(
    (
        "type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema",
        "title", "description", "default", "examples", "$comment",
    )
)  # fmt: skip
DEFINITIONS = ("$defs", "definitions")
WORDS = {"boolean": '("True" | "False")', "null": '"None"'}


def has_keywords(tool: Tool) -> bool:
    """Whether the arguments of a function are keywords, each with a schema of its own."""
    schema = tool.function.parameters or {}
    properties = schema.get("properties", {})
    return (
        schema.keys() <= BESIDE
        and set(schema.get("required", ())) <= properties.keys()
        and all(map(NAME.fullmatch, [tool.name, *properties]))
        and all(isinstance(each, dict) for each in properties.values())
        and all(_is_known(target, schema) for target in _references(properties))
    )


def _references(schema: Any) -> Iterator[Any]:
    if isinstance(schema, dict):
        if "$ref" in schema:
            yield schema["$ref"]
        for member in schema.values():
            yield from _references(member)
    elif isinstance(schema, list):
        for member in schema:
            yield from _references(member)


def _is_known(target: Any, schema: dict[str, Any]) -> bool:
    """Whether a reference is to one of the definitions, which each argument gets."""
    return any(str(target).startswith(f"#/{name}/") and name in schema for name in DEFINITIONS)


def list_grammar(tools: Sequence[Tool], most: int, answer: str | None) -> str:
    """In llguidance's Lark: a list of up to `most` calls, or what the rule `answer` says."""
    further = f' (", " call){{0,{most - 1}}}' if most > 1 else ""
    rules = [
        f'start: "[" call{further} "]"' + ("" if answer is None else " | answer"),
        *([] if answer is None else [f"answer: {answer}"]),
        *call_rules(tools),
    ]
    return "\n".join(rules)


def call_rules(tools: Sequence[Tool]) -> Iterator[str]:
    """Rules for `call`, of any of these functions, and `arguments_i`, of the i-th."""
    yield "call: " + " | ".join(f"call_{index}" for index in range(len(tools)))
    for index, tool in enumerate(tools):
        yield f'call_{index}: {json.dumps(tool.name + "(")} arguments_{index} ")"'
        yield from _arguments(index, tool)


def _arguments(index: int, tool: Tool) -> Iterator[str]:
    """In the order of the properties; those that are not required may be left out. `first_i_k`:
    none came before the k-th, `more_i_k`: some did."""
    schema = tool.function.parameters or {}
    properties = schema.get("properties", {})
    shared = {name: schema[name] for name in DEFINITIONS if name in schema}
    yield f"arguments_{index}: first_{index}_0"
    for number, (name, value) in enumerate(properties.items()):
        after = f"{index}_{number + 1}"
        for rule, between in (("first", ""), ("more", ", ")):
            given = f"{json.dumps(between + name + '=')} value_{index}_{number} more_{after}"
            left_out = "" if name in schema.get("required", ()) else f" | {rule}_{after}"
            yield f"{rule}_{index}_{number}: {given}{left_out}"
        lenient = not tool.function.strict
        yield f"value_{index}_{number}: {_value({**shared, **value}, lenient)}"
    for rule in ("first", "more"):
        yield f'{rule}_{index}_{len(properties)}: ""'


def _value(schema: dict[str, Any], lenient: bool) -> str:
    word = WORDS.get(str(schema.get("type")))
    is_free = word is not None and not {"const", "enum"} & schema.keys()
    return str(word) if is_free else json_rule(schema, lenient)
