"""Where a prediction goes on, and how much of it is drafted."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from engine.request import Sequence
from engine.speculation.lookup import PROBE_EVERY, Lookup
from engine.speculation.prediction import Prediction
from engine.step.plan import RowOutcome, StepOutcome
from engine.step.shape import ROOT
from server.assembly.drafting import Drafting
from tests.engine.speculation.test_lookup import CHEAP, decode
from tests.support.drafts.scripted_proposer import CyclingPlanner
from tests.support.engines.in_process import ask, generate
from tests.support.engines.tiny_engine import TinyEngine

EXPECTED = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19]


@pytest.mark.parametrize(
    ("output", "rest"),
    [
        ([], [10, 11, 12]),
        ([10, 11], [12, 13, 14]),
        ([10, 99], []),
        ([10, 99, 12], []),
        ([10, 99, 12, 13], [14, 15, 16]),  # one token is another
        ([10, 11, 12, 99, 98, 97, 13, 14], [15, 16, 17]),  # some were put in
        ([10, 11, 17, 18], [19]),  # some were left out
        ([50, 51, 10, 11], [12, 13, 14]),
        ([10, 11, 12, 13, 14, 99, 10, 11, 12, 13], [14, 15, 16]),  # an earlier part again
        (EXPECTED, []),
        ([*EXPECTED, 20], []),
    ],
)
def test_it_goes_on_where_the_answer_is(output: list[int], rest: list[int]) -> None:
    whole, stepwise = Prediction(EXPECTED), Prediction(EXPECTED)
    whole.follow([1, 2, *output], 2)
    for length in range(len(output) + 1):
        stepwise.follow([1, 2, *output[:length]], 2)
    assert whole.rest(3) == stepwise.rest(3) == rest


def predicting(output: list[int], expected: list[int] = EXPECTED) -> Sequence:
    request = msgspec.structs.replace(ask("a", [1, 2]), prediction=expected)
    seq = Sequence.from_request(request)
    seq.token_ids, seq.line = [1, 2, *output], 0
    return seq


def test_its_drafts_get_longer_if_they_are_accepted_and_end_if_not() -> None:
    believed, doubted = Lookup(), Lookup()
    expected = list(range(100, 200))
    seq = predicting(expected[:8], expected)
    first = believed.draft(seq, 63, CHEAP).tokens
    assert first == tuple(expected[8 : 8 + len(first)])
    for lookup, num_accepted in ((believed, 63), (doubted, 0)):
        for _ in range(PROBE_EVERY):
            draft = lookup.draft(seq, 63, CHEAP).tokens
            path = tuple(range(1, min(num_accepted, len(draft)) + 1))
            outcome = RowOutcome((1,) * (len(path) + 1), len(draft), path)
            lookup.observe(decode(draft, len(draft)), StepOutcome((outcome,)))
    assert believed.is_predicted(0)
    assert len(believed.draft(seq, 63, CHEAP).tokens) == 63 > len(first)
    assert len(doubted.draft(seq, 63, CHEAP).tokens) <= 1  # now and then one is tried


def test_where_it_does_not_go_on_the_text_itself_is_looked_up() -> None:
    lookup = Lookup()
    assert lookup.draft(predicting([5, 6, 7, 8, 5, 6]), 2, CHEAP).tokens == (7, 8)
    assert not lookup.is_predicted(0)
    lookup.forget(0)
    assert lookup.draft(predicting([10], [10, 77]), 2, CHEAP).tokens == (77,)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_text_is_the_same_in_fewer_steps(tiny_engine: TinyEngine, temperature: float) -> None:
    asked = ask("a", [5, 6, 7, 8], max_tokens=60, temperature=temperature, seed=4, ignore_eos=True)
    plain = tiny_engine.build()
    expected = generate(plain, [asked])["a"]
    changed = [*expected.token_ids[:20], 3, 4, *expected.token_ids[22:]]
    roots = Drafting(planner=CyclingPlanner((ROOT,)))
    for prediction, most_steps in ((expected.token_ids, 20), (changed, 26), ([3, 4] * 9, 61)):
        core = replace(tiny_engine, lookup=True, drafting=roots).build()
        heard = generate(core, [msgspec.structs.replace(asked, prediction=prediction)])["a"]
        assert heard.token_ids == expected.token_ids
        assert core.stats().num_steps <= most_steps < plain.stats().num_steps + 2
        end = heard.finished
        assert end is not None
        assert end.num_predicted_accepted <= end.num_predicted <= end.num_drafted
        assert (end.num_predicted_accepted > 30) is (prediction[0] != 3)
        assert sum(end.accepted_counts) == end.num_drafts
        accepted = sum(number * count for number, count in enumerate(end.accepted_counts))
        assert accepted == end.num_accepted
