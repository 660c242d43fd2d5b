"""Requests that may be what kills the engine: one that was running at two deaths in a row is
refused afterwards."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable

import msgspec

from engine.request import Request

MOST = 1024  # refused hashes, the newest

logger = logging.getLogger(__name__)


class Suspects:
    """Remembers requests by a hash of what the engine computes from: the prompt, the parameters
    without the seed, and whose request it is, so that no client can have another's refused."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`seconds` for which a request is refused; 0: never."""
        self._seconds = seconds
        self._clock = clock
        self._last: set[str] = set()  # those that were running at the last death
        self._refused: dict[str, float] = {}  # hash -> time of its second death, the oldest first

    def engine_died(self, running: Iterable[Request]) -> None:
        """The engine has died while these requests were running."""
        if not self._seconds:
            return
        found: dict[str, str] = {}
        for request in running:
            found.setdefault(hash_of(request), request.request_id)
        for name, request_id in found.items():
            if name in self._last:
                self._refuse(name, request_id)
        self._last = set(found)

    def refusal(self, request: Request) -> str | None:
        """Why the request is not run; None if it may run. Hashes nothing while none is refused."""
        now = self._clock()
        while self._refused:
            oldest = next(iter(self._refused))
            if now - self._refused[oldest] < self._seconds:
                break
            del self._refused[oldest]
        if not self._refused or (name := hash_of(request)) not in self._refused:
            return None
        left = self._refused[name] + self._seconds - now
        return (
            "a request like this one was running both times when the engine stopped unexpectedly: "
            f"it is refused for {left:.0f} s more (hash {name})"
        )

    def _refuse(self, name: str, request_id: str) -> None:
        self._refused.pop(name, None)
        self._refused[name] = self._clock()
        if len(self._refused) > MOST:
            del self._refused[next(iter(self._refused))]
        logger.error(
            "request %s was running at two deaths of the engine in a row: requests like it (hash "
            "%s) are refused for %.0f s (server.refuse_suspects)",
            request_id,
            name,
            self._seconds,
        )


def hash_of(request: Request) -> str:
    """Equal for requests that make the engine compute the same, whatever their seeds are."""
    replace = msgspec.structs.replace
    plain = replace(
        request,
        request_id="",
        choice=0,
        priority=0,
        arrival_time=0.0,
        params=replace(request.params, seed=0),
    )
    return hashlib.blake2b(msgspec.msgpack.encode(plain), digest_size=8).hexdigest()
