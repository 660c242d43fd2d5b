"""Rank 0's cost of sending a step plan to followers: python -m benchmarks.plan_broadcast

Plans have 64 decoding rows with a chain of three drafts, as the scheduler makes them: every row has
one token and now and then a new block. Followers are processes that receive and decode; they run no
model. Two ways are compared: one send per follower over a socket pair (the earlier design), and the
board in shared memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from benchmarks.measuring.machine import facts
from engine.parallel.orders import Order, RunStep
from engine.parallel.transport import Board, Broadcast, Channel, Inbox
from engine.request import Request, SamplingParams
from engine.step.plan import Admission, RowPlan, StepPlan
from engine.step.shape import chain

BLOCK_SIZE = 16
CONTEXT = 1024  # tokens of each row before the first plan
SOCKETS, BOARD = "sockets", "board"
WARM_UP = 10  # plans that are not counted


def plans(num_rows: int, num_steps: int) -> Iterator[StepPlan]:
    """The admission of all rows, then decode steps."""
    params = SamplingParams(max_tokens=1 << 20)
    requests = [
        Request(request_id=f"cmpl-{line:032x}", prompt_ids=[1, 2, 3], params=params)
        for line in range(num_rows)
    ]
    yield StepPlan(admitted=tuple(itertools.starmap(Admission, enumerate(requests))))
    num_known = 0  # blocks sent with earlier plans
    for start in range(CONTEXT, CONTEXT + num_steps):
        num_blocks = (start + 4) // BLOCK_SIZE + 1
        yield StepPlan(
            rows=tuple(
                RowPlan(
                    line=line,
                    start=start,
                    token_ids=(7,),
                    first_block=num_known,
                    new_blocks=tuple(range(num_known, num_blocks)),
                    samples=True,
                    num_draft=3,
                )
                for line in range(num_rows)
            ),
            shape=chain(3),
        )
        num_known = num_blocks


def follow(way: str, step: float, number: int, end: int, memory: int, wake: int) -> None:
    """Run a follower; its part of a step sleeps for `step` seconds."""
    channel = Channel(socket.socket(fileno=end))
    inbox = Inbox(channel, Board(memory, wake), number)
    receive = inbox.receive if way == BOARD else channel.receive
    decoder = msgspec.msgpack.Decoder(Order)
    while (frame := receive()) is not None:
        decoder.decode(frame)
        time.sleep(step)


@contextmanager
def followers(way: str, count: int, step: float) -> Iterator[Callable[[bytes], None]]:
    """Gives a function that sends a frame to all followers; they end with the context."""
    with ExitStack() as stack:
        board, channels = Board.create(count), []
        for number in range(count):
            own, theirs = socket.socketpair()
            handles = [theirs.fileno(), board.memory, board.wake_handle]
            command = [sys.executable, "-m", "benchmarks.plan_broadcast", "--follow", way]
            rest = map(str, [step, number, *handles])
            with theirs:
                process = subprocess.Popen([*command, *rest], pass_fds=handles)
            stack.callback(process.wait)
            channels.append(Channel(own))
        broadcast = Broadcast(channels, board)
        stack.callback(broadcast.close)

        def one_by_one(frame: bytes) -> None:
            for channel in channels:
                channel.send(frame)

        yield broadcast.send if way == BOARD else one_by_one


def measure(
    way: str, num_followers: int, gap: float, chosen: argparse.Namespace
) -> dict[str, list[float]]:
    """Microseconds of every plan."""
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Order)
    times: dict[str, list[float]] = {"encode": [], "send": [], "encode and send": [], "decode": []}
    with followers(way, num_followers, chosen.step) as send:
        for plan in plans(chosen.rows, chosen.steps):
            started = time.perf_counter()
            frame = encoder.encode(RunStep(plan))
            encoded = time.perf_counter()
            send(frame)
            sent = time.perf_counter()
            order = decoder.decode(frame)
            times["decode"].append(time.perf_counter() - sent)
            assert order == RunStep(plan)
            times["encode"].append(encoded - started)
            times["send"].append(sent - encoded)
            times["encode and send"].append(sent - started)
            time.sleep(chosen.step + gap)
    return {name: [1e6 * value for value in found[WARM_UP:]] for name, found in times.items()}


def summary(microseconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(microseconds, n=20)
    found = {"median": statistics.median(microseconds), "low": cuts[0], "high": cuts[-1]}
    return {name: round(value, 1) for name, value in found.items()}


def compare(
    chosen: argparse.Namespace, num_followers: int, gap: float
) -> Iterator[dict[str, object]]:
    """Measure both ways in turns, so that a busy minute affects both."""
    found: dict[str, dict[str, list[float]]] = {SOCKETS: {}, BOARD: {}}
    for _ in range(chosen.rounds):
        for way, times in found.items():
            measured = measure(way, num_followers, gap, chosen)
            for name, values in measured.items():
                times.setdefault(name, []).extend(values)
    for way, times in found.items():
        row = {name: summary(values) for name, values in times.items()}
        print(
            f"{chosen.rows} rows, {num_followers} followers, {1000 * gap:g} ms between steps, {way}"
        )
        for name, cuts in row.items():
            print(
                f"  {name:16} median {cuts['median']:6.1f} us, "
                f"5 % to 95 %: {cuts['low']:.1f} to {cuts['high']:.1f} us"
            )
        yield {"way": way, "followers": num_followers, "gap": gap, "microseconds": row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--followers", type=int, nargs="+", default=[2, 7])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--step", type=float, default=0.002, help="seconds that a step takes")
    parser.add_argument(
        "--gaps",
        type=float,
        nargs="+",
        default=[0.0008, 0.01],
        help="seconds between steps: as long as scheduling takes; so long that followers sleep",
    )
    parser.add_argument("--output", type=Path, help="also write the result here")
    parser.add_argument("--note", default="", help="what else ran, for the result")
    parser.add_argument("--follow", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.follow is not None:
        way, step, *numbers = chosen.follow
        follow(way, float(step), *map(int, numbers))
        return
    cases = itertools.product(chosen.followers, chosen.gaps)
    found = [row for count, gap in cases for row in compare(chosen, count, gap)]
    if chosen.output is not None:
        names = ("rows", "steps", "rounds", "step")
        settings = {name: getattr(chosen, name) for name in names}
        result = {"benchmark": "plan_broadcast", **facts(), "note": chosen.note, "plan": settings}
        text = json.dumps(result | {"rows": found}, indent=1)
        chosen.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
