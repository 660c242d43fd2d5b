"""The engine inside this process, without HTTP: for benchmarks, evaluation and tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from configs.host import this_host
from configs.resolve import resolve_host
from configs.schema import Config
from engine.completion import Completion
from engine.core import EngineCore
from engine.messages import EngineInfo, EngineMessage, Finished, Submit, Tokens
from engine.request import Request
from server.assembly.compose import build_swappable_engine


class OfflineEngine:
    """Runs batches of requests to their end."""

    def __init__(self, core: EngineCore, close: Callable[[], None] | None = None) -> None:
        """`close`: called to end the other ranks."""
        self.core = core
        self._close = close

    @classmethod
    def from_config(cls, config: Config) -> OfflineEngine:
        engine = build_swappable_engine(resolve_host(config, this_host()))
        return cls(engine.core, engine.close)

    def close(self) -> None:
        """End the other ranks, if there are any."""
        if self._close is not None:
            self._close()

    @property
    def info(self) -> EngineInfo:
        return self.core.info

    def steps(self, requests: Iterable[Request]) -> Iterator[list[EngineMessage]]:
        """Submit all requests, then step until idle; yields the events of each step."""
        for request in requests:
            self.core.add(Submit(request))
        while self.core.has_work():
            yield self.core.step()

    def generate(self, requests: Iterable[Request]) -> dict[str, Completion]:
        """Run all requests together; completions by request id."""
        requests = list(requests)
        completions = {request.request_id: Completion() for request in requests}
        for events in self.steps(requests):
            for event in events:
                if isinstance(event, Tokens | Finished):
                    completions[event.request_id].take(event)
        return completions
