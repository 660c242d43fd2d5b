"""The benchmark of the scheduler under load."""

from __future__ import annotations

from benchmarks.scheduling import microseconds, saturated


def test_rows_decode_while_all_others_wait() -> None:
    scheduler = saturated(num_rows=3, num_waiting=5, prompt=256)
    assert len(microseconds(scheduler, steps=4)) == 4
    stats = scheduler.stats()
    assert (stats.num_running, stats.num_waiting) == (3, 5)
    assert stats.num_preemptions == 0
    scheduler.audit()
