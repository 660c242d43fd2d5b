"""Searching a text for its newest tokens, against a search that compares everything."""

from __future__ import annotations

import pytest
from engine.speculation.ngrams import LENGTHS, TokenText
from hypothesis import given
from hypothesis import strategies as st

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
def test_what_follows_goes_on_with_its_own_repetition(
    place: int, count: int, expected: list[int]
) -> None:
    assert text_of([1, 2, 3, 4, 5]).continued(place, count) == expected
