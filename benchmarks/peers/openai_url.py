"""Any server that speaks /v1/completions with streaming and token-id prompts."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx

from benchmarks.timing import RequestTimes

TIMEOUT = 600.0  # seconds for one request


class UrlTarget:
    """One connection per request; a token arrives when its chunk is read."""

    def __init__(self, name: str, base_url: str, model: str, api_key: str | None = None) -> None:
        self.name = name
        self._url = base_url.rstrip("/")
        self._model = model
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    @classmethod
    def discover(cls, name: str, base_url: str, api_key: str | None = None) -> UrlTarget:
        """Ask the server for the name of its first model."""
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        answer = httpx.get(f"{base_url.rstrip('/')}/models", headers=headers, timeout=30)
        answer.raise_for_status()
        return cls(name, base_url, answer.json()["data"][0]["id"], api_key)

    def run(self, prompts: list[list[int]], num_tokens: int) -> list[RequestTimes]:
        return asyncio.run(self._run(prompts, num_tokens))

    async def _run(self, prompts: list[list[int]], num_tokens: int) -> list[RequestTimes]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            headers=self._headers, timeout=TIMEOUT, limits=limits, trust_env=False
        ) as client:
            return await asyncio.gather(*(self._one(client, p, num_tokens) for p in prompts))

    async def _one(
        self, client: httpx.AsyncClient, prompt: list[int], num_tokens: int
    ) -> RequestTimes:
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        arrivals: list[float] = []
        usage = 0
        sent = time.perf_counter()
        async with client.stream("POST", f"{self._url}/completions", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{self.name}: {(await response.aread())[:500]!r}")
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line[6:])
                if chunk["choices"] and chunk["choices"][0]["finish_reason"] is None:
                    arrivals.append(time.perf_counter())
                usage = (chunk.get("usage") or {}).get("completion_tokens", usage)
        if usage != num_tokens:
            raise RuntimeError(f"{self.name} generated {usage} tokens instead of {num_tokens}")
        return RequestTimes(sent, tuple(arrivals))
