"""/v1/responses: create, fetch, cancel and delete responses; count the tokens of their input."""

from __future__ import annotations

import functools
import logging
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from server.http.context import ServerContext, context_of
from server.http.errors import ApiError, bad_value, invalid, server_error
from server.http.reply.sse import StructResponse
from server.http.request.body import Fields, NotUsed, body_size, read_body
from server.http.request.query import read_query
from server.http.routes.openapi import Routes, operation
from server.openai.inputs.conversion import CHAT, Conversion
from server.openai.inputs.convert import chat_reading
from server.openai.reply.answer import Task, begin, respond, whole
from server.openai.reply.generation import Generation
from server.openai.request.fields import HARMLESS
from server.openai.request.schema import ChatRequest
from server.openai.request.wording import worded
from server.openai.responses.bodies import (
    DeletedResponse,
    InputTokens,
    ItemList,
    ResponseEvent,
    ResponseObject,
)
from server.openai.responses.convert import SHORTENED, Asked, chat_request
from server.openai.responses.request import InputTokensRequest, ResponsesRequest
from server.openai.responses.stored import (
    bounded_line,
    head_of,
    items_of,
    keep,
    kept_items,
    kept_response,
    line_before,
)
from server.openai.responses.writer import ResponseWriter, Wanted

PATH = "/v1/responses"
logger = logging.getLogger(__name__)
INCLUDED = HARMLESS + "responses are shown as they were made."


class NoQuery(Fields):
    """No query parameter."""


class FetchQuery(Fields):
    include: NotUsed[str] = Field(None, description=INCLUDED)
    include_obfuscation: NotUsed[str] = Field(None, description=INCLUDED)
    starting_after: NotUsed[int] = Field(None, description=HARMLESS + "it is for streams.")
    stream: Literal[False] | None = Field(None, description="Only false.")


class ItemsQuery(Fields):
    limit: Annotated[int, Field(ge=1, le=100)] = Field(20, description="Most items.")
    order: Literal["asc", "desc"] = Field("desc", description="desc: the last item first.")
    after: str | None = Field(None, description="Only items after the one with this id.")
    include: NotUsed[str] = Field(None, description=INCLUDED)


router = APIRouter(prefix=PATH)
ROUTES = Routes(
    router,
    (ResponsesRequest, InputTokensRequest),
    (ResponseObject, ResponseEvent, InputTokens, DeletedResponse, ItemList),
    own_queries=(f"{PATH}/",),
)


@router.post("", **operation(ResponsesRequest, ResponseObject, streams=True))
async def create_response(http: HttpRequest) -> Response:
    """Continue a conversation."""
    context = context_of(http)
    context.admission.check_open()
    request = await read_body(http, ResponsesRequest)
    asked = await _asked(http, request)
    task = _task(_wanted(http, request), request)
    with worded(asked.names):
        if request.background:
            with context.background.room():
                generation, writer = await begin(http, task, asked.chat)
                assert isinstance(writer, ResponseWriter)
                return StructResponse(_in_background(context, generation, writer))
        return await respond(http, task, asked.chat)


@router.post("/input_tokens", **operation(InputTokensRequest, InputTokens))
async def count_input_tokens(http: HttpRequest) -> Response:
    """How many tokens the prompt of a response would have."""
    context = context_of(http)
    info = context.engine_info()
    read_query(http, NoQuery)
    request = await read_body(http, InputTokensRequest)
    asked = await _asked(http, request)
    context.check_model(request.model)
    with worded(asked.names):
        (prompt,), _ = await _conversion(request).inputs(http, info, asked.chat)
    return StructResponse(InputTokens(input_tokens=len(prompt.token_ids)))


@router.get("/{response_id}", **operation(None, ResponseObject, query=FetchQuery))
async def get_response(http: HttpRequest, response_id: str) -> Response:
    """A response that is stored."""
    read_query(http, FetchQuery)
    found = kept_response(context_of(http), _owner(http), response_id)
    return Response(found.answer, media_type="application/json")


@router.delete("/{response_id}", **operation(None, DeletedResponse))
async def delete_response(http: HttpRequest, response_id: str) -> Response:
    """Forget a response. Those that follow it cannot be continued any more."""
    read_query(http, NoQuery)
    context, owner = context_of(http), _owner(http)
    kept_response(context, owner, response_id)
    await context.background.cancel(response_id)
    context.kept.remove(owner, response_id)
    return StructResponse(DeletedResponse(id=response_id))


