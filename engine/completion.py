"""Collects the events of one request."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.messages import Finished, TokenLogprob, Tokens


@dataclass(slots=True)
class Completion:
    """The whole output of one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    pooled: bytes | None = None
    finished: Finished | None = None

    def take(self, event: Tokens | Finished) -> None:
        """Add one event of this request."""
        assert self.finished is None
        if isinstance(event, Finished):
            self.finished = event
            return
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs or []
        self.prompt_logprobs += event.prompt_logprobs or []
        self.pooled = event.pooled or self.pooled
