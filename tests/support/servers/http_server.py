"""A complete application around a scripted engine, called without sockets."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
import tokenizers

from configs.schema import (
    CacheConfig,
    Config,
    LogConfig,
    ModelConfig,
    ServerConfig,
    SpeculationConfig,
)
from server.apis import ROUTES
from server.http.app import create_app
from server.http.context import ServerContext, ServerInfo
from server.page.routes import page_routes
from server.text.generation_config import SamplingDefaults
from server.text.template.chat_template import ChatTemplate
from server.text.tokens.tokenizer import Tokenizer
from tests.support.configurations import hosted
from tests.support.engines.scripted_engine import INFO, Script, ScriptedEngine, say
from tests.support.models.tiny_llama import BOS, CHAT_TEMPLATE, EOS, SPECIALS, write_tokenizer

MODEL = "tiny"
SPECIAL_TOKENS = {"bos_token": SPECIALS[BOS], "eos_token": SPECIALS[EOS]}
MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = {"model": MODEL, "messages": MESSAGES}
COMPLETION = {"model": MODEL, "prompt": "hi"}
CHAT_PATH, COMPLETION_PATH = "/v1/chat/completions", "/v1/completions"
Result = TypeVar("Result")


@functools.cache
def tiny_tokenizer(folder: Path) -> Tokenizer:
    write_tokenizer(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Tokenizer(backend, SPECIAL_TOKENS, CHAT_TEMPLATE)


class Server:
    """The application and its parts. Each request runs its own event loop."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        script: Script | None = None,
        template: str | None = CHAT_TEMPLATE,
        log_prompts: bool = False,
        share_between_clients: bool = False,
        defaults: SamplingDefaults | None = None,
        model: dict[str, Any] | None = None,
        speculation: dict[str, Any] | None = None,
        specials_in_content: Iterable[str] = (),
        max_model_len: int = INFO.max_model_len,
        **limits: Any,
    ) -> None:
        self.tokenizer = tokenizer
        self.engine = ScriptedEngine(
            script or say([*self.ids("hello there"), EOS]),
            msgspec.structs.replace(INFO, max_model_len=max_model_len),
        )
        self.config = hosted(
            Config(
                model=ModelConfig(served_name=MODEL, **(model or {})),
                cache=CacheConfig(share_between_clients=share_between_clients),
                server=ServerConfig(**limits),
                speculation=SpeculationConfig(**(speculation or {})),
                log=LogConfig(prompts=log_prompts),
            )
        )
        self.app = create_app(
            self.config,
            self.engine,
            tokenizer,
            ChatTemplate(template, SPECIAL_TOKENS, specials_in_content),
            ServerInfo.from_config(self.config, defaults),
            (*ROUTES, page_routes()) if self.config.server.page else ROUTES,
        )

    @property
    def context(self) -> ServerContext:
        context = self.app.state.context
        assert isinstance(context, ServerContext)
        return context

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def call(client: httpx.AsyncClient) -> httpx.Response:
            return await client.request(method, path, **options)

        return self.run(call)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.request("POST", path, json=body, **options)

    def post_raw(self, path: str, body: bytes) -> httpx.Response:
        headers = {"content-type": "application/json"}
        return self.request("POST", path, content=body, headers=headers)

    def chat(self, **fields: Any) -> httpx.Response:
        return self.post(CHAT_PATH, CHAT | fields)

    def complete(self, **fields: Any) -> httpx.Response:
        return self.post(COMPLETION_PATH, COMPLETION | fields)

    def run(self, work: Callable[[httpx.AsyncClient], Awaitable[Result]]) -> Result:
        """Run a coroutine with a client of this application."""

        async def main() -> Result:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost"
            ) as client:
                return await work(client)

        return asyncio.run(main())


def events_of(response: httpx.Response) -> list[Any]:
    """The data of a stream, JSON parsed; "[DONE]" stays a string."""
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("\n\n")
    found: list[Any] = []
    for part in response.text[:-2].split("\n\n"):
        name, _, data = part.partition(": ")
        assert name == "data"
        found.append(data if data == "[DONE]" else json.loads(data))
    return found


class OpenCall:
    """One request that a test can watch while it runs, and whose client can disconnect."""

    def __init__(self, server: Server, path: str, body: Any) -> None:
        self._app = server.app
        self._path = path
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": json.dumps(body).encode()})
        self.sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.task = asyncio.ensure_future(self._run())

    def leave(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def _run(self) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": self._path,
            "raw_path": self._path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
            "client": ("127.0.0.1", 1),
            "server": ("test", 80),
        }
        await self._app(scope, self._incoming.get, self.sent.put)
