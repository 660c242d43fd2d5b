"""Parses and checks request bodies, off the event loop."""

from __future__ import annotations

import codecs
import functools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeAlias, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from configs.schema import UnknownFields
from server.http.context import context_of
from server.http.errors import ApiError, bad_value, invalid, shorten, unknown_field
from server.http.middleware.body_limit import hold_of
from server.http.middleware.request_log import record_of
from server.http.request.encodings import decoded, decoder
from server.http.request.validation import path_in, validation_error, written

MAX_MEMBERS = 1024  # of one JSON object
MAX_DEPTH = 64  # of arrays and objects in each other; templates write much for deep ones
MAX_REPAIRS = 20  # rounds of validation
SMALL = 256  # bytes of an encoded body that decode to no more than some hundred kilobytes
JSON_TYPE = "application/json"


class Fields(BaseModel):
    """A JSON object of a request: no unknown fields, no conversions between JSON's types."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    def not_used(self) -> Iterator[str]:
        """Parts of this object, besides its `NotUsed` fields, that had no effect."""
        yield from ()


@dataclass(frozen=True, slots=True)
class _NotUsed:
    """Marks a field that is accepted without effect."""


Value = TypeVar("Value")
NotUsed: TypeAlias = Annotated[Value | None, _NotUsed()]
# Values that ask for nothing, so that there is nothing to warn of.
ASK_NOTHING: Sequence[Any] = (None, False, "", [], {}, "auto", "default", "none")

Body = TypeVar("Body", bound=Fields)


@dataclass(frozen=True, slots=True)
class Parsed(Generic[Body]):
    """A checked body, and the names of what was sent but has no effect."""

    body: Body
    not_used: list[str]


async def read_body(request: HttpRequest, model: type[Body]) -> Body:
    """The body of a request as `model`. What has no effect is noted in the request's record, for
    the log and the warning header.

    Raises:
        ApiError: 400 if it is invalid, 413 if it is too large, 415 for an unknown encoding.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON_TYPE:
        # Browsers let web pages send some other types across origins without a preflight.
        given = shorten(kind) if kind else "missing"
        message = f"The content-type is {given}: it must be {JSON_TYPE}"
        raise invalid(message, code="unsupported_content_type")
    encoding = request.headers.get("content-encoding", "")
    decode = decoder(encoding)
    try:
        raw = await request.body()
    except ClientDisconnect as error:
        raise invalid("The client left before the whole body had arrived") from error
    context, hold = context_of(request), hold_of(request.scope)
    settings = context.config.server
    if decode is not None:
        limit = settings.max_body_bytes
        size = limit if len(raw) > SMALL else 0  # a few bytes decode to very many
        raw = await context.in_pool(size, decoded, decode, raw, limit, encoding)
        hold.take(len(raw))
    parsed = await context.in_pool(len(raw), parse_body, raw, model, settings.unknown_fields)
    record_of(request.scope).not_used += parsed.not_used
    return parsed.body


def body_size(request: HttpRequest) -> int:
    """Bytes of a body that was read, encoded and decoded."""
    return hold_of(request.scope).num_bytes


def parse_body(raw: bytes, model: type[Body], unknown: UnknownFields = "refuse") -> Parsed[Body]:
    """JSON to `model`. NaN, infinities, lone surrogates, invalid UTF-8 and repeated keys are
    refused, and so are unknown fields, unless they are null or `unknown` is "warn". A number such
    as 5.0 may stand for an integer."""
    data = _json_object(raw.removeprefix(codecs.BOM_UTF8))  # files of Windows begin with it
    not_used = _drop([[name] for name in data if name not in model.model_fields], data, unknown)
    for name in data:
        if name not in model.model_fields:  # report only the first: there may be very many
            raise unknown_field(name)
    for name, value in data.items():
        check_shape(value, name)
    for repairs_left in reversed(range(MAX_REPAIRS)):
        try:
            body = model.model_validate(data)
            return Parsed(body, [*not_used, *unused_in(body, "")])
        except ValidationError as error:
            dropped = _repair(error, data, unknown) if repairs_left else None
            if dropped is None:
                raise validation_error(error, data) from error
            not_used += dropped
    raise AssertionError("the last round returns or raises")


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        data = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        reason = f"The body is not valid JSON: {error}"
        if "recursion limit" in str(error):  # above MAX_DEPTH
            reason = f"The body is nested too deeply: at most {MAX_DEPTH} levels"
        raise invalid(reason, code="invalid_json") from error
    if not isinstance(data, dict):
        raise invalid("The body must be a JSON object", code="invalid_json")
    json.loads(raw, object_pairs_hook=_refuse_repeated)  # the parser above keeps the last value
    return data


