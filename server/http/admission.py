"""Admission: bounds the requests that wait for their first token."""

from __future__ import annotations

from configs.schema import ServerConfig
from server.http.engine_client import EngineClient
from server.http.errors import ApiError, invalid, rate_limited, unavailable
from server.http.metrics import DRAINING, ENGINE_NOT_READY, REQUESTS, TOKENS, Metrics
from server.http.state import ServerState


class Admission:
    """Counts waiting sequences and their prompt tokens. A request may exceed these limits while no
    other waits, so that an idle server never refuses it; `max_choices` and the context length
    still bound it."""

    def __init__(
        self, limits: ServerConfig, client: EngineClient, state: ServerState, metrics: Metrics
    ) -> None:
        self._limits = limits
        self._client = client
        self._state = state
        self._metrics = metrics
        self._num_waiting = 0
        self._waiting_tokens = 0

    @property
    def num_waiting(self) -> int:
        """Admitted sequences without a first token."""
        return self._num_waiting

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of the waiting sequences."""
        return self._waiting_tokens

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

    def admit(self, num_choices: int) -> Ticket:
        """Reserve places for the sequences of one HTTP request, before it is tokenised.

        Raises:
            ApiError: 503 when closed, 400 above `max_choices`, 429 when the queue is full.
        """
        self.check_open()
        largest = self._limits.max_choices
        if num_choices > largest:
            raise invalid(
                f"n x prompts is {num_choices}: at most {largest} choices per request "
                "(server.max_choices)",
                "n",
            )
        limit = self._limits.max_queued_requests
        if self._num_waiting and self._num_waiting + num_choices > limit:
            raise self._full(REQUESTS, f"{self._num_waiting} requests are waiting, at most {limit}")
        self._num_waiting += num_choices
        return Ticket(self, num_choices)

    def _add_tokens(self, num_tokens: int) -> None:
        limit = self._limits.max_waiting_tokens
        if self._waiting_tokens and self._waiting_tokens + num_tokens > limit:
            raise self._full(
                TOKENS, f"{self._waiting_tokens} prompt tokens are waiting, at most {limit}"
            )
        self._waiting_tokens += num_tokens

    def _leave(self, num_choices: int, num_tokens: int) -> None:
        self._num_waiting -= num_choices
        self._waiting_tokens -= num_tokens
        assert self._num_waiting >= 0
        assert self._waiting_tokens >= 0

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
        self._unnamed = num_choices  # places of sequences not tokenised yet
        self._tokens: dict[int, int] = {}  # choice -> its prompt tokens, while it waits

    def add_prompts(self, num_tokens: list[int]) -> None:
        """Add the prompt tokens of each choice. ApiError 429 when too many are waiting."""
        assert len(num_tokens) == self._unnamed
        self._admission._add_tokens(sum(num_tokens))
        self._tokens = dict(enumerate(num_tokens))
        self._unnamed = 0

    def leave(self, choice: int) -> None:
        """A choice got its first token, or ended without one. May be repeated."""
        num_tokens = self._tokens.pop(choice, None)
        if num_tokens is not None:
            self._admission._leave(1, num_tokens)

    def release(self) -> None:
        """Release all places still held. May be repeated."""
        self._admission._leave(self._unnamed + len(self._tokens), sum(self._tokens.values()))
        self._unnamed = 0
        self._tokens = {}
