"""The HTTP application: routes, middlewares and error handlers around one engine client."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from configs.resolve import HostConfig
from server.http import admin_routes, ops_routes
from server.http.admission import Admission
from server.http.callers import Callers
from server.http.context import ServerContext, ServerInfo, context_of
from server.http.docs import Routes, openapi
from server.http.engine_client import EngineClient
from server.http.errors import ApiError
from server.http.metrics import Metrics
from server.http.middleware import (
    ApiKeys,
    BodyLimit,
    KeyRing,
    load_admin_keys,
    load_api_keys,
    warn_of_readable_keys,
)
from server.http.request_log import RequestLog, record_of
from server.http.state import ServerState
from server.text.chat_template import ChatTemplate
from server.text.tokenizer import Tokenizer
from server.version import version

POOL_THREADS = 2  # for parsing and tokenising; more threads slow down the event loop


def create_app(
    config: HostConfig,
    client: EngineClient,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate,
    info: ServerInfo,
    api: Sequence[Routes],
) -> FastAPI:
    """The application of one engine. Its routes share `app.state.context`.

    Args:
        api: the routes to serve, besides those for operators.

    Raises:
        ValueError: the configured keys are invalid.
    """
    context = _context(config, client, tokenizer, chat_template, info)
    app = FastAPI(title="Aerie", version=version(), redoc_url=None, lifespan=_lifespan)
    app.state.context = context
    routes = (*api, ops_routes.ROUTES, admin_routes.ROUTES)
    for each in routes:
        app.include_router(each.router)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    # The middleware added last sees a request first.
    app.add_middleware(BodyLimit, max_bytes=config.server.max_body_bytes)
    keys = load_api_keys(config.server)
    warn_of_readable_keys(config.server)
    if keys:
        app.add_middleware(ApiKeys, keys=keys)
    app.add_middleware(RequestLog, state=context.state)
    document = functools.partial(openapi, app, version(), routes)
    app.openapi = functools.cache(document)  # type: ignore[method-assign]
    return app


def _context(
    config: HostConfig,
    client: EngineClient,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate,
    info: ServerInfo,
) -> ServerContext:
    state = ServerState()
    metrics = Metrics(client, info.model_name)
    return ServerContext(
        config=config,
        client=client,
        tokenizer=tokenizer,
        chat_template=chat_template,
        info=info,
        state=state,
        admission=Admission(config.server, client, state, metrics),
        callers=Callers(config.server),
        metrics=metrics,
        pool=ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="text"),
        longest_token=functools.cache(functools.partial(_longest_token, tokenizer)),
        admin_keys=KeyRing(load_admin_keys(config.server)),
    )


def _longest_token(tokenizer: Tokenizer) -> int:
    """Bytes of the longest token: a text has at least its length divided by this many tokens."""
    return max(len(tokenizer.token_bytes(index)) for index in range(tokenizer.vocab_size))


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    context: ServerContext = app.state.context
    context.pool.shutdown(wait=False, cancel_futures=True)


async def _api_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    record = record_of(http.scope)
    if record.error is None:
        record.error = _loggable(error, context_of(http).config.log.prompts)
    return Response(
        error.body(), error.status, headers=error.headers, media_type="application/json"
    )


def _loggable(error: ApiError, prompts: bool) -> str:
    """The error for the log. Messages may quote the client, which needs `log.prompts`."""
    detail = error.detail
    if prompts:
        return detail.message
    return " ".join(part for part in (detail.code or detail.type, detail.param) if part)


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    """404 and 405 of the router, in the format of all other errors."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {http.method} {http.url.path}"
    return await _api_error(
        http,
        ApiError(
            error.status_code,
            message,
            "invalid_request_error",
            code="not_found" if error.status_code == 404 else "method_not_allowed",
            headers=dict(error.headers or {}),
        ),
    )
