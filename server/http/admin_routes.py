"""Routes for administrators, who have keys of their own."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from server.http.admin_schema import DraftInUse, SwapDraftRequest
from server.http.body import read_body
from server.http.context import context_of
from server.http.docs import operation
from server.http.errors import ApiError, bad_value
from server.http.middleware import bearer_token, unauthorized
from server.http.sse import StructResponse

router = APIRouter(prefix="/admin")


def _documented() -> dict[str, Any]:
    documented = operation(SwapDraftRequest, DraftInUse)
    documented["responses"][403] = {"description": "There is no admin key: the routes are off"}
    return documented


@router.post("/draft", **_documented())
async def swap_draft(http: HttpRequest) -> Response:
    """Draft with another head from now on. Open requests go on, and no text changes. Should the
    engine be started again, it begins with the configured head."""
    check_admin(http)
    context = context_of(http)
    context.engine_info()
    body = await read_body(http, SwapDraftRequest)
    try:
        swapped = await context.client.swap_draft(body.path)
    except ConnectionError as error:
        raise context.admission.engine_not_ready() from error
    if swapped.error is not None:
        raise bad_value("path", body.path, swapped.error)
    return StructResponse(DraftInUse(draft=swapped.draft))


def check_admin(http: HttpRequest) -> None:
    """ApiError 403 where there are no admin keys, 401 for what is none of them."""
    keys = context_of(http).admin_keys
    if not keys:
        raise ApiError(
            403,
            "This server has no admin key: set server.admin_keys or server.admin_key_file",
            "permission_error",
            code="admin_disabled",
        )
    token = bearer_token(http.scope["headers"])
    if token is None or not keys.accept(token):
        raise unauthorized(token, "admin key")
