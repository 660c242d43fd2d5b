"""/v1/messages: create a message, count the tokens of a conversation."""

from __future__ import annotations

import dataclasses
import functools

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from engine.messages import EngineInfo
from server.anthropic.bodies import MANNER, MessageEvent, MessageReply, MessagesError, TokenCount
from server.anthropic.convert import chat_request, message_params
from server.anthropic.request import CountTokensRequest, MessagesRequest
from server.anthropic.writer import MessageWriter
from server.http.context import ServerContext, context_of
from server.http.reply.sse import StructResponse
from server.http.request.body import Fields, body_size, read_body
from server.http.request.query import read_query
from server.http.routes.openapi import Routes, operation
from server.openai.inputs.conversion import CHAT
from server.openai.inputs.convert import chat_prompts, chat_reading
from server.openai.reply.answer import Task, respond
from server.openai.request.fields import HARMLESS
from server.openai.request.schema import ChatRequest
from server.openai.request.wording import worded

PATH = "/v1/messages"


class BetaQuery(Fields):
    beta: str | None = Field(None, description=HARMLESS + "fields are known or not, also with it.")


router = APIRouter(prefix=PATH)
ROUTES = Routes(
    router,
    (MessagesRequest, CountTokensRequest),
    (MessageReply, MessageEvent, TokenCount, MessagesError),
    manner=MANNER,
    own_queries=(PATH,),
)


@router.post(
    "",
    **operation(MessagesRequest, MessageReply, streams=True, query=BetaQuery, error=MessagesError),
)
async def create_message(http: HttpRequest) -> Response:
    """Continue a conversation."""
    context = context_of(http)
    context.admission.check_open()
    read_query(http, BetaQuery)
    request = await read_body(http, MessagesRequest)
    asked = await context.in_pool(body_size(http), chat_request, request)
    with worded(asked.names):
        return await respond(http, _task(request), asked.chat)


@router.post(
    "/count_tokens",
    **operation(CountTokensRequest, TokenCount, query=BetaQuery, error=MessagesError),
)
async def count_tokens(http: HttpRequest) -> Response:
    """How many tokens a conversation has."""
    context = context_of(http)
    info = context.engine_info()
    read_query(http, BetaQuery)
    request = await read_body(http, CountTokensRequest)
    context.check_model(request.model)
    count = await context.in_pool(body_size(http), _count, context, info, request)
    return StructResponse(TokenCount(input_tokens=count))


def _count(context: ServerContext, info: EngineInfo, request: CountTokensRequest) -> int:
    asked = chat_request(request)
    with worded(asked.names):
        (prompt,) = chat_prompts(context, info, asked.chat)
    return len(prompt.token_ids)


def _task(request: MessagesRequest) -> Task[ChatRequest]:
    return Task(
        ChatRequest,
        "msg_",
        dataclasses.replace(CHAT, params=message_params),
        functools.partial(MessageWriter, request),
        chat_reading,
        failure=MessageWriter.failure,
        end=b"",
    )
