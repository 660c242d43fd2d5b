"""Any server that speaks /v1/completions with streaming and token-id prompts."""

from __future__ import annotations

import asyncio

from server.measuring.answers import Endpoint, ask_all
from server.measuring.timing import RequestTimes


class UrlTarget:
    """One connection per request; a token arrives when its chunk is read."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.name = endpoint.name
        self._endpoint = endpoint

    @classmethod
    def discover(cls, name: str, base_url: str, api_key: str | None = None) -> UrlTarget:
        """Ask the server for the name of its first model."""
        return cls(Endpoint.discover(name, base_url, api_key))

    def run(self, prompts: list[list[int]], num_tokens: int) -> list[RequestTimes]:
        answers = asyncio.run(ask_all(self._endpoint, prompts, num_tokens, len(prompts)))
        for answer in answers:
            if answer.num_tokens != num_tokens:
                raise RuntimeError(
                    f"{self.name} generated {answer.num_tokens} tokens instead of {num_tokens}"
                )
        return [answer.times for answer in answers]
