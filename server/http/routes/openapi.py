"""The OpenAPI document, from pydantic models of requests and msgspec structs of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from server.http.errors import OPENAI, ErrorBody, ErrorManner
from server.http.middleware.keys import OPEN_PATHS
from server.http.request.body import Fields

KEY = "key"  # name of the security scheme
REF = "#/components/schemas/{}"
ERRORS = {
    400: "The request is invalid",
    401: "The key is missing or wrong",
    403: "The key may not ask for this priority",
    404: "No such model, or no such response",
    413: "The body is too large",
    415: "The content-encoding is not known",
    421: "The Host header is not one of this server",
    429: "Too many requests are waiting; see Retry-After",
    500: "The server failed",
    503: "The server accepts no requests now; see Retry-After",
}


@dataclass(frozen=True, slots=True)
class Routes:
    """Routes for an application, and the types that their documentation refers to."""

    router: APIRouter
    requests: tuple[type[Fields], ...] = ()
    answers: tuple[type[msgspec.Struct], ...] = ()
    manner: ErrorManner = OPENAI
    own_queries: tuple[str, ...] = ()  # beginnings of paths whose routes read query parameters
    open_paths: frozenset[str] = (
        frozenset()
    )  # need no key; parameters in a query are ignored with a warning


def operation(
    request: type[Fields] | None,
    response: type[msgspec.Struct],
    streams: bool = False,
    query: type[Fields] | None = None,
    error: type[msgspec.Struct] = ErrorBody,
) -> dict[str, Any]:
    """Arguments of a route decorator that document its body, its query parameters, its answer and
    its errors."""
    content = {"application/json": _schema(response)}
    if streams:
        # Without a type: some read a schema as that of the stream, others as that of each event.
        content["text/event-stream"] = {"schema": {"description": "Server-sent events"}}
    answers: dict[int, dict[str, Any]] = {200: {"description": "Success", "content": content}}
    for status, description in ERRORS.items():
        body = {"application/json": _schema(error)}
        answers[status] = {"description": description, "content": body}
    extra: dict[str, Any] = {}
    if query is not None:
        extra["parameters"] = _parameters(query)
    if request is not None:
        body = {"application/json": _schema(request)}
        extra["requestBody"] = {"required": True, "content": body}
    return {"responses": answers, "openapi_extra": extra, "response_model": None}


def openapi(
    app: FastAPI, version: str, routes: Sequence[Routes], needs_key: bool, root_path: str
) -> dict[str, Any]:
    """The document of the whole application; `routes` are all its routes. `needs_key`: requests
    need an API key. `root_path`: where a proxy serves the application."""
    servers = [{"url": root_path}] if root_path else None
    document = get_openapi(title="Aerie", version=version, routes=app.routes, servers=servers)
    template = REF.replace("{}", "{model}")
    _, requests = models_json_schema(
        [(model, "validation") for each in routes for model in each.requests],
        ref_template=template,
    )
    answers = [struct for each in routes for struct in each.answers]
    _, structs = msgspec.json.schema_components(
        [*answers, ErrorBody], ref_template=REF.replace("{}", "{name}")
    )
    document["components"] = {"schemas": requests["$defs"] | structs}
    if needs_key:
        document["components"]["securitySchemes"] = {KEY: {"type": "http", "scheme": "bearer"}}
    for path, methods in document["paths"].items():
        for described in methods.values():
            if needs_key:
                described["security"] = [] if path in OPEN_PATHS else [{KEY: []}]
            described["responses"].pop(
                "422", None
            )  # FastAPI's own error format, which is never sent
    return document


def _parameters(query: type[Fields]) -> list[dict[str, Any]]:
    described = query.model_json_schema()["properties"]
    return [{"name": name, "in": "query", "schema": described[name]} for name in described]


def _schema(model: type[Any]) -> dict[str, Any]:
    return {"schema": {"$ref": REF.format(model.__name__)}}
