"""The web server of the HTTP process. To import it takes half a second, so that is done while the
engine loads."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI

from configs.resolve import HostConfig
from server.apis import ROUTES
from server.http.app import create_app
from server.http.connection.connections import Connections
from server.http.connection.direct_line import Departures
from server.http.connection.protocol import protocol_with
from server.http.context import ServerContext, ServerInfo
from server.http.engine_client import EngineClient
from server.page.routes import page_routes
from server.process.setup.garbage import spare_loaded
from server.process.setup.open_files import connection_limit
from server.text.chat_codec import load_codec


def build_app(config: HostConfig, client: EngineClient) -> FastAPI:
    """The application, with the model's tokenizer and template.

    Raises:
        OSError, ValueError: the model's files or the API keys cannot be used.
    """
    codec = load_codec(config)
    info = ServerInfo.from_config(config, codec.defaults)
    routes = (*ROUTES, page_routes()) if config.server.page else ROUTES
    app = create_app(config, client, codec.tokenizer, codec.template, info, routes)
    spare_loaded()
    return app


def web_config(app: FastAPI, limit: Connections | None = None) -> uvicorn.Config:
    """How uvicorn serves `app`, with at most so many connections."""
    context: ServerContext = app.state.context
    settings = context.config.server
    configured = protocol_with(settings, lambda: context.state.draining)
    protocol: Any = functools.partial(configured, limit=limit, departures=Departures())
    return uvicorn.Config(
        app,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
        http=protocol,
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="on",
    )


class WebServer(uvicorn.Server):
    """uvicorn without its own signal handlers: the server drains first."""

    def __init__(self, app: FastAPI) -> None:
        self.context: ServerContext = app.state.context
        settings = self.context.config.server
        most = connection_limit(settings.max_connections)
        limit = Connections(most, settings.retry_after, self.context.metrics)
        super().__init__(web_config(app, limit))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def drop_connections(self) -> None:
        """Abort connections of clients that do not read their responses."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def stop_waiting(self) -> None:
        self.force_exit = True
