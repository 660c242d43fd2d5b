"""The OpenAPI document, and random requests made from it."""

from __future__ import annotations

from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS

from server.text.tokens.tokenizer import Tokenizer
from tests.support.servers.http_server import MODEL, Server

OPERATIONS = [
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/v1/responses", "POST"),
    ("/v1/responses/input_tokens", "POST"),
    ("/v1/responses/{response_id}", "GET"),
    ("/v1/responses/{response_id}/input_items", "GET"),
    ("/v1/messages", "POST"),
    ("/v1/embeddings", "POST"),
    ("/tokenize", "POST"),
    ("/detokenize", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{model_id}", "GET"),
    ("/tokenizer_info", "GET"),
    ("/info", "GET"),
    ("/admin/draft", "POST"),
]
NAMES = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
]
EXAMPLES = settings(
    max_examples=25,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize(
    ("path", "method", "mode"),
    [(*operation, GenerationMode.POSITIVE) for operation in OPERATIONS]
    + [(*operation, GenerationMode.NEGATIVE) for operation in OPERATIONS if "POST" in operation],
)
# Hypothesis warns if the state of `random` changes while a case is made: a thread of a library may
# do that at any time, and no strategy here is ours.
@pytest.mark.filterwarnings(
    "ignore:Do not use the .random. module inside strategies"
    ":hypothesis.errors.HypothesisDeprecationWarning"
)
def test_made_up_requests_get_documented_answers(
    tokenizer: Tokenizer, path: str, method: str, mode: GenerationMode
) -> None:
    server = Server(tokenizer, admin_keys=("root",), allowed_hosts=("*",))
    schema = schemathesis.openapi.from_asgi("/openapi.json", server.app)
    operation = schema[path][method]
    checks = CHECKS.get_by_names(NAMES)

    @EXAMPLES
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Case) -> None:
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = MODEL  # other values would only give 404
        case.headers["authorization"] = "Bearer root"
        case.call_and_validate(checks=checks)

    send()
    assert server.context.admission.num_waiting == 0
    assert server.context.state.num_open == 0


def test_document_describes_every_route(server: Server) -> None:
    document = server.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/responses",
        "/v1/responses/input_tokens",
        "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/cancel",
        "/v1/responses/{response_id}/input_items",
        "/v1/models",
        "/v1/models/{model_id}",
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
        "/health",
        "/ready",
        "/metrics",
        "/info",
        "/version",
        "/admin/draft",
        "/admin/learning",
    }


def test_every_reference_resolves(server: Server) -> None:
    document = server.get("/openapi.json").json()
    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert references(document) <= known


def test_keys_that_are_no_token_ids_do_not_fit_the_schema(server: Server) -> None:
    schemas = server.get("/openapi.json").json()["components"]["schemas"]
    for name in ("ChatRequest", "CompletionRequest"):
        bias, _ = schemas[name]["properties"]["logit_bias"]["anyOf"]
        assert jsonschema_rs.is_valid(bias, {"50": -100})
        for wrong in ({"a": 1}, {"50": 101}, {"50": [1]}, {"-1": 1}):
            assert not jsonschema_rs.is_valid(bias, wrong)


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ""},
        {"stop": ["", "a"]},
        {"prompt_logprobs": False},
        {"logprobs": False},
        {"logprobs": 20},
        {"suffix": ""},
    ],
)
def test_what_is_accepted_fits_the_schema(server: Server, fields: dict[str, Any]) -> None:
    body = {"model": MODEL, "prompt": "hi"} | fields
    assert server.post("/v1/completions", body).status_code == 200
    assert fits(server, body)


@pytest.mark.parametrize(
    "fields", [{"stop": [""] * 33}, {"logprobs": True}, {"logprobs": 21}, {"use_beam_search": 0}]
)
def test_what_is_refused_does_not_fit_the_schema(server: Server, fields: dict[str, Any]) -> None:
    body = {"model": MODEL, "prompt": "hi"} | fields
    assert server.post("/v1/completions", body).status_code == 400
    assert not fits(server, body)


def fits(server: Server, body: Any) -> bool:
    """Whether a completion's body fits the published schema."""
    document = server.get("/openapi.json").json()
    schema = {"$ref": "#/components/schemas/CompletionRequest", **document}
    return jsonschema_rs.is_valid(schema, body)


def references(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*(references(member) for member in node.values()))
    if isinstance(node, list):
        return set().union(*(references(member) for member in node))
    return set()
