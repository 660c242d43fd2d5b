"""Where a text ends among the tokens that a step emitted."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.request import FinishReason, Sequence

if TYPE_CHECKING:
    from engine.grammar.grammars import Follower, Grammars


def cut_emitted(
    seq: Sequence, emitted: Rows[int], eos_token_ids: frozenset[int], max_len: int
) -> tuple[list[int], FinishReason | None]:
    """The emitted tokens up to the end of the sequence, and why it ends (None: it continues).

    A token that ends the text (EOS, stop token) is kept, because it was generated and is billed;
    the front end leaves it out of the text.
    """
    params = seq.request.params
    kept: list[int] = []
    for token in emitted:
        if seq.num_output + len(kept) >= params.max_tokens:  # only max_tokens = 0 gets here
            return kept, FinishReason.LENGTH if params.pooling is None else FinishReason.STOP
        kept.append(token)
        num_output = seq.num_output + len(kept)
        ends = token in params.stop_token_ids or (token in eos_token_ids and not params.ignore_eos)
        if ends and num_output > params.min_tokens:
            return kept, FinishReason.STOP
        if num_output >= params.max_tokens or len(seq.token_ids) + len(kept) >= max_len:
            return kept, FinishReason.LENGTH
    return kept, None


@dataclass(frozen=True, slots=True)
class TextEnds:
    """Where texts end: by their stop tokens and lengths, or by their grammars."""

    eos_token_ids: frozenset[int]
    max_len: int  # positions of one sequence
    grammars: Grammars | None

    def cut(self, seq: Sequence, emitted: Rows[int]) -> tuple[list[int], FinishReason | None]:
        """As `cut_emitted`; a text also ends where its grammar is complete."""
        matcher = self._matcher(seq)
        if matcher is not None:
            emitted = emitted[: matcher.take(emitted)]
        kept, reason = cut_emitted(seq, emitted, self.eos_token_ids, self.max_len)
        if matcher is not None and matcher.complete and len(kept) == len(emitted):
            return kept, FinishReason.STOP
        return kept, reason

    def grammar_error(self, seq: Sequence) -> str | None:
        """Why the text of a sequence cannot go on as its grammar says."""
        matcher = self._matcher(seq)
        return None if matcher is None else matcher.error

    def _matcher(self, seq: Sequence) -> Follower | None:
        return None if self.grammars is None else self.grammars.of_line(seq.line)
