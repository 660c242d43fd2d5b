"""GET /v1/models."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from server.http.context import ServerContext, context_of
from server.http.reply.sse import StructResponse
from server.http.routes.openapi import Routes, operation
from server.openai.reply.bodies import ModelCard, ModelList, ModelPermission

router = APIRouter()
ROUTES = Routes(router, answers=(ModelList,))


@router.head("/v1/models", include_in_schema=False)
@router.get("/v1/models/", include_in_schema=False)  # else an empty id, below
@router.get("/v1/models", **operation(None, ModelList))
async def list_models(http: HttpRequest) -> Response:
    """The served models: always one."""
    return StructResponse(ModelList(data=[_card(context_of(http))]))


@router.get("/v1/models/{model_id:path}", **operation(None, ModelCard))
async def get_model(http: HttpRequest, model_id: str) -> Response:
    """One model."""
    context = context_of(http)
    context.check_model(model_id)
    return StructResponse(_card(context))


def _card(context: ServerContext) -> ModelCard:
    engine, info = context.client.info, context.info
    return ModelCard(
        id=info.model_name,
        created=info.created,
        owned_by="aerie",
        root=context.config.model.source,
        permission=[ModelPermission(id=f"modelperm-{info.model_name}", created=info.created)],
        max_model_len=None if engine is None else engine.max_model_len,
    )
