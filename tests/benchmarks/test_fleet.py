"""The simulation of many engines."""

from __future__ import annotations

import pytest

from benchmarks.cases.fleet_model import (
    BLOCK,
    Asked,
    Engine,
    EngineLimits,
    StepTimes,
    Traffic,
    on_lines,
)
from benchmarks.fleet import MEASURED, fleet_of, measured_times, summary

TIMES = StepTimes([(1, 0.005), (64, 0.006)], [(0, 0.0), (512, 0.02)])
TALK = Traffic(num_systems=4, pause=1.0)


@pytest.mark.parametrize(
    ("at", "value"), [(0, 0), (1, 1), (2, 3), (3, 5), (5, 5), (7, 5), (-1, -1)]
)
def test_lines_go_on_beyond_their_points(at: int, value: float) -> None:
    assert on_lines([(0, 0.0), (1, 1.0), (3, 5.0), (5, 5.0)], at) == value


def test_an_engine_computes_prompts_beside_its_rows_and_finds_what_it_has_computed() -> None:
    engine = Engine(EngineLimits(max_rows=2, max_tokens=512, cache_tokens=4096), TIMES)
    asked = [Asked(0.0, i, 0, tuple(range(6)), 6 * BLOCK, num_output=3) for i in range(3)]
    engine.waiting.extend(asked)
    clock, steps = 0.0, []
    while seconds := engine.begin():
        clock += seconds
        steps.append(seconds)
        for ended in engine.finish(clock):
            assert ended.end == clock
    # 512 tokens of the first; its last 256 and the second's 64 that are not cached yet; and so on.
    assert [one.cached for one in asked] == [0, 0, 5 * BLOCK]
    assert [one.first < one.end for one in asked] == [True] * 3
    assert asked[0].end < asked[2].first  # there are two rows
    assert steps[0] == pytest.approx(0.025)
    assert steps[-1] == pytest.approx(0.005)


def test_without_load_times_are_those_of_single_steps() -> None:
    found = fleet_of(2, "prefix", TIMES, TALK, 0.5, 0).run(20, 60)
    firsts = [one.first - one.arrival for one in found]
    assert min(firsts) >= 0.005
    assert summary(found, 60, ttft=0.2, ttit=0.01)["good"] == 1.0


def test_affinity_finds_more_in_caches_and_carries_more() -> None:
    times = measured_times(MEASURED)
    found = {
        routing: summary(
            fleet_of(8, routing, times, TALK, 8 * 28, 1).run(6, 6), 6, ttft=1.0, ttit=0.05
        )
        for routing in ("prefix", "round_robin")
    }
    prefix, turns = found["prefix"], found["round_robin"]
    assert prefix["cached"] > 0.8 > 0.7 > turns["cached"]
    assert prefix["ttft_p99"] < turns["ttft_p99"]


def test_overload_is_seen() -> None:
    found = summary(
        fleet_of(1, "round_robin", TIMES, TALK, 100, 0).run(5, 5), 5, ttft=1.0, ttit=0.05
    )
    assert found["goodput"] < 50
    assert found["ttft_p99"] is None or found["ttft_p99"] > 1000
