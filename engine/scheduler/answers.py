"""What the outcome of a row gives to its sequence and to the client."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.kv.manager import KVManager
from engine.messages import ErrorCode, Round, TokenLogprob, Tokens
from engine.request import FinishReason, Sequence
from engine.scheduler.cutting import TextEnds
from engine.scheduler.ending import End
from engine.scheduler.pooling import Pools
from engine.step.plan import RowOutcome, RowPlan

GRAMMAR_FAILED = "the text cannot go on as its grammar says: "
UNSOUND_LOGITS = "the model's logits for the next token are NaN or infinite"


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of a sequence."""

    event: Tokens | None = None
    end: End | None = None  # None: it goes on
    failed: bool = False  # what its draft won does not count


class Answers:
    """Takes the outcomes of rows. Keeps what clients get with the first output token until then."""

    def __init__(self, kv: KVManager, ends: TextEnds, clock: Callable[[], float]) -> None:
        self._kv = kv
        self._ends = ends
        self._clock = clock
        self._prompt_scores: dict[str, list[TokenLogprob | None]] = {}
        self._pools = Pools()
        self.num_unsound = 0  # sequences that the model had no sound logits for

    def take(self, seq: Sequence, row: RowPlan, result: RowOutcome, trace: Round | None) -> Taken:
        """Account for a computed chunk and the tokens emitted after it. `trace`: how they came, for
        a client that asks."""
        kept, reason = self._ends.cut(seq, result.emitted)
        end = None if reason is None else End(reason)
        if result.unsound or self._ends.grammar_error(seq) is not None:
            return self._fail(seq, _tokens(seq, kept, result, trace), end)
        seq.num_computed += len(row.token_ids)
        self._take_prompt(seq, result)
        if not row.samples:
            self._kv.publish(seq)
            return Taken()
        seq.token_ids += kept
        seq.num_computed += max(len(kept) - 1, 0)  # accepted draft tokens have their KV already
        if kept and seq.first_token_time is None:
            seq.first_token_time = self._clock()
        self._kv.publish(seq)
        scores = self._prompt_scores.pop(seq.request_id, None)
        return Taken(_tokens(seq, kept, result, trace, scores, self._pools.take(seq)), end)

    def forget(self, seq: Sequence) -> None:
        """The sequence ended, or its prompt will be computed again."""
        self._prompt_scores.pop(seq.request_id, None)
        self._pools.forget(seq)

    def _take_prompt(self, seq: Sequence, result: RowOutcome) -> None:
        """Keep what a chunk of a prompt gave."""
        # A preempted sequence computes its prompt again, but clients get its scores only once.
        if result.prompt_logprobs is not None and seq.num_output == 0:
            self._prompt_scores.setdefault(seq.request_id, [None]).extend(result.prompt_logprobs)
        if result.pooled is not None:
            self._pools.add(seq, result.pooled)

    def _fail(self, seq: Sequence, event: Tokens, end: End | None) -> Taken:
        """End a sequence that the model has no sound logits for, or whose grammar cannot be
        followed any further. Tokens drawn before are sent; its blocks may hold NaN, too, so no
        other prompt may find them."""
        seq.token_ids += event.token_ids
        self._kv.forget(seq)
        error = self._ends.grammar_error(seq)
        self.num_unsound += error is None
        if end is None and error is not None:
            end = End(FinishReason.ERROR, GRAMMAR_FAILED + error, ErrorCode.INVALID)
        elif end is None:
            end = End(FinishReason.ERROR, UNSOUND_LOGITS, ErrorCode.UNSOUND)
        return Taken(event if event.token_ids else None, end, failed=True)


def _tokens(
    seq: Sequence,
    kept: list[int],
    result: RowOutcome,
    trace: Round | None,
    prompt_scores: list[TokenLogprob | None] | None = None,
    pooled: bytes | None = None,
) -> Tokens:
    """The event for what was emitted, up to the end of the text."""
    logprobs = None if result.logprobs is None else list(result.logprobs[: len(kept)])
    return Tokens(seq.request_id, kept, logprobs, prompt_scores, trace, pooled)
