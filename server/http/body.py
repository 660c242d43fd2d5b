"""Parses and checks request bodies, off the event loop."""

from __future__ import annotations

from typing import Any, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from server.http.body_limit import hold_of
from server.http.context import context_of
from server.http.encodings import decoded, decoder
from server.http.errors import invalid, unknown_field, validation_error

MAX_MEMBERS = 1024  # of one JSON object
MAX_DEPTH = 64  # of arrays and objects in each other; templates write much for deep ones
SMALL = 256  # bytes of an encoded body that decode to no more than some hundred kilobytes
JSON_TYPE = "application/json"


class Fields(BaseModel):
    """A JSON object of a request: no unknown fields, no conversions between types."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


Body = TypeVar("Body", bound=Fields)


async def read_body(request: HttpRequest, model: type[Body]) -> Body:
    """The body of a request as `model`.

    Raises:
        ApiError: 400 if it is invalid, 413 if it is too large, 415 for an unknown encoding.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON_TYPE:
        # Browsers let web pages send some other types across origins without a preflight.
        raise invalid(f"The content-type must be {JSON_TYPE}", code="unsupported_content_type")
    encoding = request.headers.get("content-encoding", "")
    decode = decoder(encoding)
    try:
        raw = await request.body()
    except ClientDisconnect as error:
        raise invalid("The client left before the whole body had arrived") from error
    context, hold = context_of(request), hold_of(request.scope)
    if decode is not None:
        limit = context.config.server.max_body_bytes
        size = limit if len(raw) > SMALL else 0  # a few bytes decode to very many
        raw = await context.in_pool(size, decoded, decode, raw, limit, encoding)
        hold.take(len(raw))
    return await context.in_pool(len(raw), parse_body, raw, model)


def body_size(request: HttpRequest) -> int:
    """Bytes of a body that was read, encoded and decoded."""
    return hold_of(request.scope).num_bytes


def parse_body(raw: bytes, model: type[Body]) -> Body:
    """JSON to `model`. NaN, infinities, lone surrogates and invalid UTF-8 are refused."""
    try:
        data = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"The body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(data, dict):
        raise invalid("The body must be a JSON object", code="invalid_json")
    for name in data:
        if name not in model.model_fields:  # report only the first: there may be very many
            raise unknown_field(name)
    for name, value in data.items():
        _check_shape(value, name)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise validation_error(error, data) from error


def _check_shape(value: Any, name: str, depth: int = 1) -> None:
    """Refuse objects with so many members that reporting an error for each takes seconds, and
    values that are nested too deeply."""
    if isinstance(value, dict | list) and depth > MAX_DEPTH:
        raise invalid(f"{name} is nested too deeply: at most {MAX_DEPTH} levels", name)
    if isinstance(value, dict):
        if len(value) > MAX_MEMBERS:
            raise invalid(
                f"{name} is an object of {len(value)}: at most {MAX_MEMBERS} members", name
            )
        for member in value.values():
            _check_shape(member, name, depth + 1)
    elif isinstance(value, list):
        for member in value:
            if isinstance(member, dict | list):
                _check_shape(member, name, depth + 1)
