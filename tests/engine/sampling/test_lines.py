"""The sampling parameters of a line follow from its request."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from engine.request import SamplingParams
from engine.sampling.lines import (
    COLDEST,
    FOREVER,
    LineSettings,
    effective_temperature,
    is_penalised,
    token_counts,
)
from engine.step.plan import Admission
from tests.support.engines.in_process import ask
from tests.support.engines.plans import random_admission

VOCAB = 50
EOS = (2, 41)
NUM_LINES = 5
PADDING = {
    "seeds": 0,
    "top_k": VOCAB,
    "temperatures": 0,
    "top_p": 1,
    "min_p": 0,
    "repetition": 1,
    "frequency": 0,
    "presence": 0,
    "is_filtered": False,
    "is_penalised": False,
    "num_top": -1,
    "num_echo_top": -1,
}


def settings() -> LineSettings:
    return LineSettings(NUM_LINES, VOCAB, frozenset(EOS))


def admitted(num_prompt: int = 3, **params: object) -> LineSettings:
    """Settings in which line 1 has a sequence."""
    found = settings()
    found.admit(Admission(1, ask("a", [1] * num_prompt, **params)))
    return found


def values(line_settings: LineSettings, line: int) -> dict[str, object]:
    return {name: getattr(line_settings, name)[line].item() for name in PADDING}


def changes(line_settings: LineSettings, position: int) -> Counter[tuple[int, float]]:
    """Token and value of every entry that applies to a token drawn at `position`."""
    entries: Counter[tuple[int, float]] = Counter()
    for part in line_settings.bias(1, position):
        assert len(part) == len(part.ids) == len(part.values) == len(part.until)
        for token, value, until in zip(part.ids, part.values, part.until, strict=True):
            if position < until:
                entries[int(token), float(value)] += 1
    return entries


@pytest.mark.parametrize("seed", range(20))
def test_a_line_has_the_parameters_of_its_request(seed: int) -> None:
    rng, found = random.Random(seed), settings()
    for admission in (random_admission(1, rng, VOCAB), random_admission(3, rng, VOCAB)):
        found.admit(admission)
        params: SamplingParams = admission.request.params
        here = values(found, admission.line)
        assert here["seeds"] % 2**64 == params.seed  # type: ignore[operator]
        assert here["temperatures"] == pytest.approx(
            0 if params.temperature < 1e-5 else params.temperature
        )
        assert here["top_k"] == (min(params.top_k, VOCAB) if params.top_k else VOCAB)
        assert here["top_p"] == pytest.approx(params.top_p)
        assert here["min_p"] == pytest.approx(params.min_p)
        assert here["repetition"] == pytest.approx(params.repetition_penalty)
        assert here["frequency"] == pytest.approx(params.frequency_penalty)
        assert here["presence"] == pytest.approx(params.presence_penalty)
        assert here["num_top"] == (-1 if params.logprobs is None else params.logprobs)
        wanted = params.prompt_logprobs
        assert here["num_echo_top"] == (-1 if wanted is None else wanted)
        assert found.requests[admission.line] is admission.request
    assert values(found, NUM_LINES) == PADDING  # padding rows are greedy, without options


def test_a_line_that_passes_on_keeps_nothing() -> None:
    found = admitted(
        temperature=1.0,
        seed=2**64 - 1,
        top_k=3,
        top_p=0.5,
        min_p=0.1,
        repetition_penalty=2.0,
        frequency_penalty=1.0,
        presence_penalty=1.0,
        logit_bias={4: 1.0},
        min_tokens=9,
        logprobs=3,
        prompt_logprobs=2,
    )
    found.release(1)
    assert found.requests == {}
    found.admit(Admission(1, ask("b", [1], temperature=0.0)))
    assert values(found, 1) == PADDING
    assert found.bias(1, 2) == []


@pytest.mark.parametrize(
    ("params", "filtered"),
    [
        ({}, False),
        ({"top_k": 1}, True),
        ({"top_k": VOCAB - 1}, True),
        ({"top_k": VOCAB}, False),
        ({"top_k": 2 * VOCAB}, False),
        ({"top_p": 0.999}, True),
        ({"min_p": 0.001}, True),
        ({"top_k": 1, "top_p": 0.5, "min_p": 0.5, "temperature": 0.0}, False),
        ({"top_k": 1, "temperature": COLDEST / 2}, False),
    ],
    ids=str,
)
def test_a_line_is_filtered_where_it_is_sampled_from_a_part_of_the_vocabulary(
    params: dict[str, object], filtered: bool
) -> None:
    assert bool(admitted(**({"temperature": 1.0} | params)).is_filtered[1]) is filtered


@pytest.mark.parametrize(
    ("params", "penalised"),
    [
        ({}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"repetition_penalty": 0.9}, True),
        ({"frequency_penalty": -0.1}, True),
        ({"presence_penalty": 0.1}, True),
        ({"logit_bias": {3: 1.0}, "min_tokens": 4}, False),
    ],
    ids=str,
)
def test_any_penalty_makes_a_line_penalised(params: dict[str, object], penalised: bool) -> None:
    found = admitted(**params)
    assert bool(found.is_penalised[1]) is penalised
    assert is_penalised(found.requests[1].params) is penalised


@pytest.mark.parametrize(
    ("temperature", "effective"), [(0.0, 0.0), (COLDEST / 2, 0.0), (COLDEST, COLDEST), (2.0, 2.0)]
)
def test_temperatures_that_would_overflow_are_greedy(temperature: float, effective: float) -> None:
    assert effective_temperature(SamplingParams(max_tokens=1, temperature=temperature)) == effective


def test_the_bias_of_a_request_applies_at_every_position() -> None:
    found = admitted(logit_bias={4: 2.5, 9: -100.0})
    for position in (3, 4, 10**9):
        assert changes(found, position) == Counter({(4, 2.5): 1, (9, -100.0): 1})
    assert [part.until.tolist() for part in found.bias(1, 3)] == [[FOREVER, FOREVER]]


ENDS = [
    ({}, {*EOS}),
    ({"stop_token_ids": (7, 8)}, {*EOS, 7, 8}),
    ({"stop_token_ids": (7, EOS[0])}, {*EOS, 7}),
    ({"ignore_eos": True}, set()),
    ({"ignore_eos": True, "stop_token_ids": (7, EOS[0])}, {7, EOS[0]}),
]


@pytest.mark.parametrize("num_prompt", [1, 5])
@pytest.mark.parametrize("min_tokens", [0, 1, 4])
@pytest.mark.parametrize(("params", "ends"), ENDS, ids=str)
def test_endings_are_held_back_exactly_while_the_text_has_fewer_than_min_tokens(
    params: dict[str, object], ends: set[int], min_tokens: int, num_prompt: int
) -> None:
    found = admitted(num_prompt, min_tokens=min_tokens, **params)
    for position in range(num_prompt, num_prompt + 7):
        is_held = position - num_prompt < min_tokens  # output tokens before it
        wanted = {(token, -np.inf): 1 for token in ends} if is_held else {}
        assert changes(found, position) == Counter(wanted), position


@pytest.mark.parametrize("first", range(3, 9))
def test_a_list_that_begins_in_time_holds_back_at_every_later_position(first: int) -> None:
    """A step draws at several positions; a step ahead knows only the smallest of them."""
    found = admitted(3, min_tokens=4, logit_bias={EOS[0]: 5.0})
    lists = found.bias(1, first)
    for position in range(first, 12):
        entries = [
            (int(token), float(value))
            for part in lists
            for token, value, until in zip(part.ids, part.values, part.until, strict=True)
            if position < until
        ]
        held = [(token, -np.inf) for token in EOS] if position < 3 + 4 else []
        assert entries == [(EOS[0], 5.0), *held]


def test_lists_that_change_nothing_are_left_out() -> None:
    assert admitted().bias(1, 3) == []
    assert len(admitted(logit_bias={4: 1.0}, min_tokens=2).bias(1, 3)) == 2
    assert len(admitted(logit_bias={4: 1.0}, min_tokens=2).bias(1, 5)) == 1


@pytest.mark.parametrize("seed", range(10))
def test_counts_are_twice_the_output_and_one_for_the_prompt(seed: int) -> None:
    rng = random.Random(seed)
    prompt = rng.choices(range(VOCAB), k=rng.randrange(40))
    output = rng.choices(range(VOCAB), k=rng.choice([0, 5, 80]))
    counts = token_counts(prompt, output, VOCAB)
    assert counts.dtype == np.int32
    assert counts.tolist() == [2 * output.count(t) + (t in prompt) for t in range(VOCAB)]
