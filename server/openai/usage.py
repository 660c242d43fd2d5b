"""What a reply has cost: counts over all its choices, each of which has ended."""

from __future__ import annotations

from collections.abc import Sequence

from engine.messages import Finished
from server.openai.bodies import (
    CompletionTokensDetails,
    PromptTokensDetails,
    SpeculationStats,
    Usage,
)
from server.openai.choice import Choice
from server.openai.convert import Prompt


def count_tokens(prompts: Sequence[Prompt], choices: Sequence[Choice]) -> Usage:
    """Tokens of all choices; each prompt counts once, however many choices it has."""
    num_prompt = sum(len(prompt.token_ids) for prompt in prompts)
    num_output = sum(choice.num_output for choice in choices)
    per_prompt = len(choices) // len(prompts)
    ends = _ends(choices)
    num_drafted = sum(end.num_drafted for end in ends)
    num_accepted = sum(_accepted(choice) for choice in choices)
    return Usage(
        prompt_tokens=num_prompt,
        completion_tokens=num_output,
        total_tokens=num_prompt + num_output,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=_cached(ends, per_prompt)),
        completion_tokens_details=CompletionTokensDetails(
            accepted_prediction_tokens=num_accepted,
            rejected_prediction_tokens=num_drafted - num_accepted,
        ),
    )


def count_drafts(choices: Sequence[Choice]) -> SpeculationStats:
    """What became of the drafts of all choices."""
    ends = _ends(choices)
    num_drafts = sum(end.num_drafts for end in ends)
    num_accepted = sum(end.num_accepted for end in ends)
    return SpeculationStats(
        drafted=sum(end.num_drafted for end in ends),
        accepted=num_accepted,
        acceptance_length=1 + num_accepted / num_drafts if num_drafts else None,
    )


def _accepted(choice: Choice) -> int:
    """Drafted tokens that are in the completion. Where a stop string ended it, the engine has
    accepted more: of the tokens behind the end all but one, the last of its block, which the target
    drew itself. (Of blocks that came later still, too few are counted as drawn, so that the result
    may be too small, but no token counts that is not in the completion.)"""
    end = choice.finished
    assert end is not None
    num_behind = end.num_output - choice.num_output
    return max(0, min(end.num_accepted - max(0, num_behind - 1), choice.num_output))


def _cached(ends: Sequence[Finished], per_prompt: int) -> int:
    """Choices of one prompt find each other's prompt in the cache; the first one did not."""
    cached = [end.num_cached for end in ends]
    return sum(
        min(cached[begin : begin + per_prompt]) for begin in range(0, len(cached), per_prompt)
    )


def _ends(choices: Sequence[Choice]) -> list[Finished]:
    ends = [choice.finished for choice in choices if choice.finished is not None]
    assert len(ends) == len(choices)
    return ends
