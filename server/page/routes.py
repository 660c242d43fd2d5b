"""GET /: the page, and its files below /page/. They need no key: the page asks for one."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from server.http.routes.openapi import Routes

ASSETS = Path(__file__).with_name("assets")
INDEX = "index.html"
PREFIX = "/page/"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
# Scripts, styles and requests of this server only. Markup is made of strings by one library, which
# removes what could act in it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)


@dataclass(frozen=True, slots=True)
class Asset:
    """A file of the page, read once."""

    content: bytes
    media_type: str
    tag: str  # changes with the content

    @classmethod
    def read(cls, path: Path) -> Asset:
        content = path.read_bytes()
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        return cls(content, MEDIA_TYPES[path.suffix], tag)

    def response(self, http: HttpRequest) -> Response:
        """The file, or 304 for a client that has it."""
        headers = {
            "etag": self.tag,
            "cache-control": "no-cache",  # asks each time, so that a new version is seen at once
            "content-security-policy": POLICY,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        }
        if http.headers.get("if-none-match") == self.tag:
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


@functools.cache
def assets() -> Mapping[str, Asset]:
    """All files of the page, by the path that they are served at."""
    files = (path for path in sorted(ASSETS.iterdir()) if path.suffix in MEDIA_TYPES)
    return {_served_at(path.name): Asset.read(path) for path in files}


def _served_at(name: str) -> str:
    return "/" if name == INDEX else PREFIX + name


async def _serve(http: HttpRequest) -> Response:
    return assets()[http.scope["path"]].response(http)


def page_routes() -> Routes:
    """The routes of the page."""
    router = APIRouter()
    for path in assets():
        router.add_api_route(path, _serve, methods=["GET", "HEAD"], include_in_schema=False)
    return Routes(router, open_paths=frozenset(assets()))
