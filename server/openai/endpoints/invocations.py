"""POST /invocations, where Amazon SageMaker sends requests of every kind; vLLM has it, too."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from msgspec import UNSET, Raw, UnsetType
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from server.http.routes.openapi import Routes
from server.openai.endpoints.chat import create_chat_completion
from server.openai.endpoints.completions import create_completion
from server.openai.endpoints.embeddings import create_embeddings

router = APIRouter()
ROUTES = Routes(router)


class _Kind(msgspec.Struct):
    """The fields that tell requests apart."""

    prompt: Raw | UnsetType = UNSET
    input: Raw | UnsetType = UNSET


@router.post("/invocations", include_in_schema=False)
async def invoke(http: HttpRequest) -> Response:
    """What has a `prompt` is a text completion, what has an `input` asks for embeddings, and
    anything else is a chat completion."""
    try:
        kind = msgspec.json.decode(await http.body(), type=_Kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        kind = _Kind()  # the route of chats says what is wrong
    if kind.prompt is not UNSET:
        return await create_completion(http)
    if kind.input is not UNSET:
        return await create_embeddings(http)
    return await create_chat_completion(http)
