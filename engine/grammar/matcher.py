"""How far the text of one request has come in its grammar, and which tokens may come next."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from engine.grammar.compiler import Mask, all_but, compute_mask, reason_of
from engine.request import SamplingParams

Masks = NDArray[np.int32]  # [n, W] a mask for each of n nodes
MOST_SECONDS = 0.1  # of computing in one call
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
        self._compiled = compiled
        self._matcher = compiled.deep_copy()
        self._num_words = -(-vocab_size // 32)
        self._eos_token_ids = eos_token_ids
        self._ends = all_but(eos_token_ids, self._num_words)
        held = set(params.stop_token_ids) | set(() if params.ignore_eos else eos_token_ids)
        self._early = all_but(held, self._num_words) if params.min_tokens else None
        self._unwanted = self._ends if params.ignore_eos else None
        self._min_tokens = params.min_tokens
        self._taken: list[int] = []
        self._overdue = False  # a call took too long
        self._next: Mask | None = None  # tokens that the grammar allows next, if that is known
        # Tokens of the text that must follow, and how many of them have been taken. A long text is
        # tokenised once, not in each of its steps.
        self._must_follow: list[int] = []
        self._num_followed = 0
        self._looks_ahead = True
        self.complete = False  # nothing but the end may follow

    @property
    def error(self) -> str | None:
        """Why it cannot go on: a limit on the work for a token. None while it can."""
        if self._overdue:
            return f"a token took more than {MOST_SECONDS} s; the grammar is too ambiguous"
        return reason_of(self._matcher.get_error()) if self._matcher.is_error() else None

    def take(self, tokens: Sequence[int]) -> int:
        """Go on by the next output tokens, up to the one that completes the text. Returns how many
        were taken: fewer than all if the text is complete or a token is not allowed."""
        with self._timed():
            for number, token in enumerate(tokens):
                ends = token in self._eos_token_ids
                if number and (ends or not self._matcher.validate_tokens([token])):
                    self.complete = self._is_complete()  # else a token that follows shows it
                if self.complete or self._overdue or not self._consume(token):
                    return number
                self._taken.append(token)
                self._follow(token)
                self._next, self.complete = None, ends
            self.complete = self.complete or self._is_complete()
        return len(tokens)

    def forced(self, most: int) -> list[int]:
        """The tokens, at most so many, that most likely follow because their text must follow. They
        only save time, so they are not looked for again if that takes long."""
        if most < 1 or self.complete or self.error is not None:
            return []
        if self._num_followed == len(self._must_follow) and self._looks_ahead:
            if self._matcher.is_accepting():
                return []  # it may end here
            began = time.thread_time()
            self._must_follow, self._num_followed = self._matcher.compute_ff_tokens(), 0
            self._looks_ahead = time.thread_time() - began <= MOST_SECONDS
        return self._must_follow[self._num_followed : self._num_followed + most]

    def _follow(self, token: int) -> None:
        at, known = self._num_followed, self._must_follow
        if at < len(known) and known[at] == token:
            self._num_followed += 1
        else:
            self._must_follow, self._num_followed = [], 0

    def fill(self, tokens: Sequence[int], parents: Sequence[int], out: Masks) -> None:
        """Write the mask at each node of a draft tree: which tokens may follow the node.

        Args:
            tokens: of the nodes; that of the root, node 0, has been taken already.
            parents: of the nodes, each before its children.
            out: [nodes, W]; all tokens are allowed at nodes that cannot be reached, and after the
                end of the text.
        """
        out[:] = EVERYTHING
        if self._overdue:  # whatever is drawn is not taken
            return
        children: list[list[int]] = [[] for _ in parents]
        for node, parent in enumerate(parents[1:], 1):
            children[parent].append(node)
        with self._timed():
            self._root(out[0])
            if not self._matcher.is_error():
                self._descend(0, [], tokens, children, out)

    def _descend(
        self,
        node: int,
        path: list[int],
        tokens: Sequence[int],
        children: Sequence[Sequence[int]],
        out: Masks,
    ) -> None:
        """Write the masks below a node; `path`: the tokens from the root to it."""
        for child in children[node]:
            token = tokens[child]
            if token in self._eos_token_ids or not allows(out[node], token):
                continue
            if self._consume(token):
                self._mask(out[child], len(path) + 1)
                if self._matcher.is_error():  # only a text that takes this way ends in an error
                    out[child] = EVERYTHING
                    self._rebuild(path)
                    continue
                self._descend(child, [*path, token], tokens, children, out)
                self._matcher.rollback(1)

    def _rebuild(self, path: Sequence[int]) -> None:
        """Start anew after an error, and go to the node at the end of a path."""
        self._matcher = self._compiled.deep_copy()
        for token in (*self._taken, *path):
            self._matcher.consume_token(token)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Work for one request delays all others, so there must not be much of it."""
        began = time.thread_time()
        yield
        self._overdue |= time.thread_time() - began > MOST_SECONDS

    def _consume(self, token: int) -> bool:
        """Whether the token may follow. What follows a token that ends the text does not matter;
        llguidance does not count it as one that can be taken back."""
        if token in self._eos_token_ids:  # after an error they are all that llguidance allows
            return not self._matcher.is_error()
        return self._matcher.consume_token(token)

    def _root(self, out: Mask) -> None:
        if self._next is None:
            self._next = np.empty(self._num_words, np.int32)
            compute_mask(self._matcher, self._next)
        out[:] = self._next
        self._leave_wanted(out, 0)

    def _mask(self, out: Mask, depth: int) -> None:
        """The tokens that may follow `depth` drafted ones, the matcher being there."""
        compute_mask(self._matcher, out)
        self._leave_wanted(out, depth)

    def _leave_wanted(self, out: Mask, depth: int) -> None:
        if self._early is not None and len(self._taken) + depth < self._min_tokens:
            narrow(out, self._early)
        if self._unwanted is not None:
            narrow(out, self._unwanted)

    def _is_complete(self) -> bool:
        if self._matcher.is_stopped() or not self._matcher.is_accepting():
            return self._matcher.is_stopped() and not self._matcher.is_error()
        self._next = np.empty(self._num_words, np.int32)  # the next step needs it, too
        compute_mask(self._matcher, self._next)
        return not (self._next & self._ends).any()


def allows(mask: Mask, token: int) -> bool:
    return bool(mask[token >> 5] >> (token & 31) & 1)


def narrow(mask: Mask, wanted: Mask) -> None:
    """Keep only wanted tokens, if there are any."""
    kept = mask & wanted
    if kept.any():
        mask[:] = kept
