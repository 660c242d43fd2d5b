"""GET /docs: a page that shows openapi.json and sends requests, without anything from elsewhere."""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

router = APIRouter()
PAGE = Path(__file__).with_name("docs.html")


@router.get("/docs", include_in_schema=False)
async def docs() -> Response:
    """The documentation of the API."""
    page, headers = _page()
    return Response(page, media_type="text/html", headers=headers)


@functools.cache
def _page() -> tuple[str, dict[str, str]]:
    """The page and its headers, read and hashed once."""
    page = PAGE.read_text(encoding="utf-8")
    return page, {"content-security-policy": policy(page), "x-content-type-options": "nosniff"}


def policy(page: str) -> str:
    """The content security policy of a page: its own script and style, and requests to its own
    server."""
    script, style = (_hash(_between(page, f"<{tag}>", f"</{tag}>")) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _between(page: str, begin: str, end: str) -> str:
    return page.partition(begin)[2].partition(end)[0]


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
