"""Routes for operators: health, readiness, facts, metrics."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import msgspec
from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from configs.redact import redacted
from engine.messages import EngineInfo
from server.http.context import context_of
from server.http.routes.openapi import Routes
from server.version import version

router = APIRouter()
ROUTES = Routes(router)
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "fastapi",
    "uvicorn",
    "pydantic",
    "msgspec",
    "pyzmq",
)


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health() -> dict[str, str]:
    """200 as long as the process answers."""
    return {"status": "ok"}


@router.head("/ready", include_in_schema=False)
@router.get("/ready", responses={503: {"description": "Not ready; the error says why"}})
async def ready(http: HttpRequest) -> dict[str, str]:
    """200 when the server accepts requests, else 503 with the reason."""
    problem = context_of(http).admission.closed()
    if problem is not None:
        raise problem
    return {"status": "ready"}


@router.api_route("/ping", methods=["GET", "HEAD", "POST"], include_in_schema=False)
async def ping(http: HttpRequest) -> dict[str, str]:
    """As /ready, where Amazon SageMaker and clients of vLLM ask."""
    return await ready(http)


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics", response_class=Response)
async def metrics(http: HttpRequest) -> Response:
    """Prometheus metrics."""
    return Response(context_of(http).metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.head("/version", include_in_schema=False)
@router.get("/version", responses={401: {"description": "The API key is missing or wrong"}})
async def show_version() -> dict[str, str]:
    """The version of Aerie, in vLLM's shape."""
    return {"version": version()}


@router.get("/info", responses={401: {"description": "The API key is missing or wrong"}})
async def info(http: HttpRequest) -> Response:
    """Configuration without secrets, versions, facts of the engine and its kernels."""
    context = context_of(http)
    engine = context.client.info
    return JSONResponse(
        {
            "model": context.info.model_name,
            "system_fingerprint": context.info.fingerprint,
            "draining": context.state.draining,
            "sampling_defaults": context.info.defaults.named(),
            "config": redacted(context.resolved_config()),
            "versions": versions(),
            "engine": None if engine is None else _facts(engine),
        }
    )


def _facts(engine: EngineInfo) -> dict[str, Any]:
    facts: dict[str, Any] = msgspec.to_builtins(engine)
    return facts | {"ops": engine.ops_in_words}


def versions() -> dict[str, str]:
    """Versions of Python and of the relevant packages, found without importing them."""
    found = {"python": platform.python_version(), "aerie": version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
