"""Which tokens a request may have at all, and which sequences of tokens it may not; with its
grammar, if it has one."""

from __future__ import annotations

from collections.abc import Sequence

from engine.grammar.compiler import Mask, all_but
from engine.grammar.matcher import EVERYTHING, Masks, Matcher, narrow
from engine.request import SamplingParams


class RuledText:
    """Follows the output tokens of one request, as `Matcher` does. Where its rules would leave no
    token, the later of these gives way: the grammar, `allowed_token_ids`, the least length,
    `bad_words`."""

    def __init__(
        self, matcher: Matcher | None, eos_token_ids: frozenset[int], params: SamplingParams
    ) -> None:
        self._matcher = matcher
        self._params = params
        self._held = set(params.stop_token_ids)
        self._held |= set() if params.ignore_eos else eos_token_ids
        self._bad: dict[tuple[int, ...], list[int]] = {}  # after these tokens, not those
        for *before, last in params.bad_words:
            self._bad.setdefault(tuple(before), []).append(last)
        self._longest = max(map(len, self._bad), default=0)
        self._taken: list[int] = []
        self._allowed: Mask | None = None

    @property
    def complete(self) -> bool:
        return self._matcher is not None and self._matcher.complete

    @property
    def error(self) -> str | None:
        return None if self._matcher is None else self._matcher.error

    def take(self, tokens: Sequence[int]) -> int:
        """As `Matcher.take`."""
        count = len(tokens) if self._matcher is None else self._matcher.take(tokens)
        self._taken += tokens[:count]
        return count

    def forced(self, most: int) -> list[int]:
        """As `Matcher.forced`."""
        return [] if self._matcher is None else self._matcher.forced(most)

    def fill(self, tokens: Sequence[int], parents: Sequence[int], out: Masks) -> None:
        """As `Matcher.fill`."""
        if self._matcher is None:
            out[:] = EVERYTHING
        else:
            self._matcher.fill(tokens, parents, out)
        paths: list[list[int]] = [self._taken[-self._longest :] if self._longest else []]
        for node, parent in enumerate(parents):
            if node:
                paths.append([*paths[max(parent, 0)], tokens[node]])
            self._narrow(
                out[node], paths[node], len(self._taken) + len(paths[node]) - len(paths[0])
            )

    def _narrow(self, mask: Mask, path: Sequence[int], num_output: int) -> None:
        """Take away what the rules forbid after `num_output` tokens, of which `path` are last."""
        if self._params.allowed_token_ids:
            narrow(mask, self._allowed_mask(len(mask)))
        if self._matcher is None and num_output < self._params.min_tokens:
            narrow(mask, all_but(self._held, len(mask)))
        bad = [
            token
            for before, lasts in self._bad.items()
            if len(path) >= len(before) and tuple(path[len(path) - len(before) :]) == before
            for token in lasts
        ]
        if bad:
            narrow(mask, all_but(bad, len(mask)))

    def _allowed_mask(self, num_words: int) -> Mask:
        if self._allowed is None:
            self._allowed = ~all_but(self._params.allowed_token_ids, num_words)
        return self._allowed
