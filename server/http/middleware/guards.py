"""ASGI middlewares about where a request is addressed to: its host, its path, its query."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import parse_qsl

from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from configs.schema import ServerConfig, UnknownFields
from server.http.errors import MAX_SHOWN, ApiError, invalid, shorten
from server.http.middleware.request_log import record_of, send_error

PATH = re.compile(r"(/[A-Za-z0-9._~-]+)*")


def check_root_path(root_path: str) -> None:
    """ValueError if it is no path."""
    if not PATH.fullmatch(root_path):
        raise ValueError(
            f"server.root_path is {root_path!r}: it must be empty, or a path such as /llm, of "
            "letters, digits and . _ ~ -, without / at its end"
        )


class RootPath:
    """Middleware: takes `server.root_path` off the path, if the proxy has not done so. The prefix
    alone is redirected to the page, whose relative paths need the / at its end."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == self._root:
            await RedirectResponse(self._root + "/")(scope, receive, send)
            return
        if scope["type"] == "http" and scope["path"].startswith(self._root + "/"):
            scope = {**scope, "path": scope["path"][len(self._root) :]}
        await self._app(scope, receive, send)


class KnownHosts:
    """Middleware: 421 for another Host header than expected. A web page whose name was made to
    point to this machine could otherwise reach a server without keys (DNS rebinding)."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str]) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            for name, value in scope["headers"]:
                if name == b"host" and not self._knows(value.decode("latin-1")):
                    await send_error(self._misdirected(value.decode("latin-1")), scope, send)
                    return
        await self._app(scope, receive, send)

    def _knows(self, header: str) -> bool:
        host = header.lower()
        if not host.endswith("]"):  # an IPv6 address without a port
            host = host.rpartition(":")[0] or host if ":" in host else host
        return host in self._hosts or host.endswith(".localhost")

    def _misdirected(self, host: str) -> ApiError:
        message = (
            f"The Host header is {shorten(host)}: it must be one of "
            f"{', '.join(sorted(self._hosts))} (server.allowed_hosts), as this server needs no key"
        )
        return ApiError(421, message, "invalid_request_error", code="host_not_allowed")


def known_hosts(config: ServerConfig, has_keys: bool) -> tuple[str, ...] | None:
    """The Host headers to accept; None for all. A server on a loopback address that needs no key
    knows only names of loopback addresses, unless `server.allowed_hosts` is set."""
    if config.allowed_hosts:
        return None if "*" in config.allowed_hosts else config.allowed_hosts
    if has_keys or config.socket is not None or not _is_loopback(config.host):
        return None
    return ("localhost", "127.0.0.1", "[::1]", _written(config.host))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _written(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class KnownQuery:
    """Middleware: 400 for a query parameter, except on paths that begin like one of `own`, whose
    routes read them. Open paths answer with a warning instead, as load balancers add parameters to
    them; and so do all where `unknown` is "warn"."""

    def __init__(
        self, app: ASGIApp, unknown: UnknownFields, open_paths: frozenset[str], own: tuple[str, ...]
    ) -> None:
        self._app = app
        self._unknown = unknown
        self._open_paths = open_paths
        self._own = own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        query = scope["query_string"] if scope["type"] == "http" else b""
        if query and not scope["path"].startswith(self._own):
            pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=None)
            names = [name for name, _ in pairs] or [query.decode("latin-1")]
            if self._unknown == "refuse" and scope["path"] not in self._open_paths:
                shown = shorten(names[0])
                message = f"Unknown query parameter {shown}: this path has none"
                await send_error(invalid(message, code="unknown_query_parameter"), scope, send)
                return
            for name in dict.fromkeys(names):
                record_of(scope).not_used.append(f"query parameter {name[:MAX_SHOWN]}")
        await self._app(scope, receive, send)
