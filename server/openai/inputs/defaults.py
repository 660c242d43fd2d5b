"""The model's own sampling parameters, for what a request leaves open."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from engine.request import SamplingParams
from server.openai.request.schema import SamplingFields
from server.text.generation_config import SamplingDefaults

LIMITS = ("max_tokens", "max_completion_tokens")  # by whichever names a route has them
Asked = TypeVar("Asked", bound=SamplingFields)


def with_model_defaults(body: Asked, defaults: SamplingDefaults) -> Asked:
    """`body` with the model's values where it has none. Not `max_new_tokens`: see `limited`."""
    missing = {
        name: value
        for name, value in defaults.named().items()
        if name != "max_new_tokens" and getattr(body, name) is None
    }
    return body.model_copy(update=missing) if missing else body


def limited(
    params: SamplingParams, body: SamplingFields, defaults: SamplingDefaults
) -> SamplingParams:
    """`params` with at most the model's `max_new_tokens`, if the request has no limit itself."""
    most = defaults.max_new_tokens
    if most is None or any(getattr(body, name, None) is not None for name in LIMITS):
        return params
    most = min(params.max_tokens, max(most, params.min_tokens))
    return msgspec.structs.replace(params, max_tokens=most)
