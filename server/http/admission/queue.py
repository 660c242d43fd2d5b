"""Admission: bounds the requests that wait for their first token."""

from __future__ import annotations

from configs.schema import ServerConfig
from server.http.admission.state import ServerState
from server.http.engine_client import EngineClient
from server.http.errors import ApiError, invalid, rate_limited, unavailable
from server.http.monitoring.metrics import (
    CHOICES,
    DRAINING,
    ENGINE_NOT_READY,
    REQUESTS,
    TOKENS,
    Metrics,
)


class Admission:
    """Counts waiting requests, their sequences and their prompt tokens. The choices of a prompt
    share its tokens and belong to one request, so that many choices leave the queue open for
    others. A request may exceed these limits while no other waits, so that an idle server never
    refuses it; `max_choices` and the context length still bound it."""

    def __init__(
        self, limits: ServerConfig, client: EngineClient, state: ServerState, metrics: Metrics
    ) -> None:
        self._limits = limits
        self._client = client
        self._state = state
        self._metrics = metrics
        self.num_requests = 0  # admitted ones of which a sequence waits for its first token
        self.num_waiting = 0  # admitted sequences without a first token
        self.waiting_tokens = 0  # of the prompts of which no sequence has its first token

    def closed(self) -> ApiError | None:
        """A 503 that says why the server accepts no requests now; None when it does."""
        if self._state.draining:
            return self.draining()
        if self._client.info is None:
            return self.engine_not_ready()
        return None

    def draining(self) -> ApiError:
        """503: the server is shutting down."""
        return self._unavailable("The server is shutting down", DRAINING)

    def engine_not_ready(self) -> ApiError:
        """503: the engine is still loading, or has ended."""
        return self._unavailable("The engine is not ready yet", ENGINE_NOT_READY)

    def check_open(self) -> None:
        """ApiError 503 when the server accepts no requests now; counted as a rejection."""
        problem = self.closed()
        if problem is not None:
            assert problem.detail.code is not None
            self._metrics.reject(problem.detail.code)
            raise problem

    def admit(self, num_choices: int, setting: str = "max_choices") -> Ticket:
        """Reserve places for the sequences of one HTTP request, before it is tokenised. `setting`
        of `server` says how many they may be.

        Raises:
            ApiError: 503 when closed, 400 for too many, 429 when the queue is full.
        """
        self.check_open()
        largest: int = getattr(self._limits, setting)
        if num_choices > largest:
            raise invalid(
                f"n x prompts is {num_choices}: at most {largest} choices per request "
                f"(server.{setting})",
                "n",
            )
        self._check_full(num_choices)
        self.num_requests += 1
        self.num_waiting += num_choices
        return Ticket(self, num_choices)

    def _check_full(self, num_choices: int) -> None:
        limits = self._limits
        if self.num_requests + 1 > limits.max_queued_requests and self.num_requests:
            explanation = f"{self.num_requests} requests are waiting"
            raise self._full(REQUESTS, f"{explanation}, at most {limits.max_queued_requests}")
        if self.num_waiting + num_choices > limits.max_queued_choices and self.num_waiting:
            explanation = f"{self.num_waiting} choices are waiting and {num_choices} more are asked"
            raise self._full(CHOICES, f"{explanation}, at most {limits.max_queued_choices}")

    def _add_tokens(self, num_tokens: int) -> None:
        limit = self._limits.max_waiting_tokens
        if self.waiting_tokens and self.waiting_tokens + num_tokens > limit:
            raise self._full(
                TOKENS, f"{self.waiting_tokens} prompt tokens are waiting, at most {limit}"
            )
        self.waiting_tokens += num_tokens

    def _leave(self, num_choices: int, num_tokens: int, *, last: bool) -> None:
        self.num_requests -= last
        self.num_waiting -= num_choices
        self.waiting_tokens -= num_tokens
        assert min(self.num_requests, self.num_waiting, self.waiting_tokens) >= 0

    def _full(self, reason: str, explanation: str) -> ApiError:
        self._metrics.reject(reason)
        message = f"Rate limit reached: {explanation} may; try again later"
        return rate_limited(message, self._limits.retry_after)

    def _unavailable(self, message: str, code: str) -> ApiError:
        return unavailable(message, code, self._limits.retry_after)


class Ticket:
    """The places that one HTTP request holds in the queue."""

    def __init__(self, admission: Admission, num_choices: int) -> None:
        self._admission = admission
        self._num_waiting = num_choices
        self._per_prompt = num_choices
        self._waiting: set[int] = set()  # choices, once they are tokenised
        self._tokens: list[int] = []  # by prompt; 0 once one of its choices left

    def add_prompts(self, num_tokens: list[int], num_choices: int) -> None:
        """Add the tokens of each prompt, which has `num_choices` choices. ApiError 429 when too
        many are waiting."""
        assert len(num_tokens) * num_choices == self._num_waiting
        self._admission._add_tokens(sum(num_tokens))
        self._tokens, self._per_prompt = list(num_tokens), num_choices
        self._waiting = set(range(self._num_waiting))

    def leave(self, choice: int) -> None:
        """A choice got its first token, or ended without one. May be repeated."""
        if choice not in self._waiting:
            return
        self._waiting.remove(choice)
        prompt = choice // self._per_prompt  # computed now: its other choices find it in the cache
        found, self._tokens[prompt] = self._tokens[prompt], 0
        self._give_back(1, found)

    def release(self) -> None:
        """Release all places still held. May be repeated."""
        if self._num_waiting:
            self._give_back(self._num_waiting, sum(self._tokens))
        self._waiting, self._tokens = set(), []

    def _give_back(self, num_choices: int, num_tokens: int) -> None:
        self._num_waiting -= num_choices
        self._admission._leave(num_choices, num_tokens, last=self._num_waiting == 0)
