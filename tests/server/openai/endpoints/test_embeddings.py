"""/v1/embeddings: what the engine is asked, how vectors are written, and what is refused."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from openai.types import CreateEmbeddingResponse

from engine.messages import ErrorCode, Finished, Tokens
from engine.request import FinishReason, Request
from tests.server.openai.test_refusals import error_of
from tests.support.engines.scripted_engine import INFO, fail, finished
from tests.support.servers.http_server import MODEL, Server

MakeServer = Callable[..., Server]
PATH = "/v1/embeddings"
STATE = np.array([3.0, 0.0, 4.0, 12.0], np.float32)  # of the hidden size of `INFO`


def embed(request: Request) -> Sequence[Tokens | Finished]:
    """The state, times the length of the prompt."""
    pooled = (STATE * np.float32(len(request.prompt_ids))).tobytes()
    return [
        Tokens(request.request_id, [], pooled=pooled),
        finished(request, FinishReason.STOP),
    ]


@pytest.fixture
def server(make_server: MakeServer) -> Server:
    return make_server(embed)


def ask(server: Server, input: Any = "hi", **fields: Any) -> httpx.Response:
    return server.post(PATH, {"model": MODEL, "input": input} | fields)


INPUTS = {
    "text": ("hi", 1),
    "texts": (["hi", "hello there"], 2),
    "ids": ([5, 6, 7], 1),
    "lists of ids": ([[5], [6, 7]], 2),
}


@pytest.mark.parametrize(("given", "number"), INPUTS.values(), ids=INPUTS)
def test_each_input_is_a_prompt_without_output(server: Server, given: Any, number: int) -> None:
    reply = ask(server, given, normalize=False)
    found = CreateEmbeddingResponse.model_validate_json(reply.text, strict=True)
    lengths = [len(request.prompt_ids) for request in server.engine.submitted]
    assert [item.index for item in found.data] == list(range(number))
    assert [item.embedding for item in found.data] == [(STATE * n).tolist() for n in lengths]
    assert found.usage.prompt_tokens == found.usage.total_tokens == sum(lengths)
    for request in server.engine.submitted:
        assert (request.params.max_tokens, request.params.pooling) == (0, "last")


def test_embeddings_count_as_requests_that_stopped_but_have_no_first_token(server: Server) -> None:
    assert ask(server, ["hi", "hello there"]).status_code == 200
    lines = server.get("/metrics").text.splitlines()
    for prefix in ("aerie", "vllm"):
        found = [
            line for line in lines if line.startswith(f"{prefix}:time_to_first_token_seconds_count")
        ]
        assert all(line.endswith(" 0.0") for line in found), found
        ended = [line for line in lines if line.startswith(f"{prefix}:request_success_total")]
        assert [line for line in ended if '"length"' in line and not line.endswith(" 0.0")] == []
        assert any('"stop"' in line and line.endswith(" 2.0") for line in ended), ended


def test_vectors_are_cut_then_brought_to_length_one(server: Server) -> None:
    whole = ask(server).json()["data"][0]["embedding"]
    np.testing.assert_allclose(whole, STATE / 13, rtol=1e-6)
    cut = ask(server, dimensions=3).json()["data"][0]["embedding"]
    np.testing.assert_allclose(cut, [0.6, 0, 0.8], rtol=1e-6)
    text = ask(server, encoding_format="base64").json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(text), "<f4").tolist() == whole


def test_pooling_is_that_of_the_request_or_of_the_server(make_server: MakeServer) -> None:
    server = make_server(embed, model={"pooling": "mean"})
    for fields, expected in (({}, "mean"), ({"pooling": "last"}, "last")):
        assert ask(server, **fields).status_code == 200
        assert server.engine.submitted[-1].params.pooling == expected


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"input": []}, "input", "at least 1 entry"),
    ({"input": [[]]}, "input[0]", "at least 1 entry"),
    ({"input": ["a", 5]}, "input", "of one kind"),
    ({"input": ["a"] * 4}, "input", "at most 3 inputs per request (server.max_embeddings)"),
    ({"input": [5, 999]}, "input[1]", "input[1] is 999: token ids must be below 384"),
    ({"input": [[5], [5, 999]]}, "input[1][1]", "input[1][1] is 999: token ids must"),
    ({"input": ""}, "input", "is empty: input must have at least one token"),
    ({"input": ["a", ""]}, "input[1]", "is empty: input[1] must have at least one"),
    (
        {"input": [5] * 65},
        "input",
        "is 64 tokens. However, your input has 65 tokens. Please reduce the length of input.",
    ),
    ({"input": ["a", "b" * 99]}, "input[1]", "99 tokens. Please reduce the length of input[1]."),
    ({"dimensions": 5}, "dimensions", "it must be at most 4"),
    ({"dimensions": 0}, "dimensions", "it must be at least 1"),
    ({"encoding_format": "int8"}, "encoding_format", '"float" or "base64"'),
    ({"pooling": "cls"}, "pooling", '"last" or "mean"'),
    ({"nonsense": 1}, "nonsense", "Unknown field"),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED)
def test_what_cannot_be_done_is_a_400_that_names_the_field(
    make_server: MakeServer, fields: dict[str, Any], param: str, words: str
) -> None:
    server = make_server(embed, max_embeddings=3)
    error = error_of(ask(server, **fields), 400)
    assert (error["param"], words in error["message"]) == (param, True), error
    assert server.engine.submitted == []
    assert server.context.admission.num_waiting == 0


def test_more_inputs_than_choices_are_allowed(make_server: MakeServer) -> None:
    server = make_server(embed, max_choices=2)
    assert len(ask(server, ["hi"] * 5, truncate_prompt_tokens=1).json()["data"]) == 5
    assert all(len(request.prompt_ids) == 1 for request in server.engine.submitted)


def test_a_failing_input_fails_the_request_and_aborts_the_others(make_server: MakeServer) -> None:
    server = make_server(fail([], "NaN", ErrorCode.UNSOUND))
    assert error_of(ask(server, ["a", "b"]), 500)["code"] == "internal_error"
    server.engine.info = msgspec.structs.replace(INFO)
    assert server.engine.open_ids == []
    assert server.context.admission.num_waiting == 0