@router.post("/{response_id}/cancel", **operation(None, ResponseObject))
async def cancel_response(http: HttpRequest, response_id: str) -> Response:
    """Stop a response that is made in the background."""
    read_query(http, NoQuery)
    context, owner = context_of(http), _owner(http)
    if not head_of(kept_response(context, owner, response_id)).background:
        raise invalid("Only responses with background true can be cancelled", "response_id")
    await context.background.cancel(response_id)
    return Response(
        kept_response(context, owner, response_id).answer, media_type="application/json"
    )


@router.get("/{response_id}/input_items", **operation(None, ItemList, query=ItemsQuery))
async def list_input_items(http: HttpRequest, response_id: str) -> Response:
    """The items of the request for a response, without those of earlier responses."""
    query = read_query(http, ItemsQuery)
    found = kept_response(context_of(http), _owner(http), response_id)
    items = msgspec.json.decode(found.asked)
    if query.order == "desc":
        items.reverse()
    if query.after is not None:
        ids = [item["id"] for item in items]
        if query.after not in ids:
            raise bad_value("after", query.after, "it must be the id of an item of this response")
        items = items[ids.index(query.after) + 1 :]
    shown = items[: query.limit]
    first, last = (shown[0]["id"], shown[-1]["id"]) if shown else (None, None)
    return StructResponse(
        ItemList(data=shown, first_id=first, last_id=last, has_more=len(items) > len(shown))
    )


def _owner(http: HttpRequest) -> str:
    return context_of(http).callers.of(http.scope["headers"]).label


async def _asked(http: HttpRequest, request: InputTokensRequest) -> Asked:
    context = context_of(http)
    line = line_before(context, _owner(http), request)
    limit, may_shorten = context.config.server.max_body_bytes, request.truncation == "auto"
    size = body_size(http) + sum(kept.num_bytes for kept in line)
    earlier = lambda: items_of(bounded_line(line, limit, may_shorten))  # noqa: E731
    return await context.in_pool(size, chat_request, request, context.info.model_name, earlier)


def _conversion(request: InputTokensRequest) -> Conversion[ChatRequest]:
    return SHORTENED if request.truncation == "auto" else CHAT


def _wanted(http: HttpRequest, request: ResponsesRequest) -> Wanted:
    """Raises ApiError 400 if the response must be stored, but none is."""
    context, owner = context_of(http), _owner(http)
    for name in ("store", "background"):
        if getattr(request, name) and not context.kept.is_open:
            raise bad_value(
                name, True, "this server stores no responses (server.max_stored_responses)"
            )
    is_stored = request.store is not False and context.kept.is_open
    if not is_stored:
        return Wanted(request, False, lambda _: None)
    before, asked = request.previous_response_id, kept_items(request)
    return Wanted(request, True, functools.partial(keep, context, owner, before, asked))


def _task(wanted: Wanted, request: ResponsesRequest) -> Task[ChatRequest]:
    return Task(
        ChatRequest,
        "resp_",
        _conversion(request),
        functools.partial(ResponseWriter, wanted),
        chat_reading,
        failure=ResponseWriter.failure,
        end=b"",
    )


def _in_background(
    context: ServerContext, generation: Generation, writer: ResponseWriter
) -> ResponseObject:
    """Start to make a response that can be fetched from now on."""
    queued = writer.begun("queued")

    def close() -> None:
        generation.close()
        if not writer.is_over:
            writer.keep(writer.begun("cancelled"))
        context.kept.ended(generation.id)

    work = functools.partial(_make, context, generation, writer)
    context.background.start(generation.id, work, close)
    writer.keep(queued)  # it stays stored as long as the task runs
    return queued


async def _make(context: ServerContext, generation: Generation, writer: ResponseWriter) -> None:
    writer.keep(writer.begun("in_progress"))
    try:
        await whole(context, generation, writer)
    except ApiError as error:
        writer.failed(error)
    except Exception:
        logger.exception("a response in the background failed")
        writer.failed(server_error("Internal error"))
