"""Requests that can never run."""

from __future__ import annotations

from engine.messages import ErrorCode
from engine.request import Request


def why_impossible(request: Request, max_len: int, vocab_size: int) -> tuple[str, ErrorCode] | None:
    """Why this request can never run, even alone; None if it can. `max_len`: positions of a
    sequence."""
    num_prompt = len(request.prompt_ids)
    if num_prompt == 0:
        return "the prompt is empty", ErrorCode.INVALID
    if num_prompt + min(request.params.max_tokens, 1) > max_len:
        return (
            f"This model's maximum context length is {max_len} tokens, but the prompt "
            f"has {num_prompt} tokens and at least one more is to be generated",
            ErrorCode.CONTEXT_LENGTH,
        )
    unknown = _unknown_id(request, vocab_size)
    return None if unknown is None else (unknown, ErrorCode.INVALID)


def _unknown_id(request: Request, vocab_size: int) -> str | None:
    """An error for a token id outside the vocabulary: it would fail a whole step."""
    params = request.params
    for name, ids in (
        ("prompt_ids", request.prompt_ids),
        ("logit_bias", params.logit_bias),
        ("stop_token_ids", params.stop_token_ids),
        ("prediction", request.prediction),
    ):
        for token_id in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= token_id < vocab_size:
                return f"{name} has token id {token_id}; ids end at {vocab_size - 1}"
    return None
