"""The API in front of the engines: the application of one server, with Ray Serve as its door."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from configs.host import this_host
from configs.resolve import resolve_host
from configs.schema import Config
from server.process.setup.logs import set_up_logging
from server.process.web import build_app
from server.ray.client import RayEngineClient

LOOK_PERIOD = 1.0  # seconds between looks at the engines


@serve.ingress()
class Front:
    """One process with the API; Ray Serve asks `__serve_build_asgi_app__` for the application."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, config: str, engines: DeploymentHandle[Any]
    ) -> None:
        """`config`: a `Config` as JSON."""
        self._config = resolve_host(Config.model_validate_json(config), this_host())
        set_up_logging(self._config.log)
        self._client = RayEngineClient(engines, LOOK_PERIOD)
        self._watching = asyncio.create_task(self._client.watch())

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self._config, self._client)

    async def wait_ready(self) -> None:
        """Return once /ready is 200."""
        await self._client.wait_ready()

    def check_health(self) -> None:
        """RuntimeError when the engines are not looked at any more."""
        if self._watching.done():
            raise RuntimeError("the engines are not looked at any more")

    async def __del__(self) -> None:
        self._watching.cancel()
