"""Routes for administrators; they need an admin key."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter
from pydantic import Field, StrictBool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from engine.messages import DraftFacts
from server.http.context import context_of
from server.http.errors import ApiError, bad_value
from server.http.middleware.keys import bearer_token, unauthorized
from server.http.monitoring.learning import Learning, LearningStatus
from server.http.reply.sse import StructResponse
from server.http.request.body import Fields, read_body
from server.http.routes.openapi import Routes, operation


class SwapDraftRequest(Fields):
    """POST /admin/draft."""

    path: str | None = Field(
        min_length=1,
        max_length=4096,
        pattern=r"^[^\x00]*$",
        description="Directory of a draft head on the server; null: draft with no head.",
    )


class DraftInUse(msgspec.Struct, frozen=True, kw_only=True):
    """The head that drafts from now on; null without one."""

    draft: DraftFacts | None


class LearningRequest(Fields):
    """POST /admin/learning."""

    paused: StrictBool = Field(description="Whether the draft head stops learning until told else.")


router = APIRouter(prefix="/admin")
ROUTES = Routes(router, (SwapDraftRequest, LearningRequest), (DraftInUse, LearningStatus))


def _documented(request: type[Fields] | None, answer: type[msgspec.Struct]) -> dict[str, Any]:
    documented = operation(request, answer)
    documented["responses"][403] = {"description": "There is no admin key: the routes are off"}
    return documented


@router.post("/draft", **_documented(SwapDraftRequest, DraftInUse))
async def swap_draft(http: HttpRequest) -> Response:
    """Draft with another head from now on. Open requests continue, and no text changes. An engine
    that is restarted begins with the configured head."""
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


@router.get("/learning", **_documented(None, LearningStatus))
async def read_learning(http: HttpRequest) -> Response:
    """How the head learns from live requests (`speculation.learn`)."""
    check_admin(http)
    return StructResponse(_learning(http).status)


@router.post("/learning", **_documented(LearningRequest, LearningStatus))
async def pause_learning(http: HttpRequest) -> Response:
    """Pause learning, or let it go on. A head that is in use stays."""
    check_admin(http)
    learning = _learning(http)
    body = await read_body(http, LearningRequest)
    learning.pause(paused=body.paused)
    return StructResponse(learning.status)


def _learning(http: HttpRequest) -> Learning:
    learning = context_of(http).learning
    if learning is None:
        raise ApiError(
            404,
            "The draft head does not learn on this server: set speculation.learn",
            "invalid_request_error",
            code="learning_off",
        )
    return learning


def check_admin(http: HttpRequest) -> None:
    """ApiError 403 if no admin keys are configured, 401 unless the request has one of them."""
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
