"""Token counts of a reply, over all its choices. Details need the end of all of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec

from engine.messages import Finished
from server.openai.inputs.convert import Prompt
from server.openai.reply.bodies import (
    CompletionTokensDetails,
    PromptTokensDetails,
    ReplyMetrics,
    SpeculationStats,
    SpeculativeDecoding,
    Usage,
)
from server.openai.reply.choice import Choice


def count_tokens(prompts: Sequence[Prompt], choices: Sequence[Choice]) -> Usage:
    """Tokens of all choices; a prompt counts once, however many choices it has."""
    per_prompt = len(choices) // len(prompts)
    ends = _ends(choices)
    predicted = any(choice.request.prediction for choice in choices)
    num_drafted = sum(end.num_predicted if predicted else end.num_drafted for end in ends)
    num_accepted = sum(_accepted(choice, predicted) for choice in choices)
    return msgspec.structs.replace(
        count_so_far(prompts, choices),
        prompt_tokens_details=PromptTokensDetails(cached_tokens=_cached(ends, per_prompt)),
        completion_tokens_details=CompletionTokensDetails(
            reasoning_tokens=sum(choice.num_reasoning for choice in choices),
            accepted_prediction_tokens=num_accepted,
            rejected_prediction_tokens=num_drafted - num_accepted,
        ),
    )


def count_so_far(prompts: Sequence[Prompt], choices: Sequence[Choice]) -> Usage:
    """Tokens of all choices up to now. Details are known only at the end."""
    num_prompt = sum(len(prompt.token_ids) for prompt in prompts)
    num_output = sum(choice.num_output for choice in choices)
    return Usage(
        prompt_tokens=num_prompt,
        completion_tokens=num_output,
        total_tokens=num_prompt + num_output,
    )


def count_drafts(choices: Sequence[Choice]) -> SpeculationStats:
    """Draft statistics of all choices."""
    ends = _ends(choices)
    num_drafts = sum(end.num_drafts for end in ends)
    num_accepted = sum(end.num_accepted for end in ends)
    return SpeculationStats(
        drafted=sum(end.num_drafted for end in ends),
        accepted=num_accepted,
        acceptance_length=1 + num_accepted / num_drafts if num_drafts else None,
    )


def draft_metrics(choices: Sequence[Choice]) -> ReplyMetrics | None:
    """Draft statistics of all choices in the form of vLLM; None if nothing was drafted."""
    ends = _ends(choices)
    num_steps = sum(end.num_drafts for end in ends)
    if not num_steps:
        return None
    num_drafted = sum(end.num_drafted for end in ends)
    num_accepted = sum(end.num_accepted for end in ends)
    counts = itertools.zip_longest(*(end.accepted_counts for end in ends), fillvalue=0)
    found = SpeculativeDecoding(
        mean_acceptance_length=1 + num_accepted / num_steps,
        draft_acceptance_rate=num_accepted / num_drafted,
        acceptance_histogram=list(map(sum, counts)),
        num_spec_steps=num_steps,
        num_accepted_draft_tokens=num_accepted,
        num_draft_tokens=num_drafted,
        num_spec_tokens=max(end.most_drafted for end in ends),
    )
    return ReplyMetrics(speculative_decoding=found)


def _accepted(choice: Choice, predicted: bool) -> int:
    """Drafted tokens that are in the completion; only those of the client's prediction, if it is
    `predicted`. After a stop string the engine may have emitted
    further tokens. All but one of them are subtracted as accepted drafts: the last token of a step
    is the target's own. If they came from several steps, this subtracts too many: the result may
    be too small, but it never counts a token that is not in the completion."""
    end = choice.finished
    assert end is not None
    num_behind = end.num_output - choice.num_output
    num_accepted = end.num_predicted_accepted if predicted else end.num_accepted
    return max(0, min(num_accepted - max(0, num_behind - 1), choice.num_output))


def _cached(ends: Sequence[Finished], per_prompt: int) -> int:
    """Cached prompt tokens. Choices of one prompt find each other's prompt in the prefix cache, so
    the smallest number of a prompt counts: that of its first choice."""
    cached = [end.num_cached for end in ends]
    return sum(
        min(cached[begin : begin + per_prompt]) for begin in range(0, len(cached), per_prompt)
    )


def _ends(choices: Sequence[Choice]) -> list[Finished]:
    ends = [choice.finished for choice in choices if choice.finished is not None]
    assert len(ends) == len(choices)
    return ends
