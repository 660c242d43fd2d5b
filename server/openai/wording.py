"""Errors about a chat request, in the names of the request that it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from server.http.errors import ApiError

Names = Sequence[tuple[str, str]]  # of a chat request -> of the client's request; the first counts
END_OF_NAME = (".", "[")
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
    for ours, theirs in names:
        if detail.param is not None and _is_in(detail.param, ours):
            param = theirs + detail.param.removeprefix(ours)
            return _about(error, param, detail.message.replace(detail.param, param))
    if detail.param is not None and "tools" in detail.param:
        return _about(error, detail.param.replace(*FLAT), detail.message.replace(*FLAT))
    return error


def _about(error: ApiError, param: str, message: str) -> ApiError:
    detail, headers = error.detail, error.headers
    return ApiError(
        error.status, message, detail.type, param=param, code=detail.code, headers=headers
    )


def _is_in(param: str, name: str) -> bool:
    return param == name or (param.startswith(name) and param[len(name) :].startswith(END_OF_NAME))
