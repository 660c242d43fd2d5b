"""What the span of a request tells of its generation."""

from __future__ import annotations

import time
from collections.abc import Sequence

from engine.messages import Finished
from engine.request import SamplingParams
from server.http.monitoring.tracing import RequestSpan, Value
from server.openai.reply.choice import Choice

CHAT, COMPLETION, EMBEDDINGS = "chat", "text_completion", "embeddings"
LARGEST = 2**63 - 1  # integer of an attribute


def describe_generation(
    span: RequestSpan, id: str, model: str, num_prompts: int, choices: Sequence[Choice]
) -> None:
    """Add the attributes of all choices; times are those from the arrival of the request to the
    first step, to the first token, and so on, of the choice that had to wait longest."""
    request = choices[0].request
    operation = _operation(id, request.params)
    ended = [choice.finished for choice in choices if choice.finished is not None]
    attributes = _asked(request.params, len(choices) // num_prompts)
    attributes |= _got(choices, ended) | _times(request.arrival_time, ended)
    attributes |= {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "aerie",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": id,
    }
    span.describe(f"{operation} {model}", attributes)
    first = [each.first_token_time for each in ended if each.first_token_time is not None]
    if first:
        span.mark("first token", min(first))


def _operation(id: str, params: SamplingParams) -> str:
    if params.pooling is not None:
        return EMBEDDINGS
    return COMPLETION if id.startswith("cmpl") else CHAT


def _asked(params: SamplingParams, num_choices: int) -> dict[str, Value | None]:
    return {
        "gen_ai.request.choice.count": num_choices if num_choices > 1 else None,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k or None,
        "gen_ai.request.seed": params.seed if params.seed <= LARGEST else None,
        "gen_ai.request.frequency_penalty": params.frequency_penalty or None,
        "gen_ai.request.presence_penalty": params.presence_penalty or None,
    }


def _got(choices: Sequence[Choice], ended: Sequence[Finished]) -> dict[str, Value | None]:
    prompts = {id(choice.request.prompt_ids): choice.request.prompt_ids for choice in choices}
    return {
        "gen_ai.usage.input_tokens": sum(map(len, prompts.values())),
        "gen_ai.usage.output_tokens": sum(choice.num_output for choice in choices),
        "gen_ai.usage.cache_read.input_tokens": max((e.num_cached for e in ended), default=0),
        "gen_ai.response.finish_reasons": [str(c.finish_reason or "abort") for c in choices],
        "aerie.draft.tokens": sum(each.num_drafted for each in ended),
        "aerie.draft.accepted_tokens": sum(each.num_accepted for each in ended),
        "aerie.preemptions": sum(each.num_preemptions for each in ended),
    }


def _times(arrival: float, ended: Sequence[Finished]) -> dict[str, Value | None]:
    """Seconds, for what a choice has reached."""
    now = time.time()
    found: dict[str, Value | None] = {"gen_ai.latency.e2e": max(now - arrival, 0.0)}
    reached = [each for each in ended if each.first_scheduled_time is not None]
    if not reached:
        return found
    slowest = max(reached, key=lambda each: each.first_scheduled_time or 0.0)
    scheduled, first = slowest.first_scheduled_time, slowest.first_token_time
    assert scheduled is not None
    found["gen_ai.latency.time_in_queue"] = max(scheduled - arrival, 0.0)
    if first is not None:
        found["gen_ai.latency.time_in_model_prefill"] = max(first - scheduled, 0.0)
        found["gen_ai.latency.time_to_first_token"] = max(first - arrival, 0.0)
        found["gen_ai.latency.time_in_model_decode"] = max(now - first, 0.0)
    return found
