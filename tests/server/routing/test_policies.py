"""Which engine a request goes to."""

from __future__ import annotations

import pytest

from engine.kv.manager import KVManager
from engine.request import Request, SamplingParams, Sequence
from server.routing.chain import prefix_chain
from server.routing.policies import PrefixAffinity, RoundRobin, Target

IDLE = {"a": 0.0, "b": 0.0, "c": 0.0}


def test_a_prompt_goes_where_most_of_it_was_computed() -> None:
    policy = PrefixAffinity[str]()
    policy.placed(Target((1, 2)), "b")
    policy.placed(Target((1, 2, 3)), "c")
    assert policy.choose(IDLE, Target((1, 2, 3, 4))) == "c"
    assert policy.choose(IDLE, Target((1, 2, 9))) in ("b", "c")
    assert policy.choose({"a": 0, "b": 3, "c": 0}, Target((1, 2, 9))) == "c"


def test_a_new_prompt_goes_to_the_least_load_then_to_the_emptiest_cache() -> None:
    policy = PrefixAffinity[str]()
    policy.placed(Target((1, 2)), "a")
    assert policy.choose({"a": 0, "b": 1, "c": 2}, Target((7,))) == "a"
    assert policy.choose({"a": 0, "b": 0, "c": 2}, Target((7,))) == "b"
    assert policy.choose(IDLE, Target()) in ("b", "c")


@pytest.mark.parametrize(
    ("loads", "chosen"),
    [
        ({"a": 0, "b": 0, "c": 0}, "a"),
        ({"a": 5, "b": 3, "c": 3}, "a"),  # 6 of 12: at most 6
        ({"a": 6, "b": 3, "c": 3}, "a"),  # 7 of 13: at most 7
        ({"a": 7, "b": 3, "c": 2}, "c"),  # 8 of 13 would be more
        ({"a": 1000, "b": 0, "c": 1}, "b"),
        ({"b": 0, "c": 1}, "b"),  # it has left
    ],
)
def test_an_engine_over_its_bound_is_passed_over(loads: dict[str, float], chosen: str) -> None:
    for target in (Target((1, 2)), Target(session="s")):
        policy = PrefixAffinity[str](bound=1.5)
        policy.placed(target, "a")
        assert policy.choose(loads, target) == chosen


def test_load_stays_within_the_bound_when_all_prompts_share_a_prefix() -> None:
    policy, loads = PrefixAffinity[int](bound=1.5), dict.fromkeys(range(8), 0.0)
    for number in range(400):
        target = Target(("system", number % 3, number))
        chosen = policy.choose(loads, target)
        policy.placed(target, chosen)
        loads[chosen] += 1
    assert max(loads.values()) <= 1.5 * sum(loads.values()) / len(loads) + 1


def test_a_session_moves_with_its_newest_request() -> None:
    policy = PrefixAffinity[str]()
    target = Target((1,), "s")
    policy.placed(target, "a")
    assert policy.choose({"a": 9, "b": 0, "c": 1}, target) == "b"
    policy.placed(target, "b")
    assert policy.choose(IDLE, Target((5, 6), "s")) == "b"


def test_blocks_are_forgotten_as_a_cache_evicts_them() -> None:
    policy = PrefixAffinity[str](num_blocks=4)
    policy.placed(Target((1, 2, 3)), "a")
    policy.placed(Target((7, 8)), "a")  # takes the place of 3, the end of the older prefix
    policy.placed(Target((3,)), "b")
    assert policy.choose(IDLE, Target((1, 2, 3))) == "b"
    policy.keep(["a", "c"])
    assert policy.choose(IDLE, Target((1, 2, 3))) == "a"


def test_round_robin_takes_turns() -> None:
    policy = RoundRobin[str]()
    assert [policy.choose(IDLE, Target((1,), "s")) for _ in range(6)] == list("bcabca")


@pytest.mark.parametrize("salt", ["", "client"])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33, 70])
def test_chains_are_the_hashes_of_the_prefix_cache(salt: str, length: int) -> None:
    request = Request(
        request_id="r",
        prompt_ids=list(range(length)),
        params=SamplingParams(max_tokens=1),
        cache_salt=salt,
    )
    seq = Sequence.from_request(request)
    manager = KVManager(16, 16, prefix_caching=True)
    manager.hash_prefix(seq, 100)
    manager.start(seq, length, match=True)
    seq.num_computed = length
    manager.publish(seq)
    known = [*seq.prompt_hashes, *seq.output_hashes][: (length - 1) // 16]
    assert list(prefix_chain(request.prompt_ids, salt, 16)) == known
