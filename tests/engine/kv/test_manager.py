"""Blocks of sequences: prefix hits, growth, publishing, release."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kv.manager import ROOT, KVManager, chained_hash
from engine.request import Sequence
from tests.support.engines.in_process import ask

SIZE = 4


def sequence(name: str, token_ids: list[int]) -> Sequence:
    return Sequence.from_request(ask(name, token_ids))


def manager(num_blocks: int = 8, prefix_caching: bool = True) -> KVManager:
    return KVManager(num_blocks, SIZE, prefix_caching)


def computed(kv: KVManager, name: str, token_ids: list[int], num_computed: int) -> Sequence:
    """A sequence whose first `num_computed` tokens are computed."""
    seq = sequence(name, token_ids)
    assert kv.start(seq, len(token_ids), match=True) is not None
    seq.num_computed = num_computed
    kv.publish(seq)
    return seq


def chain(token_ids: list[int]) -> list[bytes]:
    """Contents of the full blocks of a sequence."""
    contents, parent = [], ROOT
    for start in range(0, len(token_ids) - SIZE + 1, SIZE):
        parent = chained_hash(parent, token_ids[start : start + SIZE])
        contents.append(parent)
    return contents


TOKENS = st.lists(st.integers(0, 2**32 - 1), min_size=3 * SIZE, max_size=3 * SIZE)


@settings(deadline=None, derandomize=True)
@given(TOKENS, st.integers(0, 3 * SIZE - 1), st.integers(1, 2**32 - 1))
def test_a_changed_token_changes_its_block_and_all_after_and_none_before(
    token_ids: list[int], place: int, change: int
) -> None:
    changed = list(token_ids)
    changed[place] = (changed[place] + change) % 2**32
    differs = [a != b for a, b in zip(chain(token_ids), chain(changed), strict=True)]
    assert differs == [index >= place // SIZE for index in range(3)]


def test_tokens_do_not_run_into_each_other_in_the_hash() -> None:
    assert chained_hash(ROOT, [1, 0]) != chained_hash(ROOT, [0, 1])
    assert chained_hash(ROOT, [256]) != chained_hash(ROOT, [1, 0])
    assert len({chained_hash(parent, [7]) for parent in (ROOT, b"a" * 16, b"b" * 16)}) == 3


@pytest.mark.parametrize(
    ("salts", "cached"),
    [(("", ""), 8), (("a", "a"), 8), (("a", "b"), 0), (("", "a"), 0), (("a", ""), 0)],
)
def test_only_requests_with_the_same_salt_find_a_prefix(
    salts: tuple[str, str], cached: int
) -> None:
    kv = manager()
    first, second = (
        Sequence.from_request(msgspec.structs.replace(ask("a", list(range(9))), cache_salt=salt))
        for salt in salts
    )
    kv.start(first, 9, match=True)
    first.num_computed = 9
    kv.publish(first)
    assert kv.start(second, 9, match=True) == cached


def test_choices_hash_their_prompt_once_and_their_texts_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashed: list[list[int]] = []

    def counting(parent: bytes, token_ids: list[int]) -> bytes:
        hashed.append(token_ids)
        return chained_hash(parent, token_ids)

    monkeypatch.setattr("engine.kv.manager.chained_hash", counting)
    kv, shared = manager(num_blocks=32), []
    choices = [sequence(name, list(range(10))) for name in "abc"]
    for text, seq in enumerate(choices):
        seq.prompt_hashes = shared
        seq.own_tokens()
        seq.token_ids += [100 + text] * 6
        assert kv.start(seq, 16, match=True) == (8 if text else 0)
        seq.num_computed = 16
        kv.publish(seq)
    assert [len(tokens) for tokens in hashed] == [4] * (2 + 3 * 2)
    assert len(shared) == 2
    for seq in choices:
        kv.release(seq)
        assert kv.start(seq, 16, match=True) == 12
    assert len(hashed) == 8


@pytest.mark.parametrize(("slots", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_blocks_for_rounds_up(slots: int, blocks: int) -> None:
    assert manager().blocks_for(slots) == blocks


def test_capacity_and_usage() -> None:
    kv = manager(num_blocks=8)
    assert (kv.capacity, kv.usage) == (32, 0.0)
    seq = computed(kv, "a", list(range(9)), 9)
    assert kv.usage == 3 / 8
    kv.release(seq)
    assert kv.usage == 0.0


def test_start_reserves_the_slots_after_the_hit_but_none_after_the_last_token() -> None:
    kv = manager()
    kv.release(computed(kv, "a", list(range(10)), 10))
    seq = sequence("b", list(range(20)))
    assert kv.start(seq, 5, match=True) == 8
    assert len(seq.block_ids) == 4  # 8 cached + 5 asked for = 13 slots
    kv.release(seq)
    assert kv.start(seq, 500, match=True) == 8
    assert len(seq.block_ids) == 5  # 20 tokens


@pytest.mark.parametrize(("other", "cached"), [(0, 0), (3, 0), (4, 4), (7, 4), (8, 8), (11, 8)])
def test_a_hit_ends_with_the_block_before_the_first_other_token(other: int, cached: int) -> None:
    kv = manager()
    kv.release(computed(kv, "a", list(range(12)), 12))
    token_ids = list(range(13))
    token_ids[other] = 99
    assert kv.start(sequence("b", token_ids), 13, match=True) == cached


def test_equal_tokens_after_another_prefix_are_no_hit() -> None:
    kv = manager()
    kv.release(computed(kv, "a", [1] * SIZE + [2] * SIZE, 8))
    assert kv.start(sequence("b", [3] * SIZE + [2] * SIZE + [5]), 9, match=True) == 0


def test_only_computed_blocks_are_found() -> None:
    kv = manager()
    seq = computed(kv, "a", list(range(12)), 7)
    assert kv.start(sequence("b", list(range(12))), 12, match=True) == 4
    seq.num_computed = 12
    kv.publish(seq)
    assert kv.start(sequence("c", list(range(13))), 1, match=True) == 12


@pytest.mark.parametrize(("caching", "match"), [(False, True), (True, False)])
def test_nothing_is_looked_up_when_caching_is_off_or_not_wanted(caching: bool, match: bool) -> None:
    kv = manager(prefix_caching=caching)
    kv.release(computed(kv, "a", list(range(12)), 12))
    queries = kv.prefix_queries
    assert kv.start(sequence("b", list(range(12))), 12, match=match) == 0
    assert (kv.prefix_queries, kv.prefix_hits) == (queries, 0)


def test_start_leaves_the_spare_blocks_or_changes_nothing() -> None:
    kv = manager(num_blocks=4)
    seq = sequence("a", list(range(8)))
    assert kv.start(seq, 8, match=True, spare=3) is None
    assert (seq.block_ids, kv.usage, kv.prefix_queries) == ([], 0.0, 0)
    assert kv.start(seq, 8, match=True, spare=2) == 0
    assert kv.usage == 0.5


def test_cached_blocks_that_are_free_count_as_used_up() -> None:
    kv = manager(num_blocks=4)
    kv.release(computed(kv, "a", list(range(12)), 12))
    seq = sequence("b", list(range(13)))
    assert kv.start(seq, 13, match=True, spare=1) is None
    assert kv.start(seq, 13, match=True) == 12
    assert sorted(seq.block_ids) == [0, 1, 2, 3]


def test_shared_blocks_cost_nothing() -> None:
    kv = manager(num_blocks=4)
    first = computed(kv, "a", list(range(12)), 12)
    second = sequence("b", list(range(13)))
    assert kv.start(second, 13, match=True) == 12
    assert second.block_ids[:3] == first.block_ids
    kv.audit([first, second])
    kv.release(first)
    kv.audit([second])


def test_reserve_takes_all_blocks_or_none() -> None:
    kv = manager(num_blocks=4)
    seq = computed(kv, "a", list(range(5)), 5)
    assert kv.reserve(seq, 8)
    assert len(seq.block_ids) == 2
    assert not kv.reserve(seq, 17)
    assert len(seq.block_ids) == 2
    assert kv.reserve(seq, 16)
    kv.audit([seq])


def test_the_front_of_a_prefix_is_evicted_last() -> None:
    kv = manager(num_blocks=3)
    kv.release(computed(kv, "a", list(range(12)), 12))
    other = computed(kv, "b", [50] * 4, 4)
    kv.release(other)
    assert kv.start(sequence("c", list(range(12))), 1, match=True) == 8


def test_release_leaves_lists_of_earlier_plans_alone() -> None:
    kv = manager()
    seq = computed(kv, "a", list(range(5)), 5)
    planned = seq.block_ids
    kv.release(seq)
    assert (planned, seq.block_ids) == ([0, 1], [])


def test_two_sequences_that_computed_the_same_tokens_both_continue() -> None:
    kv = manager()
    first = sequence("a", list(range(9)))
    second = sequence("b", list(range(9)))
    for seq in (first, second):  # neither finds the other's blocks
        assert kv.start(seq, 9, match=True) == 0
    for seq in (first, second):
        seq.num_computed = 8
        kv.publish(seq)
    kv.audit([first, second])
    kv.release(first)
    kv.release(second)
    kv.audit([])


def test_the_audit_sees_a_sequence_that_is_missing_from_its_list() -> None:
    kv = manager()
    first = computed(kv, "a", list(range(5)), 5)
    second = computed(kv, "b", list(range(50, 55)), 5)
    kv.audit([first, second])
    with pytest.raises(AssertionError, match="ref_count 1, held by 0"):
        kv.audit([first])
    second.block_ids.pop()
    with pytest.raises(AssertionError, match="ref_count 1, held by 0"):
        kv.audit([first, second])
