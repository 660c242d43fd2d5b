"""Errors are in the words of the API: they name the field, its value and what is allowed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

import pytest

from server.http.errors import ApiError
from server.http.request.body import Fields, parse_body
from server.http.routes.admin import SwapDraftRequest
from server.openai.request.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from tests.support.servers.http_server import CHAT, COMPLETION

BAD_VALUES = [
    None, True, False, -3, 0, 1.5, 10**40, "", "x", "x" * 2000, "\0", [], [None], [True], [-1],
    ["x", 1], ["x"] * 2000, [[]], [{}], {}, {"x": None}, {"x": 1}, {"1": "x"}, {"1": 1e9},
    {"type": "x"}, {str(index): 1 for index in range(1025)},
]  # fmt: skip
VALID: dict[type[Fields], dict[str, Any]] = {
    ChatRequest: CHAT,
    CompletionRequest: COMPLETION,
    TokenizeRequest: {},
    DetokenizeRequest: {"tokens": [1]},
    SwapDraftRequest: {"path": None},
}
LIBRARY = (
    "Input should", "after validation", "Value error", "Field required", "valid string", "instance",
    "Extra inputs", "have another value", "List ", "Dictionary ", "unpacking", "_type", "'",
)  # fmt: skip


def error_for(model: type[Fields], body: dict[str, Any]) -> ApiError | None:
    try:
        parse_body(json.dumps(body).encode(), model)
    except ApiError as error:
        return error
    return None


def nested(kind: Any) -> type[Fields] | None:
    """The object type inside an annotation."""
    if isinstance(kind, type) and issubclass(kind, Fields):
        return kind
    return next(filter(None, map(nested, get_args(kind))), None)


def places(model: type[Fields], body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every field, also of nested objects, with bodies that hold a bad value there."""
    for name, field in model.model_fields.items():
        for value in BAD_VALUES:
            yield name, body | {name: value}
        inner = nested(field.annotation)
        if inner is not None:
            start = {"role": "user", "content": "a"} if name == "messages" else {}
            for below, content in places(inner, start):
                yield below, body | {name: content, **NEEDS.get(name, {})}
                yield below, body | {name: [content], **NEEDS.get(name, {})}


NEEDS = {"stream_options": {"stream": True}, "tool_calls": {"role": "assistant"}}


@pytest.mark.parametrize("model", VALID)
def test_no_error_speaks_the_words_of_a_library(model: type[Fields]) -> None:
    refused = set()
    for name, body in places(model, VALID[model]):
        error = error_for(model, body)
        if error is None:
            continue
        message = error.detail.message
        assert not any(phrase in message for phrase in LIBRARY), message
        assert error.detail.param, message
        assert error.detail.param.rpartition(".")[2].partition("[")[0] in message
        refused.add(name)
    assert refused >= set(model.model_fields) - {"return_token_strs"} or model is TokenizeRequest


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, "n is 0: it must be at least 1"),
        ({"n": "1"}, 'n is "1": it must be an integer'),
        ({"temperature": 3}, "temperature is 3: it must be at most 2"),
        ({"temperature": None, "stream": 1}, "stream is 1: it must be true or false"),
        ({"stop": ["a"] * 33}, "stop is an array of 33: it must have at most 32 entries"),
        ({"stop": 5}, "stop is 5: it must be a string or an array"),
        ({"stop": [1]}, "stop[0] is 1: it must be a string"),
        ({"logit_bias": {"a": 1}}, 'logit_bias.a is "a": a key must be a token id'),
        (
            {"logit_bias": {"5": 1, "05": 2}},
            'logit_bias is an object: its keys "5" and "05" are the same token id',
        ),
        ({"modalities": ["audio"]}, 'modalities[0] is "audio": it must be "text"'),
        ({"response_format": "text"}, 'response_format is "text": it must be an object'),
        ({"model": None}, "model is null: it must be a string"),
        ({"tool_choice": "required"}, "tool_choice is only allowed with tools"),
        ({"tools": [{}]}, "tools[0].type is missing: it is required"),
        ({"messages": None}, "messages is null: it must be an array"),
        (
            {"messages": [{"role": "x"}]},
            'messages[0].role is "x": it must be "developer", "system"',
        ),
        ({"messages": [{"role": "user"}]}, "content is null: with the role user it must be"),
        ({"top_logprobs": 2}, "top_logprobs is only allowed when logprobs is true"),
    ],
)
def test_messages_name_field_value_and_what_is_allowed(
    fields: dict[str, Any], message: str
) -> None:
    error = error_for(ChatRequest, CHAT | fields)
    assert error is not None
    assert error.detail.message.startswith(message)


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        ('{"model": "a", "model": "b", "messages": []}', "model"),
        ('{"messages": [{"role": "user", "content": "a", "role": "user"}]}', "role"),
        ('{"a": 1, "\\u0061": 2}', "a"),
        ('{"logit_bias": {"5": 1, "5": 2}}', "5"),
    ],
)
def test_a_key_that_occurs_twice_is_refused(raw: str, key: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_body(raw.encode(), ChatRequest)
    detail = caught.value.detail
    assert (detail.param, detail.code) == (key, "repeated_key")
    assert f'"{key}" occurs twice' in detail.message
