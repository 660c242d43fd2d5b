"""Aerie's own engine in this process."""

from __future__ import annotations

import itertools
import time

from engine.messages import Tokens
from engine.request import Request, SamplingParams
from server.assembly.offline import OfflineEngine
from server.measuring.timing import RequestTimes


class AerieTarget:
    """Greedy requests through `OfflineEngine`, all submitted before the first step."""

    name = "aerie"

    def __init__(self, engine: OfflineEngine) -> None:
        self._engine = engine
        self._ids = itertools.count()

    def run(self, prompts: list[list[int]], num_tokens: int) -> list[RequestTimes]:
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        requests = [
            Request(request_id=f"bench-{next(self._ids)}", prompt_ids=prompt, params=params)
            for prompt in prompts
        ]
        arrivals: dict[str, list[float]] = {request.request_id: [] for request in requests}
        sent = time.perf_counter()
        for events in self._engine.steps(requests):
            now = time.perf_counter()
            for event in events:
                if isinstance(event, Tokens):
                    arrivals[event.request_id] += [now] * len(event.token_ids)
        return [RequestTimes(sent, tuple(arrivals[r.request_id])) for r in requests]
