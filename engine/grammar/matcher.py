"""How far the text of one request has come in its grammar, and which tokens may come next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from engine.grammar.compiler import Mask, all_but, compute_mask, reason_of
from engine.request import SamplingParams

Masks = NDArray[np.int32]  # [n, W] a mask for each of n nodes
EVERYTHING = -1  # a word of a mask that allows all of its tokens


class Matcher:
    """Follows the output tokens of one request.

    Tokens that end the text are allowed where the text matches the grammar as a whole. Those that
    the request does not want yet (`min_tokens`) or at all (`ignore_eos`) are not, unless nothing
    else could follow.
    """

    def __init__(
        self,
        compiled: LLMatcher,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        params: SamplingParams,
    ) -> None:
        """`compiled`: at the start of a text. It is copied."""
        self._matcher = compiled.deep_copy()
        self._num_words = -(-vocab_size // 32)
        self._eos_token_ids = eos_token_ids
        self._ends = all_but(eos_token_ids, self._num_words)
        held = set(params.stop_token_ids) | set(() if params.ignore_eos else eos_token_ids)
        self._early = all_but(held, self._num_words) if params.min_tokens else None
        self._unwanted = self._ends if params.ignore_eos else None
        self._min_tokens = params.min_tokens
        self._num_taken = 0
        self._next: Mask | None = None  # tokens that may come next, if that is known
        self.complete = False  # nothing but the end may follow

    @property
    def error(self) -> str | None:
        """Why it cannot go on: a limit on the time for a mask. None while it can."""
        return reason_of(self._matcher.get_error()) if self._matcher.is_error() else None

    def take(self, tokens: Sequence[int]) -> int:
        """Go on by the next output tokens, up to the one that completes the text. Returns how many
        were taken: fewer than all if the text is complete or a token is not allowed."""
        for number, token in enumerate(tokens):
            if self.complete or not self._consume(token):
                return number
            self._num_taken += 1
            self._next = None
            self.complete = token in self._eos_token_ids or self._is_complete()
        return len(tokens)

    def forced(self) -> list[int]:
        """The tokens that most likely follow because their text must follow."""
        return [] if self.complete else list(self._matcher.compute_ff_tokens())

    def fill(self, tokens: Sequence[int], parents: Sequence[int], out: Masks) -> None:
        """Write the mask at each node of a draft tree: which tokens may follow the node.

        Args:
            tokens: of the nodes; that of the root, node 0, has been taken already.
            parents: of the nodes, each before its children.
            out: [nodes, W]; all tokens are allowed at nodes that cannot be reached, and after the
                end of the text.
        """
        out[1:] = EVERYTHING
        children: list[list[int]] = [[] for _ in parents]
        for node, parent in enumerate(parents[1:], 1):
            children[parent].append(node)
        self._root(out[0])
        self._descend(0, 0, tokens, children, out)

    def _descend(
        self,
        node: int,
        depth: int,
        tokens: Sequence[int],
        children: Sequence[Sequence[int]],
        out: Masks,
    ) -> None:
        for child in children[node]:
            token = tokens[child]
            if token in self._eos_token_ids or not allows(out[node], token):
                continue
            if self._consume(token):
                self._mask(out[child], depth + 1)
                self._descend(child, depth + 1, tokens, children, out)
                self._matcher.rollback(1)

    def _consume(self, token: int) -> bool:
        """Whether the token may follow. What follows a token that ends the text does not matter;
        llguidance does not count it as one that can be taken back."""
        return token in self._eos_token_ids or self._matcher.consume_token(token)

    def _root(self, out: Mask) -> None:
        if self._next is None:
            self._next = np.empty(self._num_words, np.int32)
            self._mask(self._next, 0)
        out[:] = self._next

    def _mask(self, out: Mask, depth: int) -> None:
        """The tokens that may follow `depth` drafted ones, the matcher being there."""
        compute_mask(self._matcher, out)
        if self._early is not None and self._num_taken + depth < self._min_tokens:
            _narrow(out, self._early)
        if self._unwanted is not None:
            _narrow(out, self._unwanted)

    def _is_complete(self) -> bool:
        if self._matcher.is_stopped() or not self._matcher.is_accepting():
            return self._matcher.is_stopped() and not self._matcher.is_error()
        out = np.empty(self._num_words, np.int32)
        compute_mask(self._matcher, out)
        return not (out & self._ends).any()


def allows(mask: Mask, token: int) -> bool:
    return bool(mask[token >> 5] >> (token & 31) & 1)


def _narrow(mask: Mask, wanted: Mask) -> None:
    """Keep only wanted tokens, if there are any."""
    kept = mask & wanted
    if kept.any():
        mask[:] = kept
