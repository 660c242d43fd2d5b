"""The sampling parameters of running sequences, as host arrays indexed by line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.request import Pooling, Request, SamplingParams
from engine.step.plan import Admission

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

COLDEST = 1e-5  # temperatures below it count as greedy: dividing by them would overflow float32
FOREVER = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class BiasList:
    """Values to add to logits of tokens, each until a position; see `BiasEntries`."""

    ids: Ints  # [m]
    values: Floats  # [m]
    until: Ints  # [m]

    def __len__(self) -> int:
        return len(self.ids)


NO_BIAS = BiasList(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.int64))


class LineSettings:
    """The sampling parameters of each line. Padding rows use the last line, which is greedy and
    has no options."""

    def __init__(self, num_lines: int, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self.requests: dict[int, Request] = {}
        self.num_changes = 0  # of lines
        self._bias: dict[int, BiasList] = {}  # `logit_bias`
        self._held: dict[int, BiasList] = {}  # end tokens that are forbidden until `min_tokens`

        def each(value: float, dtype: Any) -> NDArray[Any]:
            return np.full(num_lines + 1, value, dtype=dtype)

        self.ints = np.zeros((2, num_lines + 1), dtype=np.int64)
        # The bits of the unsigned seed; the vocabulary size when off
        self.seeds, self.top_k = self.ints
        self.floats = np.zeros((6, num_lines + 1), dtype=np.float32)
        self.temperatures, self.min_p, self.frequency, self.presence = self.floats[:4]  # 0 when off
        self.top_p, self.repetition = self.floats[4:]  # 1 when off
        self.top_k[:] = vocab_size
        self.floats[4:] = 1
        self.is_filtered = each(False, np.bool_)  # sampled with top-k, top-p or min-p
        self.is_penalised = each(False, np.bool_)
        self.is_masked = each(False, np.bool_)
        self.num_top = each(-1, np.int64)  # alternatives to report with log-probabilities; -1: none
        self.num_echo_top = each(-1, np.int64)  # the same for prompt tokens
        self.named: dict[int, tuple[int, ...]] = {}  # `logprob_token_ids`
        self.pooling: dict[int, Pooling] = {}  # lines whose final hidden states are wanted

    def admit(self, admission: Admission) -> None:
        """Give a sequence its line."""
        line, request = admission.line, admission.request
        params = request.params
        self.requests[line] = request
        self.num_changes += 1
        self._bias[line] = _logit_bias(params)
        self._held[line] = self._held_back(request)
        self.seeds[line] = np.array([params.seed], dtype=np.uint64).view(np.int64)[0]
        self.top_k[line] = min(params.top_k or self._vocab_size, self._vocab_size)
        self.temperatures[line] = effective_temperature(params)
        self.top_p[line] = params.top_p
        self.min_p[line] = params.min_p
        self.repetition[line] = params.repetition_penalty
        self.frequency[line] = params.frequency_penalty
        self.presence[line] = params.presence_penalty
        is_sampled = self.temperatures[line] > 0
        self.is_filtered[line] = is_sampled and (
            self.top_k[line] < self._vocab_size or params.top_p < 1 or params.min_p > 0
        )
        self.is_penalised[line] = is_penalised(params)
        self.is_masked[line] = params.is_masked
        self.num_top[line] = -1 if params.logprobs is None else params.logprobs
        self.num_echo_top[line] = -1 if params.prompt_logprobs is None else params.prompt_logprobs
        if params.logprobs is not None and params.logprob_token_ids:
            self.named[line] = params.logprob_token_ids
        if params.pooling is not None:
            self.pooling[line] = params.pooling

    def release(self, line: int) -> None:
        self.num_changes += 1
        del self.requests[line], self._bias[line], self._held[line]
        self.named.pop(line, None)
        self.pooling.pop(line, None)

    def bias(self, line: int, next_position: int) -> list[BiasList]:
        """The bias lists for tokens drawn from `next_position` on. For a plan that runs ahead this
        is the smallest possible position."""
        held = self._held[line]
        is_held = len(held) > 0 and next_position < held.until[0]
        return [part for part in (self._bias[line], held if is_held else NO_BIAS) if len(part)]

    def _held_back(self, request: Request) -> BiasList:
        """Forbids the tokens that would end a text of fewer than `min_tokens` tokens. If it is
        masked, its masks do so where another token may follow."""
        params = request.params
        if params.min_tokens == 0 or params.is_masked:
            return NO_BIAS
        ends = () if params.ignore_eos else self._eos_token_ids
        ids = np.array(sorted({*params.stop_token_ids, *ends}), dtype=np.int64)
        until = len(request.prompt_ids) + params.min_tokens
        return BiasList(ids, np.full(len(ids), -np.inf, np.float32), np.full(len(ids), until))


def _logit_bias(params: SamplingParams) -> BiasList:
    if not params.logit_bias:
        return NO_BIAS
    ids = np.fromiter(params.logit_bias, np.int64, len(params.logit_bias))
    values = np.fromiter(params.logit_bias.values(), np.float32, len(ids))
    return BiasList(ids, values, np.full(len(ids), FOREVER))


def effective_temperature(params: SamplingParams) -> float:
    """0 (greedy) below COLDEST."""
    return params.temperature if params.temperature >= COLDEST else 0.0


def is_penalised(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def token_counts(
    prompt_ids: Sequence[int], output_ids: Sequence[int], vocab_size: int
) -> NDArray[np.int32]:
    """[V] twice the occurrences of each token in the output, plus 1 if the prompt has it: the
    encoding of `Penalties.counts`."""
    counts = 2 * np.bincount(np.array(output_ids, dtype=np.int64), minlength=vocab_size)
    counts[np.unique(np.array(prompt_ids, dtype=np.int64))] += 1
    return counts.astype(np.int32)
