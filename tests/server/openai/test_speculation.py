"""Speculation as clients and operators see it: an option, counts, metrics; never the text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from engine.messages import EngineStats, Finished
from engine.request import Request
from server.openai.request.schema import ChatRequest, CompletionRequest
from tests.server.openai.test_refusals import refused
from tests.support.engines.scripted_engine import Event, drafting, say
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
SDK: dict[str, tuple[Any, Any]] = {
    CHAT_PATH: (ChatCompletion, ChatCompletionChunk),
    COMPLETION_PATH: (Completion, Completion),
}
USAGE = {"include_usage": True}
STATS = {"stats": True}
DRAFTS = ((3, 12, 5), (1, 4, 1))  # for each of two choices: trees, tokens drafted, tokens accepted
TOTALS = {"drafted": 16, "accepted": 6, "acceptance_length": 2.5}
METRICS = {
    "speculative_decoding": {
        "mean_acceptance_length": 2.5,
        "draft_acceptance_rate": 0.375,
        "acceptance_histogram": [1, 2, 0, 1],
        "num_spec_steps": 4,
        "num_accepted_draft_tokens": 6,
        "num_draft_tokens": 16,
        "num_spec_tokens": 7,
    }
}
COUNTS = ({"accepted_counts": (1, 1, 0, 1), "most_drafted": 7},
          {"accepted_counts": (0, 1), "most_drafted": 4})  # fmt: skip
DETAILS = {
    "reasoning_tokens": 0,
    "accepted_prediction_tokens": 6,
    "rejected_prediction_tokens": 10,
}


@pytest.mark.parametrize(("path", "body"), PATHS)
@pytest.mark.parametrize(
    ("speculation", "max_draft_nodes"),
    [
        (None, None),
        ({}, None),
        ({"enabled": True}, None),
        ({"max_nodes": None}, None),
        ({"max_nodes": 0}, 0),
        ({"max_nodes": 63}, 63),
        ({"enabled": True, "max_nodes": 7, "stats": True}, 7),
        ({"enabled": False}, 0),
        ({"enabled": False, "max_nodes": 7}, 0),
    ],
)
def test_the_option_limits_the_drafts_of_every_choice(
    server: Server, path: str, body: dict[str, Any], speculation: Any, max_draft_nodes: int | None
) -> None:
    assert server.post(path, body | {"n": 2, "speculation": speculation}).status_code == 200
    assert server.post(path, body).status_code == 200
    limits = [request.max_draft_nodes for request in server.engine.submitted]
    assert limits == [max_draft_nodes, max_draft_nodes, None]


@pytest.mark.parametrize(("path", "body"), PATHS)
def test_a_request_may_want_drafts_that_do_not_pay(
    server: Server, path: str, body: dict[str, Any]
) -> None:
    for options, most in (({"max_nodes": 2}, 2), ({"enabled": False}, 0)):
        error = refused(server, path, body | {"speculation": {"min_nodes": 3} | options})
        assert error["param"] == "speculation.min_nodes"
        assert f"speculation.min_nodes is 3, more than {most}" in error["message"]
    response = server.post(path, body | {"n": 2, "speculation": {"min_nodes": 3, "max_nodes": 3}})
    assert [request.min_draft_nodes for request in server.engine.submitted] == [3, 3]
    # This server has no head that could draft them.
    assert "speculation.min_nodes" in response.headers["x-aerie-warning"]


@pytest.mark.parametrize(("path", "body"), PATHS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("enabled", None),
        ("enabled", 1),
        ("enabled", "false"),
        ("max_nodes", -1),
        ("max_nodes", 64),
        ("max_nodes", 10**40),
        ("max_nodes", True),
        ("max_nodes", 3.5),
        ("max_nodes", "3"),
        ("max_nodes", [3]),
        ("min_nodes", None),
        ("min_nodes", -1),
        ("min_nodes", 64),
        ("stats", None),
        ("stats", 0),
        ("stats", "yes"),
        ("depth", 3),
        ("max_node", 3),
    ],
)
def test_bad_options_are_400_naming_the_field(
    server: Server, path: str, body: dict[str, Any], field: str, value: Any
) -> None:
    error = refused(server, path, body | {"speculation": {field: value}})
    assert error["param"] == f"speculation.{field}"
    assert f"speculation.{field}" in error["message"]


@pytest.mark.parametrize(("path", "body"), PATHS)
def test_unknown_options_are_unknown_fields(
    server: Server, path: str, body: dict[str, Any]
) -> None:
    error = refused(server, path, body | {"speculation": {"enabled": True, "trees": 1}})
    assert (error["param"], error["code"]) == ("speculation.trees", "unknown_field")


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
def test_the_document_says_that_the_text_stays_the_same(server: Server, model: type) -> None:
    schemas = server.get("/openapi.json").json()["components"]["schemas"]
    field = schemas[model.__name__]["properties"]["speculation"]
    options = schemas["SpeculationOptions"]
    for described in (field, options):
        assert "speed only, never the text" in described["description"]
    assert options["additionalProperties"] is False
    assert {name: entry["default"] for name, entry in options["properties"].items()} == {
        "enabled": True,
        "max_nodes": None,
        "min_nodes": 0,
        "stats": False,
        "trace": False,
    }


@pytest.fixture
def drafting_server(make_server: MakeServer, server: Server) -> Server:
    """A server that answers as `server` does, with DRAFTS."""
    return make_server(drafting(server.engine.script, *DRAFTS, details=COUNTS))


@pytest.mark.parametrize(("path", "body"), PATHS)
def test_usage_adds_up_the_drafts_of_all_choices(
    drafting_server: Server, server: Server, path: str, body: dict[str, Any]
) -> None:
    reply = drafting_server.post(path, body | {"n": 2}).json()
    plain = server.post(path, body | {"n": 2}).json()
    assert reply["usage"] == plain["usage"] | {"completion_tokens_details": DETAILS}
    assert reply["choices"] == plain["choices"]
    assert "speculation" not in reply


@pytest.mark.parametrize(("path", "body"), PATHS)
def test_statistics_come_with_the_reply_when_asked_for(
    drafting_server: Server, path: str, body: dict[str, Any]
) -> None:
    reply = drafting_server.post(path, body | {"n": 2, "speculation": STATS}).json()
    assert reply["speculation"] == TOTALS
    assert reply["metrics"] == METRICS
    parsed = SDK[path][0].model_validate(reply, strict=True)
    details = parsed.usage.completion_tokens_details
    assert details.accepted_prediction_tokens == 6
    assert details.rejected_prediction_tokens == 10


@pytest.mark.parametrize(("path", "body"), PATHS)
@pytest.mark.parametrize("with_usage", [False, True])
@pytest.mark.parametrize("with_stats", [False, True])
def test_streams_end_with_the_totals_that_were_asked_for(
    drafting_server: Server,
    path: str,
    body: dict[str, Any],
    with_usage: bool,
    with_stats: bool,
) -> None:
    options = {"stream_options": USAGE} if with_usage else {}
    fields = {"n": 2, "stream": True, "speculation": {"stats": with_stats}} | options
    *chunks, done = events_of(drafting_server.post(path, body | fields))
    assert done == "[DONE]"
    for chunk in chunks:
        # The SDK gives text chunks the type of whole replies, where every choice has ended.
        choices = chunk["choices"] if path == CHAT_PATH else []
        SDK[path][1].model_validate(chunk | {"choices": choices}, strict=True)
    last = chunks.pop() if with_usage or with_stats else {"choices": []}
    assert last["choices"] == []
    assert all(chunk["choices"] and "speculation" not in chunk for chunk in chunks)
    assert last.get("speculation") == (TOTALS if with_stats else None)
    assert last.get("metrics") == (METRICS if with_stats else None)
    usage = last.get("usage")
    assert (usage and usage["completion_tokens_details"]) == (DETAILS if with_usage else None)
    assert all(("usage" in chunk) == with_usage for chunk in chunks)


@pytest.mark.parametrize(("path", "body"), PATHS)
def test_without_a_draft_there_is_no_acceptance_length(
    server: Server, path: str, body: dict[str, Any]
) -> None:
    reply = server.post(path, body | {"speculation": STATS}).json()
    assert reply["speculation"] == {"drafted": 0, "accepted": 0, "acceptance_length": None}
    assert "metrics" not in reply


def test_counts_of_a_choice_that_a_stop_string_ended_are_those_of_the_engine(
    make_server: MakeServer, server: Server
) -> None:
    scripted = make_server(drafting(say([*server.ids("a stop"), 2], step=100), (1, 9, 6)))
    reply = scripted.chat(stop="st", speculation=STATS).json()
    assert reply["choices"][0]["message"]["content"] == "a "
    assert reply["speculation"] == {"drafted": 9, "accepted": 6, "acceptance_length": 7.0}


@pytest.mark.parametrize(("path", "body"), PATHS)
@pytest.mark.parametrize(
    ("num_drafted", "num_accepted", "expected"),
    [(9, 6, 4), (9, 2, 0), (40, 40, 4), (3, 0, 0)],
)
def test_usage_counts_no_accepted_token_after_a_stop_string(
    make_server: MakeServer,
    server: Server,
    path: str,
    body: dict[str, Any],
    num_drafted: int,
    num_accepted: int,
    expected: int,
) -> None:
    ids = [*server.ids("a stop"), 2]
    said = drafting(say(ids, step=100), (1, num_drafted, num_accepted))
    usage = make_server(said).post(path, body | {"stop": "st"}).json()["usage"]
    assert usage["completion_tokens"] == 4
    assert len(ids) == 7
    assert usage["completion_tokens_details"] == {
        "reasoning_tokens": 0,
        "accepted_prediction_tokens": expected,
        "rejected_prediction_tokens": num_drafted - expected,
    }


QUIET = EngineStats(
    num_running=0,
    num_waiting=0,
    kv_usage=0.0,
    prefix_queries=0,
    prefix_hits=0,
    num_preemptions=0,
    num_steps=0,
    last_step_tokens=0,
)
PREFIX = "aerie:spec_decode_"
ACCEPTANCE = PREFIX + "acceptance_length"


def drafted(trees: int, nodes: int, per_position: tuple[int, ...], **steps: int) -> EngineStats:
    return msgspec.structs.replace(
        QUIET,
        num_drafts=trees,
        num_draft_tokens=nodes,
        num_accepted_tokens=sum(per_position),
        accepted_per_position=per_position,
        steps_by_tree=steps,
    )


def spec_metrics(server: Server) -> dict[str, float]:
    """Samples about speculation, by name and the label besides `model_name`, without prefixes."""
    found = {}
    for line in server.get("/metrics").text.splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith((PREFIX, "aerie:steps_total")):
            short = name.replace('model_name="tiny",', "").replace('{model_name="tiny"}', "")
            found[short.removeprefix(PREFIX).removeprefix("aerie:")] = float(value)
    return found


def per_pos(position: int) -> str:
    return f'num_accepted_tokens_per_pos_total{{position="{position}"}}'


def steps(tree: str) -> str:
    return f'steps_total{{tree="{tree}"}}'


def totals(trees: int, nodes: int, accepted: int, length: float) -> dict[str, float]:
    return {
        "num_drafts_total": trees,
        "num_draft_tokens_total": nodes,
        "num_accepted_tokens_total": accepted,
        "acceptance_length": length,
    }


def test_speculation_is_zero_and_one_token_per_step_at_first(server: Server) -> None:
    assert spec_metrics(server) == totals(0, 0, 0, 1.0)
    server.engine.stats = QUIET
    assert spec_metrics(server) == totals(0, 0, 0, 1.0)


def test_speculation_is_exported_under_the_names_of_vllm(server: Server) -> None:
    server.engine.stats = drafted(10, 70, (8, 5, 2), root=4, chain7=12)
    assert spec_metrics(server) == totals(10, 70, 15, 2.5) | {
        per_pos(0): 8,
        per_pos(1): 5,
        per_pos(2): 2,
        steps("root"): 4,
        steps("chain7"): 12,
    }
    kinds = {line for line in server.get("/metrics").text.splitlines() if line.startswith("# TYPE")}
    assert f"# TYPE {PREFIX}num_accepted_tokens_per_pos_total counter" in kinds
    assert f"# TYPE {ACCEPTANCE} gauge" in kinds
    assert "# TYPE aerie:steps_total counter" in kinds


def test_speculation_counts_go_on_when_the_engine_starts_again(server: Server) -> None:
    server.engine.stats = drafted(10, 70, (8, 5, 2), root=4, chain7=12)
    before = spec_metrics(server)
    server.engine.stats = None
    assert spec_metrics(server) == before
    for _ in range(2):  # the same counts are not added twice
        server.engine.stats = drafted(2, 6, (2, 1), root=5, chain3=1)
        assert spec_metrics(server) == totals(12, 76, 18, 2.5) | {
            per_pos(0): 10,
            per_pos(1): 6,
            per_pos(2): 2,
            steps("root"): 5,
            steps("chain7"): 12,
            steps("chain3"): 1,
        }
    server.engine.stats = drafted(9, 60, (9, 8, 1), root=5, chain7=3)
    assert spec_metrics(server)[steps("chain7")] == 15
    assert spec_metrics(server)[per_pos(2)] == 3


def test_the_time_of_steps_is_exported_by_part(server: Server) -> None:
    seconds = {"draft": 0.25, "verify": 2.5, "commit": 0.125}
    server.engine.stats = msgspec.structs.replace(QUIET, seconds_by_part=seconds)
    text = server.get("/metrics").text
    for part, spent in seconds.items():
        assert f'aerie:step_seconds_total{{model_name="tiny",part="{part}"}} {spent}' in text


def test_faults_of_the_head_are_exported(server: Server) -> None:
    def seen() -> tuple[bool, bool]:
        lines = server.get("/metrics").text.splitlines()
        faults = 'aerie:draft_head_faults_total{model_name="tiny"}'
        failed = 'aerie:draft_head_failed{model_name="tiny"}'
        return f"{faults} 3.0" in lines, f"{failed} 1.0" in lines

    assert seen() == (False, False)
    server.engine.stats = msgspec.structs.replace(QUIET, num_draft_faults=3)
    assert seen() == (True, False)
    server.engine.stats = msgspec.structs.replace(QUIET, num_draft_faults=3, draft_failed=True)
    assert seen() == (True, True)
    server.engine.stats = QUIET  # a new engine
    assert seen() == (True, False)


@pytest.mark.parametrize(
    "content", ["a hello", [{"type": "text", "text": "a "}, {"type": "text", "text": "hello"}]]
)
def test_a_prediction_reaches_the_engine_as_tokens(server: Server, content: Any) -> None:
    prediction = {"type": "content", "content": content}
    response = server.chat(prediction=prediction, n=2)
    assert response.status_code == 200
    assert "x-aerie-warning" not in response.headers
    expected = server.ids("a hello")
    assert [request.prediction for request in server.engine.submitted] == [expected] * 2
    long = {"type": "content", "content": "a" * 10**6}
    assert server.chat(prediction=long).status_code == 200
    assert len(server.engine.submitted[-1].prediction) == server.engine.info.max_model_len  # type: ignore[union-attr]


def test_a_server_that_looks_nothing_up_says_so(make_server: MakeServer) -> None:
    server = make_server(speculation={"lookup": False})
    response = server.chat(prediction={"type": "content", "content": "a"})
    assert response.headers["x-aerie-warning"] == "not used: prediction"


def test_with_a_prediction_usage_counts_its_tokens(make_server: MakeServer, server: Server) -> None:
    def script(request: Request) -> list[Event]:
        return [
            msgspec.structs.replace(event, num_predicted=8, num_predicted_accepted=3)
            if isinstance(event, Finished)
            else event
            for event in drafting(server.engine.script, (3, 12, 5))(request)
        ]

    prediction = {"type": "content", "content": "a"}
    reply = make_server(script).chat(prediction=prediction).json()
    details = reply["usage"]["completion_tokens_details"]
    counts = details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]
    assert counts == (3, 5)


@pytest.mark.parametrize(
    ("prediction", "param"),
    [
        ("a", "prediction"),
        ({"type": "text", "content": "a"}, "prediction.type"),
        ({"type": "content"}, "prediction.content"),
        ({"type": "content", "content": [{"type": "image", "text": "a"}]}, "prediction.content"),
    ],
)
def test_bad_predictions_are_refused(server: Server, prediction: Any, param: str) -> None:
    error = refused(server, CHAT_PATH, CHAT | {"prediction": prediction})
    assert error["param"].startswith(param)
