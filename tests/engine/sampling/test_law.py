"""Tokens drawn by the sampler follow the requested distribution (chi-square tests).

Seeds and positions are fixed, so a test either always passes or never does. The critical value
leaves one false alarm in a million.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

from engine.request import Request, SamplingParams
from kernels.ops import Ops
from tests.support.engines.told_target import Text, sample
from tests.support.extended import diagonal

LOGITS = [2.0, 1.5, 1.0, 0.7, 0.3, 0.0, -0.4, -1.0, -1.6, -2.5]
VOCAB = len(LOGITS)
EOS = 9
PROMPT = [1, 1, 4]
OUTPUT = [0, 0, 0, 4, 6]
NUM_DRAWS = 10_000
MILLIONTH = 4.753  # quantile of the standard normal distribution


def critical(freedom: int) -> float:
    """Chi-square value exceeded once in a million (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + MILLIONTH * math.sqrt(spread)) ** 3


def rows(params: SamplingParams, num: int, *, along: str) -> list[Text]:
    """`num` texts with the same history that differ in their seed or in their position."""
    request = Request(request_id="r", prompt_ids=PROMPT, params=params)
    if along == "positions":
        return [Text(request, OUTPUT, skipped=step) for step in range(num)]
    fields = {name: getattr(params, name) for name in params.__struct_fields__}
    return [
        Text(
            Request(request_id="r", prompt_ids=PROMPT, params=SamplingParams(**fields | change)),
            OUTPUT,
        )
        for change in ({"seed": params.seed + step} for step in range(num))
    ]


def sampling(**params: object) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 10**6} | params))  # type: ignore[arg-type]


def draw(ops: Ops, texts: list[Text], logits: list[float] = LOGITS) -> list[int]:
    return sample(ops, texts, torch.tensor(logits).repeat(len(texts), 1), eos=[EOS]).drawn


def edited_logits(params: SamplingParams) -> list[float]:
    """Logits after penalties and bias, one token at a time."""
    edited = []
    for token, value in enumerate(LOGITS):
        if token in PROMPT + OUTPUT:
            scale = params.repetition_penalty
            value = value / scale if value > 0 else value * scale
        count = OUTPUT.count(token)
        value -= count * params.frequency_penalty + (count > 0) * params.presence_penalty
        edited.append(value + params.logit_bias.get(token, 0.0))
    return edited


def exact_law(params: SamplingParams) -> dict[int, float]:
    """Probability of every token that can be drawn."""
    scaled = [value / params.temperature for value in edited_logits(params)]
    order = sorted(range(VOCAB), key=lambda token: -scaled[token])[: params.top_k or VOCAB]
    weights = {token: math.exp(scaled[token] - scaled[order[0]]) for token in order}
    total, mass, law = sum(weights.values()), 0.0, {}
    for token in order:
        if mass >= params.top_p * total or weights[token] < params.min_p:
            break
        law[token] = weights[token]
        mass += weights[token]
    if len(OUTPUT) < params.min_tokens:
        law.pop(EOS, None)
    return {token: weight / sum(law.values()) for token, weight in law.items()}


def chi_square(counts: Iterable[tuple[int, float]]) -> float:
    """Chi-square over pairs of (seen, expected)."""
    return sum((seen - expected) ** 2 / expected for seen, expected in counts)


def assert_law(drawn: list[int], law: dict[int, float]) -> None:
    counts = Counter(drawn)
    assert counts.keys() <= law.keys(), "a token that must not be drawn"
    expected = {token: share * len(drawn) for token, share in law.items()}
    assert min(expected.values()) > 5, "too few draws for a chi-square test"
    if len(law) > 1:
        value = chi_square((counts[token], share) for token, share in expected.items())
        assert value < critical(len(law) - 1)


SETTINGS: list[dict[str, object]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 4},
    {"top_p": 0.3},
    {"top_p": 0.8, "temperature": 1.7},
    {"min_p": 0.2},
    {"top_k": 7, "top_p": 0.9, "min_p": 0.1, "temperature": 1.7},
    {"repetition_penalty": 1.4},
    {"frequency_penalty": 0.5},
    {"presence_penalty": -0.8},
    {"logit_bias": {9: 4.0, 0: -100.0, 3: -1.5}},
    {"min_tokens": 10**6},
    {
        "repetition_penalty": 0.8,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.3,
        "logit_bias": {8: 2.0},
        "temperature": 0.7,
        "top_k": 8,
        "top_p": 0.95,
    },
]


@pytest.mark.parametrize(("settings", "along"), diagonal(SETTINGS, ["seeds", "positions"]))
def test_draws_follow_the_law_that_was_asked_for(
    reference_ops: Ops, settings: dict[str, object], along: str
) -> None:
    params = sampling(seed=12345, **settings)
    law = exact_law(params)
    possible = {token: share for token, share in law.items() if share * NUM_DRAWS > 5}
    assert sum(possible.values()) > 0.999
    drawn = draw(reference_ops, rows(params, NUM_DRAWS, along=along))
    assert set(drawn) <= set(law)
    likely = [token for token in drawn if token in possible]
    total = sum(possible.values())
    assert_law(likely, {token: share / total for token, share in possible.items()})


