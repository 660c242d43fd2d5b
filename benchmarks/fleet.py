"""How much traffic 1 to 1,000 engines carry, simulated from measured step times.

    python -m benchmarks.fleet --replicas 1,10,100

Both routings get the same conversations. A request is good if its first token comes within --ttft
and the others within --ttit each, on average.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.cases.fleet_model import (
    BLOCK,
    Asked,
    Engine,
    EngineLimits,
    Fleet,
    StepTimes,
    Traffic,
)
from benchmarks.measuring.machine import facts
from benchmarks.measuring.plots import plot_fleet
from benchmarks.tables import write_results
from server.routing.policies import PrefixAffinity, RoundRobin, Routing

MEASURED = Path(__file__).parent / "results" / "planning-h200-2026-11-27.json"
LIMITS = EngineLimits(max_rows=64, max_tokens=2048, cache_tokens=400_000)
ROUTINGS: tuple[Routing, ...] = ("prefix", "round_robin")


def measured_times(path: Path) -> StepTimes:
    """Step times of plain decoding and of prompts, from a file of measurements."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    decode = sorted(
        (row["batch"], row["measured"] / 1e3)
        for row in rows
        if row.get("tree") == "root" and row["run_ahead"]
    )
    alone = decode[0][1]  # is in every step
    chunks = sorted(
        (row["chunk"], row["chunk"] / row["measured"]) for row in rows if "chunk" in row
    )
    return StepTimes(decode, [(0, 0.0), *((size, seconds - alone) for size, seconds in chunks)])


def main(
    replicas: Annotated[str, typer.Option(help="Numbers of engines.")] = "1,10,100,1000",
    rates: Annotated[
        str, typer.Option(help="Offered requests per second and engine.")
    ] = "10,15,20,25,30,35,40,45",
    ttft: Annotated[float, typer.Option(help="Seconds to the first token.")] = 1.0,
    ttit: Annotated[float, typer.Option(help="Seconds per token after it.")] = 0.05,
    warm_up: Annotated[float, typer.Option(help="Simulated seconds before those counted.")] = 20.0,
    seconds: Annotated[float, typer.Option(help="Simulated seconds that count.")] = 10.0,
    seed: int = 0,
    measured: Annotated[Path, typer.Option(help="File of measured step times.")] = MEASURED,
    output: Annotated[Path, typer.Option(help="Where the results go.")] = Path("out/fleet.json"),
    add: Annotated[bool, typer.Option("--add", help="Keep the rows of that file.")] = False,
) -> None:
    """Simulate, print a table, and draw it."""
    times, traffic = measured_times(measured), Traffic()
    rows: list[dict[str, Any]] = []
    if add:
        rows += json.loads(output.read_text(encoding="utf-8"))["rows"]
    for number in map(int, replicas.split(",")):
        for routing in ROUTINGS:
            for rate in map(float, rates.split(",")):
                began = time.monotonic()
                fleet = fleet_of(number, routing, times, traffic, rate * number, seed)
                found = summary(fleet.run(warm_up, seconds), seconds, ttft, ttit)
                place = {"replicas": number, "routing": routing, "rate": rate}
                rows.append(place | {"warm_up": warm_up, "seconds": seconds} | found)
                took = time.monotonic() - began
                print(f"{rows[-1]}  ({took:.0f} s)", file=sys.stderr, flush=True)
                if found["goodput"] < rate * number / 2:  # far beyond what it carries
                    break
    content = {
        **facts(),
        "measured": measured.name,
        "about": json.loads(measured.read_text(encoding="utf-8"))["about"],
        "traffic": asdict(traffic),
        "limits": asdict(LIMITS),
        "ttft": ttft,
        "ttit": ttit,
        "seed": seed,
        "rows": rows,
    }
    write_results("fleet", output, content)
    print(plot_fleet(content, output))


def fleet_of(
    number: int, routing: Routing, times: StepTimes, traffic: Traffic, rate: float, seed: int
) -> Fleet:
    """So many idle engines with this routing."""
    engines = [Engine(LIMITS, times) for _ in range(number)]
    policy: PrefixAffinity[int] | RoundRobin[int] = RoundRobin()
    if routing == "prefix":
        policy = PrefixAffinity(num_blocks=LIMITS.cache_tokens // BLOCK)
    return Fleet(engines, policy, traffic, rate, seed)


def summary(found: Sequence[Asked], seconds: float, ttft: float, ttit: float) -> dict[str, Any]:
    """Goodput in requests per second, times in ms, and the share of prompt tokens from a cache."""
    firsts = [asked.first - asked.arrival if asked.first else math.inf for asked in found]
    others = [
        (asked.end - asked.first) / (asked.num_output - 1) if asked.end else math.inf
        for asked in found
    ]
    good = sum(a <= ttft and b <= ttit for a, b in zip(firsts, others, strict=True))
    begun = [asked for asked in found if asked.first]
    cached = sum(asked.cached for asked in begun) / max(1, sum(a.num_prompt for a in begun))
    return {
        "requests": len(found),
        "goodput": round(good / seconds, 1),
        "good": round(good / max(1, len(found)), 4),
        "cached": round(cached, 3),
        **percentiles("ttft", firsts),
        **percentiles("ttit", others),
    }


def percentiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """p50 and p99 in ms; None where that request never came so far."""
    ranked = sorted(values)
    found: dict[str, float | None] = {}
    for percent in (50, 99):
        value = ranked[len(ranked) * percent // 100] if ranked else math.inf
        found[f"{name}_p{percent}"] = round(value * 1e3, 1) if math.isfinite(value) else None
    return found


if __name__ == "__main__":
    typer.run(main)
