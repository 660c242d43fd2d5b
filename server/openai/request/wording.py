"""Errors about a chat request, in the names of the request that it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from server.http.errors import ApiError

Names = Sequence[tuple[str, str]]  # of a chat request -> of the client's request; the first counts
END_OF_NAME = (".", "[")
NUMBERED = "messages"  # whose numbers may mean another message of the client
FLAT = (".function.", ".")  # tools of other APIs have no object around a function


@contextmanager
def worded(names: Names) -> Iterator[None]:
    """Errors inside this block name the client's fields."""
    try:
        yield
    except ApiError as error:
        raise reworded(error, names) from error


def reworded(error: ApiError, names: Names) -> ApiError:
    """The same error about the client's field."""
    detail = error.detail
    if detail.param is None:
        return error
    param, message = _renamed(detail.param, names), detail.message
    message = message.replace(detail.param, param).replace(*FLAT)
    for ours, theirs in names:  # other fields that it mentions
        if not ours.startswith(NUMBERED) and "_" in ours:
            message = message.replace(ours, theirs)
    return ApiError(
        error.status, message, detail.type, param=param, code=detail.code, headers=error.headers
    )


def _renamed(param: str, names: Names) -> str:
    for ours, theirs in names:
        if _is_in(param, ours):
            return theirs + param.removeprefix(ours)
    return param.replace(*FLAT)


def _is_in(param: str, name: str) -> bool:
    return param == name or (param.startswith(name) and param[len(name) :].startswith(END_OF_NAME))