def assert_independent(pairs: list[tuple[int, int]]) -> None:
    """Test on a two-way table of the likelier tokens."""
    likely = [pair for pair in pairs if max(pair) < 6]
    first, second = Counter(a for a, _ in likely), Counter(b for _, b in likely)
    table = Counter(likely)
    cells = [(a, b, first[a] * second[b] / len(likely)) for a in first for b in second]
    assert min(expected for *_, expected in cells) > 5
    value = chi_square((table[a, b], expected) for a, b, expected in cells)
    assert value < critical((len(first) - 1) * (len(second) - 1))


@pytest.mark.parametrize(
    ("distance", "seed"), diagonal([1, 2, 7], [0, 2**63, 2**64 - NUM_DRAWS - 8])
)
@pytest.mark.parametrize("along", ["seeds", "positions"])
def test_neighbours_are_independent(
    reference_ops: Ops, distance: int, along: str, seed: int
) -> None:
    drawn = draw(reference_ops, rows(sampling(seed=seed), NUM_DRAWS + distance, along=along))
    assert_independent(list(zip(drawn[:-distance], drawn[distance:], strict=True)))


@pytest.mark.parametrize("shift", [1, 3])
def test_one_position_says_nothing_about_the_next_of_another_seed(
    reference_ops: Ops, shift: int
) -> None:
    """seed + n at position p and seed at p + n would be equal if the key were their sum."""
    params = sampling(seed=100)
    here = rows(params, NUM_DRAWS, along="seeds")
    there = [replace(text, skipped=shift) for text in here]
    drawn, later = draw(reference_ops, here), draw(reference_ops, there)
    assert_independent(list(zip(drawn[shift:], later[:-shift], strict=True)))
    assert_independent(list(zip(drawn, later, strict=True)))


def test_the_noise_of_two_tokens_is_independent(reference_ops: Ops) -> None:
    """Whether 0 beats 1 says nothing about whether 2 beats 3."""
    params = sampling(seed=1)
    texts = rows(params, NUM_DRAWS, along="seeds")
    impossible = [-torch.inf] * VOCAB
    pairs = [
        draw(reference_ops, texts, [*impossible[:a], 0.0, 0.0, *impossible[a + 2 :]])
        for a in (0, 2)
    ]
    assert_independent(list(zip(*pairs, strict=True)))


def test_a_seed_and_a_position_give_one_token_whatever_the_batch(reference_ops: Ops) -> None:
    texts = rows(sampling(seed=5), 64, along="positions")
    together = draw(reference_ops, texts)
    assert [draw(reference_ops, [text])[0] for text in texts] == together
    assert draw(reference_ops, texts[::-1]) == together[::-1]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 0),
        ({"top_k": 3, "top_p": 0.5, "min_p": 0.5}, 0),
        ({"logit_bias": {8: 10.0}}, 8),
        ({"frequency_penalty": 1.0}, 1),
        ({"repetition_penalty": 3.0}, 2),
        ({"logit_bias": {EOS: 50.0}, "min_tokens": 10**6}, 0),
    ],
    ids=str,
)
def test_temperature_0_takes_the_best_token(
    reference_ops: Ops, settings: dict[str, object], expected: int
) -> None:
    params = sampling(temperature=0.0, **settings)
    edited = edited_logits(params)
    drawn = draw(reference_ops, rows(params, 3, along="seeds"))
    assert drawn == [expected] * 3
    if "min_tokens" not in settings:
        assert edited[expected] == max(edited)


def test_greedy_and_sampled_rows_share_a_batch(reference_ops: Ops) -> None:
    greedy = rows(sampling(temperature=0.0), 50, along="seeds")
    warm = rows(sampling(seed=3, top_k=6), 50, along="seeds")
    mixed = [text for pair in zip(greedy, warm, strict=True) for text in pair]
    drawn = draw(reference_ops, mixed)
    assert drawn[::2] == [0] * 50
    assert drawn[1::2] == draw(reference_ops, warm)


def test_equal_logits_give_the_lowest_token_when_greedy(reference_ops: Ops) -> None:
    assert draw(
        reference_ops, rows(sampling(temperature=0.0), 1, along="seeds"), [1.0] * VOCAB
    ) == [0]


def test_a_long_row_is_drawn_evenly(reference_ops: Ops) -> None:
    """20 000 equal logits, counted in 100 groups of neighbours."""
    vocab, groups = 20_000, Counter[int]()
    for seed in range(11, 1_011, 100):
        drawn = draw(reference_ops, rows(sampling(seed=seed), 100, along="seeds"), [0.0] * vocab)
        groups.update(token // 200 for token in drawn)
    assert_law(list(groups.elements()), dict.fromkeys(range(100), 0.01))
