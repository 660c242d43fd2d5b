"""Query parameters of the routes that have some."""

from __future__ import annotations

from typing import TypeVar
from urllib.parse import parse_qsl

from pydantic import ValidationError
from starlette.requests import Request as HttpRequest

from server.http.context import context_of
from server.http.errors import MAX_SHOWN, invalid, shorten
from server.http.middleware.request_log import record_of
from server.http.request.body import Fields, unused_in
from server.http.request.validation import validation_error

MAX_PARAMETERS = 64
Query = TypeVar("Query", bound=Fields)


def read_query(http: HttpRequest, model: type[Query]) -> Query:
    """The query parameters as `model`; `name[]` is another way to write `name`.

    Raises:
        ApiError: 400 if one is invalid, or unknown and `server.unknown_fields` refuses these.
    """
    query = http.scope["query_string"].decode("latin-1")
    pairs = parse_qsl(query, keep_blank_values=True)
    if len(pairs) > MAX_PARAMETERS:
        raise invalid(f"The query has {len(pairs)} parameters: at most {MAX_PARAMETERS}")
    values: dict[str, str] = {}
    not_used = record_of(http.scope).not_used
    for written, value in pairs:
        name = written.removesuffix("[]")
        if name in model.model_fields:
            values[name] = value
        elif context_of(http).config.server.unknown_fields == "refuse":
            names = ", ".join(model.model_fields)
            known = f"known are {names}" if names else "this path has none"
            message = f"Unknown query parameter {shorten(written)}: {known}"
            raise invalid(message, code="unknown_query_parameter")
        else:
            not_used.append(f"query parameter {written[:MAX_SHOWN]}")
    try:
        found = model.model_validate_strings(values)
    except ValidationError as error:
        raise validation_error(error, values) from error
    not_used += [f"query parameter {name}" for name in unused_in(found, "")]
    return found
