"""What `Scheduler.schedule` costs the host while many requests wait.

Some rows decode and hold nearly all blocks; the others wait, first one whose long prompt is cached.
Prints the time of a call, which must not depend on the number that waits."""

from __future__ import annotations

import argparse
import statistics
import time

from engine.kv.manager import KVManager
from engine.request import Request, SamplingParams
from engine.scheduler.limits import SchedulerLimits
from engine.scheduler.scheduler import Scheduler
from engine.step.plan import RowOutcome, StepOutcome, StepPlan

BLOCK = 16
VOCAB = 1000


def request(name: str, prompt: list[int], max_tokens: int) -> Request:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(request_id=name, prompt_ids=prompt, params=params)


def answer(scheduler: Scheduler, plan: StepPlan) -> None:
    """Let every row that samples draw a token."""
    rows = tuple(RowOutcome((7,)) if row.samples else RowOutcome() for row in plan.rows)
    scheduler.update(plan, StepOutcome(rows))


def saturated(num_rows: int, num_waiting: int, prompt: int) -> Scheduler:
    """`num_rows` decoding rows, and `num_waiting` requests that lack blocks."""
    long = [n % VOCAB for n in range(prompt)]
    blocks = prompt // BLOCK + 2 * num_rows - 1  # one too few for the next one to start
    limits = SchedulerLimits(2 * num_rows, 512 + num_rows, prompt + 64)
    kv = KVManager(blocks, BLOCK, prefix_caching=True)
    scheduler = Scheduler(limits, kv, frozenset(), vocab_size=VOCAB)
    scheduler.submit(request("first", long, max_tokens=1))
    while scheduler.has_work():
        answer(scheduler, scheduler.schedule())
    for row in range(num_rows):
        scheduler.submit(request(f"row {row}", [row % VOCAB] * 16, max_tokens=1000))
    answer(scheduler, scheduler.schedule())
    for number in range(num_waiting):
        scheduler.submit(request(f"waiting {number}", long, max_tokens=16))
    return scheduler


def microseconds(scheduler: Scheduler, steps: int) -> list[float]:
    """Of each call of `schedule`."""
    found = []
    for _ in range(steps):
        started = time.perf_counter()
        plan = scheduler.schedule()
        found.append(1e6 * (time.perf_counter() - started))
        answer(scheduler, plan)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--waiting", type=int, nargs="+", default=[0, 100, 10_000])
    parser.add_argument("--prompt", type=int, default=120_000, help="tokens")
    parser.add_argument("--steps", type=int, default=40)
    chosen = parser.parse_args()
    for num_waiting in chosen.waiting:
        scheduler = saturated(chosen.rows, num_waiting, chosen.prompt)
        times = microseconds(scheduler, chosen.steps)
        stats = scheduler.stats()
        print(
            f"{stats.num_running:4} running, {stats.num_waiting:6} waiting: first call "
            f"{times[0]:8.0f} us, then median {statistics.median(times[1:]):6.0f} us, "
            f"at most {max(times[1:]):6.0f} us"
        )


if __name__ == "__main__":
    main()
