"""Which chains are drafted from a text, and what is learnt from their acceptance."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.request import Sequence
from engine.speculation.lookup import (
    LENGTHS,
    MAX_DRAFT,
    NOTHING,
    PROBE_EVERY,
    Lookup,
    TokenText,
    tree_name,
)
from engine.step.plan import RowOutcome, StepOutcome, StepPlan
from engine.step.shape import chain
from tests.support.engines.in_process import ask
from tests.support.engines.plans import decoding

REPEATING = [5, 6, 7, 8, 9, 5, 6, 7]
CHEAP, DEAR = 0.05, 0.3  # prices of a node


def sequence(token_ids: list[int], **params: object) -> Sequence:
    seq = Sequence.from_request(ask("a", token_ids, **params))
    seq.own_tokens()
    seq.line = 0
    return seq


def decode(draft: tuple[int, ...], num_draft: int, line: int = 0) -> StepPlan:
    row = decoding(line, num_draft, draft)
    return StepPlan(rows=(row,), shape=chain(3))


def teach(lookup: Lookup, seq: Sequence, num_accepted: int, times: int = 100) -> None:
    """Accept up to `num_accepted` tokens of each draft for `seq`."""
    for _ in range(times):
        draft = lookup.draft(seq, 4, CHEAP).tokens
        if not draft:
            return
        accepted = min(num_accepted, len(draft))
        result = RowOutcome((1,) * (accepted + 1), len(draft), tuple(range(1, accepted + 1)))
        lookup.observe(decode(draft, len(draft)), StepOutcome((result,)))


def test_what_followed_before_is_drafted() -> None:
    assert Lookup().draft(sequence(REPEATING), 3, CHEAP).tokens == (8, 9, 5)


def test_a_text_without_repetition_has_no_draft() -> None:
    assert Lookup().draft(sequence([1, 2, 3, 4]), 3, CHEAP) == NOTHING


@pytest.mark.parametrize("most", [0, 1, 2])
def test_a_draft_is_never_longer_than_it_may_be(most: int) -> None:
    assert len(Lookup().draft(sequence(REPEATING), most, CHEAP).tokens) == most


def test_drafts_that_are_accepted_get_longer_and_others_end() -> None:
    seq = sequence([5, 6] * 20)
    believed, doubted = Lookup(), Lookup()
    first = believed.draft(seq, MAX_DRAFT, DEAR).tokens
    teach(believed, seq, num_accepted=MAX_DRAFT)
    teach(doubted, seq, num_accepted=0)
    assert len(believed.draft(seq, MAX_DRAFT, DEAR).tokens) == MAX_DRAFT > len(first)
    assert doubted.draft(seq, MAX_DRAFT, DEAR) == NOTHING


def test_a_bad_spell_is_not_the_end() -> None:
    seq, lookup = sequence([5, 6] * 20), Lookup()
    teach(lookup, seq, num_accepted=0)
    tried = [lookup.draft(seq, MAX_DRAFT, DEAR) for _ in range(PROBE_EVERY)]
    assert [len(tokens) for tokens, _ in tried if tokens] == [1]
    assert max(promise for _, promise in tried) == math.inf
    for _ in range(20 * PROBE_EVERY):
        teach(lookup, seq, num_accepted=MAX_DRAFT, times=1)
    assert len(lookup.draft(seq, 4, DEAR).tokens) == 4


def test_nothing_is_tried_unless_it_may_be() -> None:
    seq, lookup = sequence([5, 6] * 20), Lookup()
    teach(lookup, seq, num_accepted=0)
    for price, may_try in ((DEAR, False), (1.0, True)):
        for _ in range(2 * PROBE_EVERY):
            assert lookup.draft(seq, MAX_DRAFT, price, may_try=may_try) == NOTHING


def test_greedy_and_sampled_requests_learn_separately() -> None:
    lookup = Lookup()
    teach(lookup, sequence(REPEATING, temperature=1.0), num_accepted=0)
    assert lookup.draft(sequence(REPEATING, temperature=1.0), 3, CHEAP) == NOTHING
    assert lookup.draft(sequence(REPEATING, temperature=0.0), 3, CHEAP) != NOTHING


def test_the_head_drafts_where_it_promises_more() -> None:
    seq = sequence(REPEATING)
    assert Lookup().draft(seq, 3, CHEAP, rival=1.5) == NOTHING
    assert Lookup().draft(seq, 3, CHEAP, rival=0.5) != NOTHING
    assert Lookup().draft(seq, 3, CHEAP, rival=-0.5) != NOTHING  # growing a tree takes time, too


def test_an_ended_text_is_forgotten() -> None:
    lookup = Lookup()
    lookup.draft(sequence(REPEATING), 3, CHEAP)
    lookup.forget(0)
    assert lookup.draft(sequence([1, 2, 3]), 3, CHEAP) == NOTHING


def test_nodes_that_cost_as_much_as_a_token_are_not_worth_it() -> None:
    assert Lookup().draft(sequence(REPEATING), 3, 0.9) == NOTHING


def test_steps_are_counted_as_what_drafted() -> None:
    assert tree_name(decode((), 0)) == "root"
    assert tree_name(decode((), 2)) == "chain3"
    assert tree_name(decode((5,), 1)) == "lookup"


# Ids whose bytes repeat, so that matches begin inside tokens, too.
TOKENS = st.lists(st.sampled_from([0, 1, 256, 0x01010101, 0x00010001, 7]), max_size=40)


def text_of(token_ids: list[int]) -> TokenText:
    text = TokenText()
    text.follow(token_ids)
    return text


def brute_force(token_ids: list[int]) -> tuple[int, int]:
    found = (0, 0)
    for length in LENGTHS:
        ends = range(len(token_ids) - 1, length - 1, -1)
        places = [end for end in ends if token_ids[end - length : end] == token_ids[-length:]]
        if not places:
            break
        found = (length, places[0])
    return found


@given(TOKENS)
def test_the_longest_and_newest_match_is_found(token_ids: list[int]) -> None:
    assert text_of(token_ids).longest_match() == brute_force(token_ids)


@given(TOKENS, st.integers(0, 40))
def test_a_text_may_come_in_parts(token_ids: list[int], cut: int) -> None:
    text = text_of(token_ids[:cut])
    text.follow(token_ids)
    assert len(text) == len(token_ids)
    assert text.longest_match() == brute_force(token_ids)


@pytest.mark.parametrize(
    ("place", "count", "expected"),
    [(1, 3, [2, 3, 4]), (3, 2, [4, 5]), (3, 5, [4, 5, 4, 5, 4]), (4, 3, [5, 5, 5])],
)
def test_a_draft_beyond_the_end_repeats_itself(place: int, count: int, expected: list[int]) -> None:
    assert text_of([1, 2, 3, 4, 5]).continued(place, count) == expected
