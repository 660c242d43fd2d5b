"""The end of a sequence."""

from __future__ import annotations

from dataclasses import dataclass

from engine.messages import ErrorCode, Finished
from engine.request import FinishReason, Sequence


@dataclass(frozen=True, slots=True)
class End:
    """Why a sequence ends."""

    reason: FinishReason
    error: str | None = None
    code: ErrorCode | None = None


def finished_event(seq: Sequence, end: End) -> Finished:
    """What a client is told of a sequence that has ended."""
    return Finished(
        request_id=seq.request_id,
        reason=end.reason,
        num_prompt=seq.num_prompt,
        num_output=seq.num_output,
        num_cached=seq.num_cached,
        num_preemptions=seq.num_preemptions,
        num_drafts=seq.num_drafts,
        num_drafted=seq.num_drafted,
        num_accepted=seq.num_accepted,
        num_predicted=seq.num_predicted,
        num_predicted_accepted=seq.num_predicted_accepted,
        most_drafted=seq.most_drafted,
        accepted_counts=tuple(seq.accepted_counts),
        first_scheduled_time=seq.first_scheduled_time,
        first_token_time=seq.first_token_time,
        error=end.error,
        error_code=end.code,
    )
