"""Where the tokens of a choice came from, for clients that ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import msgspec
from msgspec import UNSET, UnsetType

from engine.messages import DraftSource, Round
from server.openai.reply.bodies import Origin, Trace, TracedNode, TracedRound, TracedToken
from server.openai.reply.choice import ChoiceDelta, OriginToken
from server.text.tokens.tokenizer import Tokenizer


class TraceWriter:
    """Collects the trace of one choice. Tokens come with their text, as log-probabilities do."""

    def __init__(self, tokenizer: Tokenizer, wanted: bool) -> None:
        self._tokenizer = tokenizer
        self._wanted = wanted
        self._tokens: list[TracedToken] = []
        self._rounds: list[TracedRound] = []

    def add(self, delta: ChoiceDelta) -> None:
        if self._wanted:
            self._tokens += [self._token(item) for item in delta.origins]
            self._rounds += [self._round(item) for item in delta.rounds]

    def take(self) -> Trace | UnsetType:
        """What was added since the last time."""
        if not (self._tokens or self._rounds):
            return UNSET
        trace = Trace(tokens=self._tokens, rounds=self._rounds)
        self._tokens, self._rounds = [], []
        return cast(Trace, msgspec.Raw(msgspec.json.encode(trace)))

    def _token(self, item: OriginToken) -> TracedToken:
        return TracedToken(
            token=self._tokenizer.token_text(item.token_id),
            bytes=list(self._tokenizer.token_bytes(item.token_id)),
            origin=_origin(item.source),
            depth=item.depth,
        )

    def _round(self, item: Round) -> TracedRound:
        pairs = zip(item.nodes.tokens, item.nodes.parents, strict=True)
        text = self._tokenizer.token_text
        nodes: Sequence[TracedNode] = [
            TracedNode(token=text(token), parent=parent) for token, parent in pairs
        ]
        source = None if item.source is None else _origin(item.source)
        return TracedRound(source=source, nodes=nodes, accepted=item.path)


def _origin(source: DraftSource | None) -> Origin:
    return "bonus" if source is None else source.value