def object_in(text: str, name: str) -> dict[str, Any]:
    """The JSON object that a string of a body, the field `name`, holds. It is checked as the body
    is.

    Raises:
        ApiError: 400; it is no JSON object, or one that a body must not have.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unrepeated, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise too_deep(name) from error
    except ValueError as error:
        raise bad_value(name, text, f"it must be the JSON of an object: {error}") from error
    if not isinstance(value, dict):
        raise bad_value(name, text, "it must be the JSON of an object")
    check_shape(value, name)
    return value


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _unrepeated(members: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_repeated(members)
    return dict(members)


def _refuse_repeated(members: list[tuple[str, Any]]) -> None:
    if len(members) < 2:
        return
    seen: set[str] = set()
    for name, _ in members:
        if name in seen:
            shown = written([name])
            raise invalid(
                f"The key {shorten(name)} occurs twice in one object", shown, "repeated_key"
            )
        seen.add(name)


def _repair(
    error: ValidationError, data: dict[str, Any], unknown: UnknownFields
) -> list[str] | None:
    """Change what may be changed, and return the names of what was dropped; None if there is
    nothing to change."""
    entries = error.errors(include_url=False)
    extra = [path_in(data, entry) for entry in entries if entry["type"] == "extra_forbidden"]
    dropped = _drop(extra, data, unknown)
    return dropped if _write_integers(entries, data) or dropped else None


def _drop(
    paths: Sequence[list[int | str]], data: dict[str, Any], unknown: UnknownFields
) -> list[str]:
    """Remove unknown members that may be ignored; return their names."""
    dropped = []
    for path in paths:
        for where in _alike(path, data):
            holder, name = _at(data, where[:-1]), where[-1]
            if not isinstance(holder, dict) or name not in holder:
                continue
            if unknown == "warn" or holder[name] is None:
                del holder[name]
                dropped.append(written(where))
    return dropped


def _alike(path: list[int | str], data: dict[str, Any]) -> Iterator[list[int | str]]:
    """The path of a member of an object; in an array, also those of the same member of the other
    entries, so that one round repairs them all."""
    if len(path) > 1 and isinstance(path[-2], int):
        for index in range(len(_at(data, path[:-2]))):
            yield [*path[:-2], index, path[-1]]
    elif path:
        yield path


def _write_integers(entries: Sequence[ErrorDetails], data: dict[str, Any]) -> bool:
    """Write 5.0 as 5 where an integer is needed: JSON has one kind of number, and some clients
    write all numbers so. Whether there was any."""
    found = False
    for entry in entries:
        value = entry["input"]
        if entry["type"] == "int_type" and isinstance(value, float) and value.is_integer():
            holder: Any = data
            path = path_in(data, entry)
            while len(path) > 1 and isinstance(holder[path[0]], dict):
                holder = holder[path.pop(0)]
            holder[path[0]] = _whole(holder[path[0]])
            found = True
    return found


def _whole(value: Any) -> Any:
    if isinstance(value, list):
        return [_whole(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _at(data: Any, path: Sequence[int | str]) -> Any:
    for step in path:
        data = data[step]
    return data


@functools.cache
def _fields_without_effect(model: type[Fields]) -> frozenset[str]:
    return frozenset(
        name
        for name, field in model.model_fields.items()
        if any(isinstance(mark, _NotUsed) for mark in field.metadata)
    )


def unused_in(body: Fields, prefix: str) -> Iterator[str]:
    """Names of fields that were sent but have no effect, also in nested objects."""
    without_effect = _fields_without_effect(type(body))
    for name, value in body:
        if name in without_effect:
            if value not in ASK_NOTHING:
                yield prefix + name
        elif isinstance(value, Fields):
            yield from unused_in(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Fields):
            for index, member in enumerate(value):
                yield from unused_in(member, f"{prefix}{name}[{index}].")
    yield from (prefix + name for name in body.not_used())


def check_shape(value: Any, name: str, depth: int = 1) -> None:
    """Refuse objects with so many members that reporting an error for each takes seconds, values
    that are nested too deeply, and numbers such as 1e999, which JSON may write."""
    if isinstance(value, dict | list) and depth > MAX_DEPTH:
        raise too_deep(name)
    if isinstance(value, float) and math.isinf(value):
        raise bad_value(name, value, "it must be a finite number")
    if isinstance(value, dict):
        if len(value) > MAX_MEMBERS:
            raise invalid(
                f"{name} is an object of {len(value)}: at most {MAX_MEMBERS} members", name
            )
        for member in value.values():
            check_shape(member, name, depth + 1)
    elif isinstance(value, list):
        for member in value:
            if isinstance(member, dict | list | float):
                check_shape(member, name, depth + 1)


def too_deep(name: str) -> ApiError:
    """400 for arrays and objects in each other."""
    return invalid(f"{name} is nested too deeply: at most {MAX_DEPTH} levels", name)
