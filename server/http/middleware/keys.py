"""ASGI middlewares that refuse requests before they reach a route."""

from __future__ import annotations

import hashlib
import hmac
import logging
import stat
from collections.abc import Iterable
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from configs.files import read_text
from configs.schema import ServerConfig
from server.http.errors import ApiError
from server.http.middleware.request_log import send_error

OPEN_PATHS = frozenset({"/health", "/ready", "/ping", "/metrics", "/docs", "/openapi.json"})
ADMIN_PREFIX = "/admin/"  # these routes check admin keys themselves
REALM = {"www-authenticate": "Bearer"}

logger = logging.getLogger(__name__)


class ApiKeys:
    """Middleware: 401 unless `Authorization: Bearer <key>` or `x-api-key` holds one of the keys.
    Paths for probes and documentation are open; admin paths have their own keys."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], open_paths: frozenset[str]) -> None:
        self._app = app
        self._keys = KeyRing(keys)
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._needs_key(scope["path"]):
            token = api_key(scope["headers"])
            if token is None or not self._keys.accept(token):
                await send_error(unauthorized(token, "API key"), scope, send)
                return
        await self._app(scope, receive, send)

    def _needs_key(self, path: str) -> bool:
        return path not in self._open_paths and not path.startswith(ADMIN_PREFIX)


class KeyRing:
    """Known keys, held as digests."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, token: bytes) -> bool:
        """Always compares with every key, so that the time reveals nothing about them."""
        digest = _digest(token)
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def bearer_token(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    """The token of the Authorization header; None without one, or with another scheme."""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, token = value.partition(b" ")
            return token.strip() if scheme.lower() == b"bearer" else None
    return None


def api_key(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    """The key of a request: its bearer token, else its header x-api-key; None without both."""
    token = bearer_token(headers)
    if token is not None:
        return token
    return next((value.strip() for name, value in headers if name == b"x-api-key"), None)


def unauthorized(token: bytes | None, kind: str) -> ApiError:
    """401 for a wrong or missing token, where a key of this `kind` is needed."""
    message = f"Incorrect {kind}" if token is not None else f"Missing {kind}"
    message += "; send it as: Authorization: Bearer <key>"
    return ApiError(
        401, message, "authentication_error", code="invalid_api_key", headers=dict(REALM)
    )


def load_api_keys(config: ServerConfig) -> tuple[str, ...]:
    """Keys of `api_keys` and `api_key_file`; without any, requests need no key.

    Raises:
        ValueError: the file cannot be read or holds no key: a server without keys would be open.
    """
    return _load_keys("api_key", config.api_keys, config.api_key_file)


def load_admin_keys(config: ServerConfig) -> tuple[str, ...]:
    """Keys of `admin_keys` and `admin_key_file`; without any, the admin routes are off.

    Raises:
        ValueError: as `load_api_keys`; or a key is both an API key and an admin key.
    """
    keys = _load_keys("admin_key", config.admin_keys, config.admin_key_file)
    if not set(keys).isdisjoint(load_api_keys(config)):
        raise ValueError("server.admin_keys holds an API key: they must differ")
    return keys


def _load_keys(name: str, settings: tuple[str, ...], path: Path | None) -> tuple[str, ...]:
    keys = list(settings)
    if path is not None:
        try:
            lines = [line.strip() for line in read_text(path).splitlines()]
        except (OSError, ValueError) as error:
            raise ValueError(f"server.{name}_file {path} cannot be read: {error}") from error
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise ValueError(f"server.{name}_file {path} holds no key")
        keys += found
    if any(not key.strip() for key in keys):
        raise ValueError(f"server.{name}s holds an empty key")
    return tuple(dict.fromkeys(keys))


def warn_of_readable_keys(config: ServerConfig) -> None:
    """Log which files of keys everybody on this machine can read."""
    for name in ("api_key_file", "admin_key_file"):
        path: Path | None = getattr(config, name)
        if path is not None and path.stat().st_mode & stat.S_IROTH:
            logger.warning("server.%s %s can be read by every user: chmod o-r it", name, path)
