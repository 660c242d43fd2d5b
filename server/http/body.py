"""Parses and checks request bodies, off the event loop."""

from __future__ import annotations

from typing import Any, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from server.http.context import context_of
from server.http.errors import invalid, unknown_field, validation_error

MAX_MEMBERS = 1024  # of one JSON object
JSON_TYPE = "application/json"


class Fields(BaseModel):
    """A JSON object of a request: no unknown fields, no conversions between types."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


Body = TypeVar("Body", bound=Fields)


async def read_body(request: HttpRequest, model: type[Body]) -> Body:
    """The body of a request as `model`. ApiError 400 if it is invalid."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON_TYPE:
        # Browsers let web pages send some other types across origins without a preflight.
        raise invalid(f"The content-type must be {JSON_TYPE}", code="unsupported_content_type")
    try:
        raw = await request.body()
    except ClientDisconnect as error:
        raise invalid("The client left before the whole body had arrived") from error
    return await context_of(request).in_pool(parse_body, raw, model)


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
        _check_width(value, name)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise validation_error(error, data) from error


def _check_width(value: Any, name: str) -> None:
    """Refuse objects with so many members that reporting an error for each takes seconds."""
    if isinstance(value, dict):
        if len(value) > MAX_MEMBERS:
            raise invalid(
                f"{name} is an object of {len(value)}: at most {MAX_MEMBERS} members", name
            )
        for key, member in value.items():
            _check_width(member, key)
    elif isinstance(value, list) and value and isinstance(value[0], dict | list):
        for member in value:
            _check_width(member, name)
