"""Completions of any server with the OpenAI API, read as they are streamed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from server.measuring.timing import RequestTimes

TIMEOUT = 600.0  # seconds for one request
# The field that keeps a server from ending an answer early.
Stopless = Literal["ignore_eos", "min_tokens", "generation_config"]


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed completion. Times are those of `time.perf_counter`, in seconds."""

    sent: float
    arrivals: tuple[float, ...]  # of each chunk; one may hold several tokens
    text: str
    num_tokens: int  # see `_Reading.answer`

    @property
    def ttft(self) -> float:
        """Seconds to the first chunk."""
        return self.arrivals[0] - self.sent

    @property
    def ttit(self) -> float | None:
        """Seconds per token after the first chunk; None if all came in one chunk."""
        if len(self.arrivals) < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / max(self.num_tokens - 1, 1)

    @property
    def times(self) -> RequestTimes:
        return RequestTimes(self.sent, self.arrivals)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model of a server; `base_url` ends with /v1 or the like."""

    name: str  # of the server, for messages and tables
    base_url: str
    model: str
    headers: tuple[tuple[str, str], ...] = ()
    goes_on_by: Stopless = "ignore_eos"

    @classmethod
    def discover(
        cls,
        name: str,
        base_url: str,
        api_key: str | None = None,
        goes_on_by: Stopless = "ignore_eos",
    ) -> Endpoint:
        """Ask the server for its first model. httpx.HTTPError if it does not answer."""
        headers = () if api_key is None else (("Authorization", f"Bearer {api_key}"),)
        base_url = base_url.rstrip("/")
        with httpx.Client(headers=dict(headers), timeout=30, trust_env=False) as client:
            answer = client.get(f"{base_url}/models")
        answer.raise_for_status()
        return cls(name, base_url, first_model(answer.json()), headers, goes_on_by)

    def client(self) -> httpx.AsyncClient:
        """Has as many connections as are asked for at the same time. None is used twice: some
        servers close one after so many requests without saying so."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        return httpx.AsyncClient(
            headers=dict(self.headers), timeout=TIMEOUT, limits=limits, trust_env=False
        )

    async def ask(
        self, client: httpx.AsyncClient, prompt: str | list[int], num_tokens: int
    ) -> Answer:
        """The greedy answer of `num_tokens` tokens.

        Raises:
            httpx.HTTPError: no connection, or it broke.
            RuntimeError: the server refused, or sent no token.
        """
        body = self._body(prompt, num_tokens)
        reading = _Reading(num_tokens)
        sent = time.perf_counter()
        async with client.stream("POST", f"{self.base_url}/completions", json=body) as response:
            if response.status_code != 200:
                reason = (await response.aread())[:500]
                raise RuntimeError(f"{self.name}: status {response.status_code}, {reason!r}")
            async for line in response.aiter_lines():
                reading.take(line)
        if not reading.arrivals:
            raise RuntimeError(f"{self.name} sent no token: {reading.rest[:500]!r}")
        return reading.answer(sent)

    def _body(self, prompt: str | list[int], num_tokens: int) -> dict[str, Any]:
        """A request for exactly `num_tokens` tokens."""
        values: dict[Stopless, object] = {
            "ignore_eos": True,
            "min_tokens": num_tokens,
            # Of transformers, in JSON; it has no field of its own for it.
            "generation_config": json.dumps(
                {"max_new_tokens": num_tokens, "eos_token_id": None, "do_sample": False}
            ),
        }
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": num_tokens,
            self.goes_on_by: values[self.goes_on_by],
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


async def ask_all(
    endpoint: Endpoint, prompts: Sequence[str | list[int]], num_tokens: int, streams: int
) -> list[Answer]:
    """The answers to all prompts, in order; always `streams` requests at a time, until prompts run
    out. Raises as `Endpoint.ask`."""
    free = asyncio.Semaphore(streams)

    async def one(prompt: str | list[int]) -> Answer:
        async with free:
            return await endpoint.ask(client, prompt, num_tokens)

    async with endpoint.client() as client:
        return await asyncio.gather(*(one(prompt) for prompt in prompts))


def first_model(listed: dict[str, Any]) -> str:
    """The name of the first model in an answer of /models. ValueError if there is none."""
    if not listed.get("data"):
        raise ValueError(f"the server lists no model: {listed}")
    return str(listed["data"][0]["id"])


class _Reading:
    """A stream as it arrives."""

    def __init__(self, asked: int) -> None:
        self.arrivals: list[float] = []
        self._asked = asked
        self._finish: str | None = None
        self.rest = ""  # lines that are no events, such as the message of an error
        self._texts: list[str] = []
        self._usage: int | None = None

    def take(self, line: str) -> None:
        if not line.startswith("data:"):
            self.rest += line
        elif (event := line[5:].strip()) != "[DONE]":
            self._take(json.loads(event))

    def _take(self, chunk: dict[str, Any]) -> None:
        usage = chunk.get("usage") or {}
        self._usage = usage.get("completion_tokens", self._usage)
        choices = chunk.get("choices")
        if not choices:
            self.rest += json.dumps(chunk) if "error" in chunk else ""
            return
        self._finish = choices[0].get("finish_reason") or self._finish
        if (text := choices[0].get("text")) or self._finish is None:
            self.arrivals.append(time.perf_counter())
            self._texts.append(text or "")

    def answer(self, sent: float) -> Answer:
        """With the number of tokens that the server states. Some state none: an answer that ended
        by its length has as many as were asked for, any other at least one for each chunk."""
        counted = self._asked if self._finish == "length" else len(self.arrivals)
        tokens = counted if self._usage is None else self._usage
        return Answer(sent, tuple(self.arrivals), "".join(self._texts), tokens)
