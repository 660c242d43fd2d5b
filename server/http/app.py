"""The HTTP application: routes, middlewares and error handlers around one engine client."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Match, Route

from configs.resolve import HostConfig
from configs.schema import ServerConfig
from server.http.admission.lanes import Lanes
from server.http.admission.queue import Admission
from server.http.admission.state import ServerState
from server.http.context import ServerContext, ServerInfo, context_of
from server.http.engine_client import EngineClient
from server.http.errors import OPENAI, ApiError, ErrorManner
from server.http.middleware.body_limit import BodyLimit
from server.http.middleware.callers import Callers
from server.http.middleware.guards import (
    KnownHosts,
    KnownQuery,
    RootPath,
    check_root_path,
    known_hosts,
)
from server.http.middleware.keys import (
    OPEN_PATHS,
    ApiKeys,
    KeyRing,
    load_admin_keys,
    load_api_keys,
    warn_of_readable_keys,
)
from server.http.middleware.request_log import WARNING_HEADER, NotedRoute, RequestLog, record_of
from server.http.monitoring.learning import Learning, LearningCollector
from server.http.monitoring.metrics import Metrics
from server.http.monitoring.tracing import open_tracing
from server.http.reply.background import Background
from server.http.reply.kept import KeptAnswers
from server.http.routes import admin, docs_page, operators
from server.http.routes.openapi import Routes, openapi
from server.text.answer.forms import answer_form
from server.text.grammars import GrammarChecker
from server.text.template.chat_template import ChatTemplate
from server.text.template.rendering import Renderer
from server.text.tokens.tokenizer import Tokenizer
from server.version import version

CORS_METHODS = ("GET", "HEAD", "POST", "DELETE")
CORS_EXPOSED = ("x-request-id", "retry-after", WARNING_HEADER)


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
        ValueError: the configured keys or the root path are invalid.
    """
    check_root_path(config.server.root_path)
    context = _context(config, client, tokenizer, chat_template, info)
    app = FastAPI(
        title="Aerie", version=version(), docs_url=None, redoc_url=None, lifespan=_lifespan
    )
    app.state.context = context
    routes = (*api, operators.ROUTES, admin.ROUTES)
    routers = [*(each.router for each in routes), docs_page.router]
    for router in routers:
        app.include_router(router)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, functools.partial(_http_error, routers))
    warn_of_readable_keys(config.server)
    _add_middlewares(app, context, routes)
    needs_key = bool(load_api_keys(config.server))
    document = functools.partial(
        openapi, app, version(), routes, needs_key, config.server.root_path
    )
    app.openapi = functools.cache(document)  # type: ignore[method-assign]
    return app


def _add_middlewares(app: FastAPI, context: ServerContext, routes: Sequence[Routes]) -> None:
    """The middleware added last sees a request first."""
    limits, keys = context.config.server, load_api_keys(context.config.server)
    open_paths = OPEN_PATHS.union(*(each.open_paths for each in routes))
    own_queries = tuple(path for each in routes for path in each.own_queries)
    app.add_middleware(NotedRoute)
    app.add_middleware(BodyLimit, limits=limits, metrics=context.metrics)
    app.add_middleware(
        KnownQuery, unknown=limits.unknown_fields, open_paths=open_paths, own=own_queries
    )
    if keys:
        app.add_middleware(ApiKeys, keys=keys, open_paths=open_paths)
    if limits.cors_origins:  # before keys: browsers ask without one
        app.add_middleware(
            CORSMiddleware,
            allow_origins=limits.cors_origins,
            allow_methods=CORS_METHODS,
            allow_headers=["*"],
            expose_headers=CORS_EXPOSED,
        )
    hosts = known_hosts(limits, bool(keys))
    if hosts is not None:
        app.add_middleware(KnownHosts, hosts=hosts)
    if limits.root_path:
        app.add_middleware(RootPath, root_path=limits.root_path)
    app.add_middleware(
        RequestLog,
        state=context.state,
        manner_of=_manners(limits, routes),
        count=context.metrics.answer,
        tracing=context.tracing,
    )


def _manners(limits: ServerConfig, routes: Sequence[Routes]) -> Callable[[str], ErrorManner]:
    """How the route of a path tells of errors."""
    special = [each for each in routes if each.manner is not OPENAI]

    def manner_of(path: str) -> ErrorManner:
        path = path.removeprefix(limits.root_path)
        found = (each.manner for each in special if path.startswith(each.router.prefix))
        return next(found, OPENAI)

    return manner_of


def _context(
    config: HostConfig,
    client: EngineClient,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate,
    info: ServerInfo,
) -> ServerContext:
    state, limits = ServerState(), config.server
    metrics = Metrics(client, info.model_name, config.cache, limits.metrics_prefixes)
    learning = Learning() if config.speculation.learn else None
    if learning is not None:
        metrics.add(functools.partial(LearningCollector, learning))
    background = Background(state, limits.max_background_responses, limits.retry_after)
    kept = KeptAnswers(
        limits.max_stored_responses, limits.max_stored_response_bytes, background.is_running
    )
    return ServerContext(
        config=config,
        client=client,
        tokenizer=tokenizer,
        renderer=Renderer(chat_template),
        answer_form=answer_form(chat_template, config.model),
        grammars=GrammarChecker(tokenizer),
        info=info,
        state=state,
        admission=Admission(config.server, client, state, metrics),
        callers=Callers(config.server),
        metrics=metrics,
        lanes=Lanes(),
        kept=kept,
        background=background,
        admin_keys=KeyRing(load_admin_keys(config.server)),
        tracing=open_tracing(config.server.otlp_endpoint),
        learning=learning,
    )


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    context: ServerContext = app.state.context
    context.background.close()
    if context.tracing is not None:
        context.tracing.close()
    context.renderer.close()
    context.grammars.close()
    context.lanes.close()


async def _api_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    record = record_of(http.scope)
    if record.error is None:
        record.error = _loggable(error, context_of(http).config.log.prompts)
    body = record.manner.body(error, record.request_id)
    return Response(body, error.status, headers=error.headers, media_type="application/json")


def _loggable(error: ApiError, prompts: bool) -> str:
    """The error for the log. Messages may quote the client, which needs `log.prompts`."""
    detail = error.detail
    if prompts:
        return detail.message
    return " ".join(part for part in (detail.code or detail.type, detail.param) if part)


async def _http_error(
    routers: Sequence[APIRouter], http: HttpRequest, error: Exception
) -> Response:
    """404 and 405 of the router, in the format of all other errors."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    is_unknown = error.status_code == 404
    if not is_unknown:
        named = set(headers.pop("Allow", "").split(", ")) - {""}
        headers["allow"] = ", ".join(sorted(named | _methods(routers, http)))
    message = f"{error.detail}: {http.method} {http.url.path}"
    return await _api_error(
        http,
        ApiError(
            error.status_code,
            message,
            "invalid_request_error",
            code="not_found" if is_unknown else "method_not_allowed",
            headers=headers,
        ),
    )


def _methods(routers: Sequence[APIRouter], http: HttpRequest) -> set[str]:
    """Those of all our routes at the path of a request; the error names those of one route. A path
    that a route has as it is stands for no parameter of another."""
    here = [
        route
        for router in routers
        for route in router.routes
        if isinstance(route, Route) and route.matches(http.scope)[0] is not Match.NONE
    ]
    exact = [route for route in here if not route.param_convertors]
    return set().union(*(route.methods or () for route in exact or here))
