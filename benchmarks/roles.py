"""What running streams notice of long prompts: one engine for both, or an engine for each role.

Some streams of one token per event run undisturbed; then long prompts arrive together. Each gap
between two events of a stream counts for the time in which it ends: before the prompts, or between
their arrival and the last of their first tokens.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import machine
from benchmarks.peers.known import Server, Setting
from benchmarks.peers.running import free_port, started
from server.measuring.answers import Endpoint

ROLES = "parallel.roles=prefill:1,decode:1"
PATIENCE = 120.0  # seconds for a server to start
FIRST_TOKEN_ID = 1000  # special tokens are below it
VOCABULARY = 40_000
STREAM_PROMPT = 32  # tokens


@dataclass(frozen=True, slots=True)
class Gaps:
    """Seconds from token to token of all streams together, in milliseconds."""

    count: int
    p50: float
    p99: float
    longest: float

    @classmethod
    def of(cls, seconds: list[float]) -> Gaps:
        cuts = statistics.quantiles(seconds, n=100)
        p50, p99 = (round(1000 * cuts[at], 2) for at in (49, 98))
        return cls(len(seconds), p50, p99, round(1000 * max(seconds), 2))


@dataclass(frozen=True, slots=True)
class Watch:
    """What to watch."""

    streams: int
    calm: float  # seconds before the prompts arrive
    prompts: int
    length: int  # tokens of each prompt
    most: float  # seconds after their arrival


@dataclass(slots=True)
class Watched:
    """When tokens of the streams came."""

    gaps: list[tuple[float, float]] = field(default_factory=list)  # time of the end, length
    num_started: int = 0


def prompt(length: int, seed: int) -> list[int]:
    """Random tokens, which no cache knows."""
    draw = random.Random(seed)
    return [draw.randrange(FIRST_TOKEN_ID, VOCABULARY) for _ in range(length)]


async def stream(client: httpx.AsyncClient, model: str, seed: int, seen: Watched) -> None:
    """One long answer; runs until it is cancelled."""
    body = {"model": model, "prompt": prompt(STREAM_PROMPT, seed), "stream": True}
    body |= {
        "max_tokens": 6000,
        "ignore_eos": True,
        "temperature": 0,
        "speculation": {"enabled": False},
    }
    async with client.stream("POST", "/completions", json=body) as response:
        response.raise_for_status()
        before = None
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now = time.perf_counter()
            if before is None:
                seen.num_started += 1
            else:
                seen.gaps.append((now, now - before))
            before = now


async def first_token(client: httpx.AsyncClient, model: str, length: int, seed: int) -> float:
    """Seconds until the first token after a long prompt."""
    began = time.perf_counter()
    body = {"model": model, "prompt": prompt(length, seed), "max_tokens": 1, "temperature": 0}
    (await client.post("/completions", json=body)).raise_for_status()
    return time.perf_counter() - began


async def measure(endpoint: Endpoint, watch: Watch) -> dict[str, Any]:
    """Gaps before and while the prompts are computed, and the times of their first tokens."""
    seen = Watched()
    async with httpx.AsyncClient(base_url=endpoint.base_url, timeout=None) as client:
        own = [
            asyncio.create_task(stream(client, endpoint.model, seed, seen))
            for seed in range(watch.streams)
        ]
        while seen.num_started < watch.streams:
            await asyncio.wait(own, timeout=0.01)
            for each in own:
                if each.done():
                    each.result()  # raises: a stream lasts longer than this
        began = time.perf_counter()
        await asyncio.sleep(watch.calm)
        arrival = time.perf_counter()
        asked = [
            asyncio.create_task(first_token(client, endpoint.model, watch.length, 1000 + number))
            for number in range(watch.prompts)
        ]
        done, late = await asyncio.wait(asked, timeout=watch.most)
        end = time.perf_counter()
        for task in (*own, *late):
            task.cancel()
        await asyncio.gather(*own, *late, return_exceptions=True)
    undisturbed = Gaps.of([gap for at, gap in seen.gaps if began <= at < arrival])
    beside = Gaps.of([gap for at, gap in seen.gaps if arrival <= at < end])
    return {
        "undisturbed_ms": asdict(undisturbed),
        "beside_prompts_ms": asdict(beside),
        "p99_ratio": round(beside.p99 / undisturbed.p99, 2),
        "first_tokens_s": sorted(round(task.result(), 2) for task in done),
        "unfinished_prompts": len(late),
    }


def _measured(overrides: list[str], folder: Path, watch: Watch) -> dict[str, Any]:
    def command(setting: Setting) -> list[str]:
        run = [sys.executable, "-m", "server.cli", "serve", "--port", str(setting.port)]
        return [*run, *overrides]

    port, threads = free_port(), 0  # the server takes all cores
    setting = Setting(Path(), port, threads, watch.streams, folder)
    with started(Server("aerie", command), setting, folder / "roles.log", PATIENCE) as endpoint:
        return asyncio.run(measure(endpoint, watch))


def _show(found: dict[str, dict[str, Any]]) -> None:
    table = Table(
        "engines", "undisturbed p50", "p99", "beside prompts p50", "p99", "longest", "ratio"
    )
    for name, each in found.items():
        calm, beside = each["undisturbed_ms"], each["beside_prompts_ms"]
        numbers = (calm["p50"], calm["p99"], beside["p50"], beside["p99"], beside["longest"])
        table.add_row(name, *map(str, numbers), str(each["p99_ratio"]))
    Console().print(table)


def main(
    output: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("out/roles.json"),
    engines: Annotated[str, typer.Option(help="one, roles, or both of them.")] = "both",
    streams: Annotated[int, typer.Option(min=1, help="Running streams.")] = 2,
    calm: Annotated[float, typer.Option(help="Seconds before the prompts arrive.")] = 6.0,
    prompts: Annotated[int, typer.Option(min=1, help="Long prompts.")] = 4,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 6000,
    most: Annotated[float, typer.Option(help="Seconds to watch after they arrive.")] = 600.0,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
) -> None:
    """Measure one engine and an engine for each role, one after the other."""
    settings: dict[str, tuple[str, ...]] = {"one": (), "roles": (ROLES,)}
    if engines not in (*settings, "both"):
        raise typer.BadParameter(f"engines is {engines!r}; allowed: one, roles, both")
    chosen = settings if engines == "both" else {engines: settings[engines]}
    watch, before = Watch(streams, calm, prompts, length, most), machine.load()
    found = {
        name: _measured([*(overrides or ()), *own], output.parent, watch)
        for name, own in chosen.items()
    }
    content = machine.facts() | {"load_before": before, "load_after": machine.load()}
    content |= {"setting": asdict(watch), "overrides": overrides or [], "engines": found}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _show(found)


if __name__ == "__main__":
    typer.run(main)
