"""`speculation.trace`: where each token of a reply came from, and the trees that were verified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from engine.messages import DraftNodes, DraftSource, Round
from tests.support.engines.scripted_engine import steps
from tests.support.servers.http_server import (
    CHAT,
    CHAT_PATH,
    COMPLETION,
    COMPLETION_PATH,
    Server,
    events_of,
)

MakeServer = Callable[..., Server]
PATHS = [(CHAT_PATH, CHAT), (COMPLETION_PATH, COMPLETION)]
TRACE = {"trace": True}
EOS = 2


def drafted(server: Server, text: str, parents: Sequence[int]) -> DraftNodes:
    return DraftNodes(tuple(server.ids(text)), tuple(parents))


@pytest.fixture
def traced(make_server: MakeServer, server: Server) -> Server:
    """Says "abcd": a token without drafts, then a tree, then a chain that was looked up."""
    tree = Round(DraftSource.HEAD, drafted(server, "xbc", (0, 0, 2)), (2, 3))
    found = Round(DraftSource.LOOKUP, drafted(server, "yz", (0, 1)), ())
    said = (("a", Round()), ("bcd", tree), ("", found))
    parts = [(server.ids(text), round) for text, round in said]
    parts[-1][0].append(EOS)
    return make_server(steps(*parts))


TOKENS = [("a", "bonus", 0), ("b", "draft", 1), ("c", "draft", 2), ("d", "bonus", 0)]
ROUNDS = [
    {"source": None, "nodes": [], "accepted": []},
    {
        "source": "draft",
        "nodes": [
            {"token": "x", "parent": 0},
            {"token": "b", "parent": 0},
            {"token": "c", "parent": 2},
        ],
        "accepted": [2, 3],
    },
    {
        "source": "lookup",
        "nodes": [{"token": "y", "parent": 0}, {"token": "z", "parent": 1}],
        "accepted": [],
    },
]


def origins(traces: Sequence[dict[str, Any]]) -> list[tuple[str, str, int]]:
    tokens = [token for trace in traces for token in trace["tokens"]]
    assert all(token["bytes"] == list(token["token"].encode()) for token in tokens)
    return [(token["token"], token["origin"], token["depth"]) for token in tokens]


def rounds(traces: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [round for trace in traces for round in trace["rounds"]]


@pytest.mark.parametrize(("path", "body"), PATHS)
def test_a_reply_names_the_origin_of_every_token_of_its_text(
    traced: Server, path: str, body: dict[str, Any]
) -> None:
    (choice,) = traced.post(path, body | {"speculation": TRACE}).json()["choices"]
    assert origins([choice["trace"]]) == TOKENS
    assert rounds([choice["trace"]]) == ROUNDS


@pytest.mark.parametrize(("path", "body"), PATHS)
@pytest.mark.parametrize("scored", [False, True])
def test_chunks_of_a_stream_have_the_trace_of_their_text(
    traced: Server, path: str, body: dict[str, Any], scored: bool
) -> None:
    fields: dict[str, Any] = {"stream": True, "speculation": TRACE}
    if scored:
        fields["logprobs"] = True if path == CHAT_PATH else 1
    *chunks, _ = events_of(traced.post(path, body | fields))
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    for choice in choices:
        text = choice.get("text", choice.get("delta", {}).get("content", ""))
        trace = choice.get("trace", {"tokens": []})
        assert "".join(token["token"] for token in trace["tokens"]) == text
        if scored and path == CHAT_PATH and choice["logprobs"]:
            known = [entry["token"] for entry in choice["logprobs"]["content"]]
            assert known == [token["token"] for token in trace["tokens"]]
    traces = [choice["trace"] for choice in choices if "trace" in choice]
    assert origins(traces) == TOKENS
    assert rounds(traces) == ROUNDS


@pytest.mark.parametrize(("path", "body"), PATHS)
@pytest.mark.parametrize("speculation", [None, {}, {"trace": False}])
def test_nothing_is_traced_unless_asked_for(
    server: Server, path: str, body: dict[str, Any], speculation: Any
) -> None:
    for stream in (False, True):
        reply = server.post(path, body | {"stream": stream, "speculation": speculation})
        assert '"trace"' not in reply.text
    assert [request.trace for request in server.engine.submitted] == [False, False]


def test_each_choice_is_traced_by_the_engine(server: Server) -> None:
    server.chat(n=2, speculation=TRACE)
    assert [request.trace for request in server.engine.submitted] == [True, True]


def test_tokens_after_a_stop_string_have_no_origin(traced: Server) -> None:
    (choice,) = traced.chat(stop="c", speculation=TRACE).json()["choices"]
    assert choice["message"]["content"] == "ab"
    assert origins([choice["trace"]]) == TOKENS[:2]
    assert rounds([choice["trace"]]) == ROUNDS[:2]


def test_the_document_describes_the_trace(server: Server) -> None:
    schemas = server.get("/openapi.json").json()["components"]["schemas"]
    assert set(schemas["Trace"]["properties"]) == {"tokens", "rounds"}
    assert schemas["TracedToken"]["properties"]["origin"]["enum"] == [
        "bonus",
        "draft",
        "grammar",
        "lookup",
    ]
