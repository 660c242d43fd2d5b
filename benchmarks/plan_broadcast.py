"""What telling a step plan to the followers costs rank 0: python -m benchmarks.plan_broadcast

Plans of 64 decoding rows with a chain of three drafts, as the scheduler makes them: every row has
one token, and now and then a new block. Followers are processes that read and decode; none of them
runs a model.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import msgspec

from engine.parallel.channel import Broadcast, Channel
from engine.parallel.frames import Order, PlanFrame, Stop
from engine.parallel.plan_codec import PlanDecoder, PlanEncoder
from engine.request import Request, SamplingParams
from engine.scheduler.plan import Admission, RowPlan, StepPlan
from engine.spec.shape import chain

BLOCK = 16
CONTEXT = 1024  # tokens of each row before the first plan


def plans(num_rows: int, num_steps: int) -> Iterator[StepPlan]:
    """The admission of all rows, then decode steps."""
    params = SamplingParams(max_tokens=1 << 20)
    names = [f"cmpl-{number:032x}" for number in range(num_rows)]
    requests = [Request(request_id=name, prompt_ids=[1, 2, 3], params=params) for name in names]
    yield StepPlan(admitted=tuple(Admission(request, ()) for request in requests))
    for step in range(num_steps):
        start = CONTEXT + step
        blocks = list(range((start + 4) // BLOCK + 1))
        yield StepPlan(
            tuple(
                RowPlan(name, start, [7], list(blocks), samples=True, num_draft=3) for name in names
            ),
            shape=chain(3),
        )


def follow(handle: int) -> None:
    """What a follower does besides running the model."""
    channel, plan_decoder = Channel(socket.socket(fileno=handle)), PlanDecoder()
    decoder = msgspec.msgpack.Decoder(Order)
    while (frame := channel.receive()) is not None:
        order = decoder.decode(frame)
        if isinstance(order, PlanFrame):
            plan_decoder.decode(order)


def followers(count: int, stack: ExitStack) -> Broadcast:
    """Processes that end with the stack."""
    channels = []
    for _ in range(count):
        own, theirs = socket.socketpair()
        command = [sys.executable, "-m", "benchmarks.plan_broadcast", "--follow"]
        with theirs:
            process = subprocess.Popen([*command, str(theirs.fileno())], pass_fds=[theirs.fileno()])
        stack.callback(process.wait)
        stack.callback(own.close)
        channels.append(Channel(own))
    return Broadcast(channels)


def measure(num_rows: int, num_followers: int, num_steps: int) -> None:
    encoder, plan_decoder = PlanEncoder(BLOCK), PlanDecoder()
    decoder = msgspec.msgpack.Decoder(Order)
    times: dict[str, list[float]] = {"encode": [], "encode and send": [], "decode": []}
    with ExitStack() as stack:
        broadcast = followers(num_followers, stack)
        stack.callback(broadcast.send, msgspec.msgpack.encode(Stop()))
        for plan in plans(num_rows, num_steps):
            started = time.perf_counter()
            frame = encoder.encode(plan)
            encoded = time.perf_counter()
            broadcast.send(frame)
            sent = time.perf_counter()
            order = decoder.decode(frame)
            assert isinstance(order, PlanFrame)
            assert plan_decoder.decode(order) == plan
            times["encode"].append(encoded - started)
            times["encode and send"].append(sent - started)
            started = time.perf_counter()
            decoder.decode(frame)
            times["decode"].append(time.perf_counter() - started)
            time.sleep(0.002)  # the step itself: followers catch up
    print(f"{num_rows} rows, {num_followers} followers, {len(frame)} bytes a plan")
    for name, seconds in times.items():
        show(name, [1e6 * value for value in seconds[10:]])


def show(name: str, microseconds: list[float]) -> None:
    cuts = statistics.quantiles(microseconds, n=20)
    print(
        f"  {name:16} median {statistics.median(microseconds):6.1f} us, "
        f"5 % to 95 %: {cuts[0]:.1f} to {cuts[-1]:.1f} us"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--followers", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--follow", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.follow is not None:
        follow(chosen.follow)
        return
    measure(chosen.rows, chosen.followers, chosen.steps)


if __name__ == "__main__":
    main()
