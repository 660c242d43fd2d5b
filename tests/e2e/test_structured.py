"""Structured output of the bundled model, through the OpenAI client."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema_rs
import openai
import pytest
from pydantic import BaseModel, Field

from engine.checkpoints.source import BUNDLED_ALIAS
from tests.support.servers.live_server import LiveServer

ASK: Any = [{"role": "user", "content": "Tell me about a person, in JSON."}]
BODY: dict[str, Any] = {"model": BUNDLED_ALIAS, "messages": ASK, "max_tokens": 200}
WORD = {"type": "string", "maxLength": 12}
SCHEMAS: list[dict[str, Any]] = [
    {"type": "boolean"},
    {"type": "null"},
    {"type": "integer", "minimum": -5, "maximum": 120},
    {"type": "integer", "multipleOf": 7, "exclusiveMinimum": 0, "maximum": 70},
    {"type": "string", "pattern": "^[A-Z][a-z]{2,8}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"enum": ["red", "green", 3, None, True]},
    {"const": {"a": [1, 2]}},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [WORD, {"type": "boolean"}], "items": False, "minItems": 2},
    {"anyOf": [{"type": "boolean"}, {"type": "array", "items": WORD, "maxItems": 2}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    {"$defs": {"w": WORD}, "type": "array", "items": {"$ref": "#/$defs/w"}, "maxItems": 3},
    {
        "type": "object",
        "properties": {"name": WORD, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {"kind": {"const": "dog"}, "tags": {"type": "array", "items": WORD,
                                                          "maxItems": 3}},
        "required": ["kind", "tags"],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {"a": {"type": "object", "properties": {"b": {"type": "boolean"}},
                             "required": ["b"], "additionalProperties": False}},
        "required": ["a"],
        "additionalProperties": False,
    },
    {
        "$defs": {"n": {"type": "object", "properties": {"v": {"type": "boolean"}},
                        "required": ["v"], "additionalProperties": False}},
        "type": "array", "items": {"$ref": "#/$defs/n"}, "minItems": 1, "maxItems": 2,
    },
]  # fmt: skip


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)
    mood: Literal["glad", "sad"]


@pytest.fixture(scope="module")
def bundled(native_cache: Path) -> Iterator[LiveServer]:
    settings = (
        "cache.num_blocks=512",
        f"files.dir={native_cache}",
        "speculation.tree=chain3",
        "scheduler.max_num_seqs=32",
    )
    with LiveServer(*settings, config="smollm2") as live:
        yield live
        assert live.stop() == 0


def test_parse_gives_a_model(bundled: LiveServer) -> None:
    client = bundled.client()
    reply = client.chat.completions.parse(**BODY, response_format=Person, seed=1)
    (choice,) = reply.choices
    assert isinstance(choice.message.parsed, Person)
    assert choice.finish_reason == "stop"
    drafts = {"speculation": {"enabled": False}}
    plain = client.chat.completions.parse(**BODY, response_format=Person, seed=1, extra_body=drafts)
    assert plain.choices[0].message.content == choice.message.content


def test_a_stream_says_what_the_whole_reply_says(bundled: LiveServer) -> None:
    client = bundled.client()
    fields: dict[str, Any] = {**BODY, "seed": 2, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.parse(**fields, response_format=Person)
    with client.chat.completions.stream(**fields, response_format=Person) as stream:
        for _ in stream:
            pass
        end = stream.get_final_completion()
    assert end.choices[0].message.parsed == whole.choices[0].message.parsed
    assert end.choices[0].message.content == whole.choices[0].message.content
    assert all(-100 < one.logprob <= 0 for one in whole.choices[0].logprobs.content)  # type: ignore[union-attr]


def test_a_text_that_is_cut_says_so(bundled: LiveServer) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        bundled.client().chat.completions.parse(**BODY | {"max_tokens": 5}, response_format=Person)


def test_hot_texts_of_twenty_schemas_are_valid(bundled: LiveServer) -> None:
    async def one(client: openai.AsyncOpenAI, seed: int, schema: dict[str, Any]) -> Any:
        form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return await client.chat.completions.create(
            **BODY, temperature=1.0, seed=seed, response_format=form
        )

    async def all_of_them() -> list[Any]:
        async with bundled.async_client() as client:
            return await asyncio.gather(*(one(client, *pair) for pair in enumerate(SCHEMAS)))

    for schema, reply in zip(SCHEMAS, asyncio.run(all_of_them()), strict=True):
        (choice,) = reply.choices
        assert choice.finish_reason == "stop", (schema, choice.message.content)
        jsonschema_rs.validate(schema, json.loads(choice.message.content))


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"choice": ["Paris", "Rome"]}, "Paris|Rome"),
        ({"regex": "[0-9]{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
        ({"grammar": 'start: "<" /[a-z]{2,5}/ ">"'}, "<[a-z]{2,5}>"),
        ({"grammar": 'root ::= "x" [0-9] "y"'}, "x[0-9]y"),
        ({"json_object": True, "n": 2}, r"\{.*"),
    ],
)
def test_other_forms(bundled: LiveServer, asked: dict[str, Any], pattern: str) -> None:
    number = asked.pop("n", 1)
    extra = {"structured_outputs": asked, "min_tokens": 1}
    reply = bundled.client().completions.create(
        model=BUNDLED_ALIAS,
        prompt="The capital of France is",
        max_tokens=40,
        n=number,
        seed=3,
        presence_penalty=0.5,
        extra_body=extra,
    )
    for choice in reply.choices:
        assert re.fullmatch(pattern, choice.text, re.DOTALL)
        assert choice.finish_reason == "stop" or "json_object" in asked


def test_a_schema_that_cannot_be_done_is_a_400(bundled: LiveServer) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
    with pytest.raises(openai.BadRequestError) as caught:
        bundled.client().chat.completions.create(**BODY, response_format=form)
    assert caught.value.param == "response_format.json_schema.schema"


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": WORD, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
WEATHER: dict[str, Any] = BODY | {
    "messages": [{"role": "user", "content": "How is the weather in Paris?"}],
    "tools": [TOOL],
    "temperature": 0,
}


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ("required", "tool_calls"),
        ({"type": "function", "function": {"name": "get_weather"}}, "stop"),
    ],
)
def test_calls_that_must_come_fit_their_schema(
    bundled: LiveServer, choice: Any, reason: str
) -> None:
    client, fields = bundled.client(), WEATHER | {"parallel_tool_calls": False}
    whole = client.chat.completions.create(**fields, tool_choice=choice).choices[0]
    with client.chat.completions.stream(**fields, tool_choice=choice) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0]
    for end in (whole, streamed):
        assert end.finish_reason == reason
        (call,) = end.message.tool_calls or ()
        assert call.function.name == "get_weather"  # type: ignore[union-attr]
        arguments = call.function.arguments  # type: ignore[union-attr]
        jsonschema_rs.validate(TOOL["function"]["parameters"], json.loads(arguments))
    assert streamed.message.tool_calls[0].function.arguments == arguments  # type: ignore[index]


def test_an_answer_goes_on_after_the_result_of_a_call(bundled: LiveServer) -> None:
    client = bundled.client()
    fields = WEATHER | {"parallel_tool_calls": False}
    message = client.chat.completions.create(**fields, tool_choice="required").choices[0].message
    assert message.tool_calls
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Sunny, 21 C"}
    fields["messages"] = [*fields["messages"], message.model_dump(exclude_none=True), result]
    reply = client.chat.completions.create(**fields).choices[0]
    assert reply.message.content or reply.message.tool_calls
