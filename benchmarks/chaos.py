"""Random traffic on a real server, which is harmed meanwhile: `python -m benchmarks.chaos`.

The server has two ranks of a tiny random model. Requests of all kinds are sent whose texts are
known from a quiet run. After each fault, traffic pauses, and the server must be as before: each
request had exactly one end, texts are those of the quiet run, nothing runs or waits, and all blocks
are free. With --soak, a quiet time without faults comes first, in which no process may grow. Prints
faults and counts, and exits with 1 if anything was wrong.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from benchmarks.cases.chaos_faults import FAULTS, Scene, followers
from benchmarks.cases.chaos_traffic import MODEL, Traffic, cases
from benchmarks.measuring import machine
from tests.support.models.tiny_llama import TinyLlama, write_tiny_llama
from tests.support.servers.live_server import LiveServer

WORKERS = 6
AT_PEAK = 16  # clients: as many as run in one step
RATIO = 0.9  # of the peak goodput, at ten times the load
RECOVERY = 120.0  # seconds until a harmed server is ready again
LOAD_SECONDS = 5.0
SOAK_WORKERS = 2
SOAK_SAMPLES = 120  # looks at the memory
WARM_UP = 1 / 3  # of a soak, which does not count: caches and allocators fill
MAX_GROWTH = 1.0  # MB per hour
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
SETTINGS = (
    f"model.served_name={MODEL}",
    "model.dtype=float32",
    "cache.num_blocks=256",
    "scheduler.max_num_seqs=16",
    "parallel.tensor=2",
    "kernels.threads=2",
    "server.max_queued_requests=32",
    "server.write_timeout=4",
    # Faults are at random: a request that runs at two of them is not to blame.
    "server.refuse_suspects=0",
    "capture.consent=true",
    "capture.sample_rate=1",
)


class Run:
    """One server, its traffic and what was found."""

    def __init__(self, server: LiveServer, traffic: Traffic, luck: random.Random) -> None:
        self._server = server
        self.traffic = traffic
        self._luck = luck
        self.counts: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.problems: list[str] = []
        self.ratios: list[float] = []
        self.growth: dict[str, float] = {}  # MB per hour, by process
        self.sizes: dict[str, list[float]] = {}  # MB, ten times in a soak, by process
        self._began = time.monotonic()

    async def soak(self, seconds: float, num_fuzzed: int) -> None:
        """Quiet traffic for so long; the memory of every process is looked at meanwhile."""
        began = time.monotonic()
        names = self._processes()
        sizes: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
        traffic = asyncio.create_task(self.traffic.soak(began + seconds, num_fuzzed, SOAK_WORKERS))
        while not traffic.done():
            await asyncio.wait([traffic], timeout=seconds / SOAK_SAMPLES)
            for name, pid in names.items():
                sizes[name].append((time.monotonic() - began, _resident(pid)))
        traffic.result()
        await self._settle("soak")
        if self._processes() != names:
            self.problems.append("soak: a process ended")
        self.growth = {name: growth(points, seconds * WARM_UP) for name, points in sizes.items()}
        self.sizes = {
            name: [round(size / 2**20, 1) for _, size in points[:: SOAK_SAMPLES // 10]]
            for name, points in sizes.items()
        }
        print(f"{seconds:6.0f} s  soak; grew by {self.growth} MB an hour", flush=True)
        self.problems += [
            f"soak: {name} grew by {rate} MB an hour"
            for name, rate in self.growth.items()
            if rate > MAX_GROWTH
        ]
        self.problems += [f"soak: {each}" for each in self.traffic.tally.faults]

    def _processes(self) -> dict[str, int]:
        """The long-lived ones of the server."""
        engine = self._server.engine_pid
        (rank,) = followers(engine)
        own = {"launcher": self._server.pid, "http": self._server.http_pid}
        return own | {"engine": engine, "rank": rank}

    async def go_on(self, seconds: float, only: list[str]) -> None:
        """Do every fault in a random order, again and again, for so long."""
        waiting: list[str] = []
        while time.monotonic() - self._began < seconds:
            if not waiting:
                waiting = self._luck.sample(only, len(only))
            await self._do(waiting.pop())

    async def _do(self, name: str) -> None:
        notes: list[str] = []
        scene = Scene(self._server, self.traffic, self._luck, notes)
        known = len(self.traffic.tally.faults)
        try:
            if name == "ten times the load":
                self.ratios.append(round(await self._overload(), 3))
            else:
                self.traffic.go()
                await asyncio.sleep(1.5 + self._luck.random())
                await FAULTS[name](scene)
            await self._settle(name)
        except Exception as error:  # noqa: BLE001  # a finding like any other
            self.problems.append(f"{name}: {error!r}")
            await self._settle(name)
        self.counts[name] += 1
        self.notes.update(notes)
        self.problems += [f"{name}: {each}" for each in self.traffic.tally.faults[known:]]
        print(f"{time.monotonic() - self._began:6.0f} s  {name}", *notes, sep="; ", flush=True)

    async def _settle(self, name: str) -> None:
        """Pause the traffic; the server must become ready and have nothing to do."""
        await self.traffic.pause()
        end = time.monotonic() + RECOVERY
        state = "no answer"
        while state:
            if time.monotonic() > end:
                self.problems.append(f"{name}: {state} after {RECOVERY:.0f} s")
                return
            await asyncio.sleep(0.1)
            state = await asyncio.to_thread(self._unrest)

    def _unrest(self) -> str:
        """What is not yet as it should be."""
        if self._server.process.poll() is not None:
            raise RuntimeError(f"the server ended with {self._server.process.returncode}")
        try:
            if self._server.get("/ready").status_code != 200:
                return "not ready"
            found = self._server.metrics()
            _ = self._server.engine_pid
        except (httpx.TransportError, ValueError) as error:
            return repr(error)
        return ", ".join(f"{name} is {found[name]}" for name in GAUGES if found[name])

    async def _overload(self) -> float:
        """Completed requests per second at ten times the clients, as a part of those at peak."""
        peak = await self._goodput(AT_PEAK)
        return await self._goodput(AT_PEAK * 10) / peak

    async def _goodput(self, num_clients: int) -> float:
        """Of clients that ask for LOAD_SECONDS. What then is open counts, too, and so does its
        time: a full queue holds the work of seconds."""
        began, done = time.monotonic(), 0
        end = began + LOAD_SECONDS

        async def client() -> None:
            nonlocal done
            while time.monotonic() < end:
                if await self.traffic.one() == "complete":
                    done += 1
                else:
                    await asyncio.sleep(1.0)  # as Retry-After says

        await asyncio.gather(*(client() for _ in range(num_clients)))
        return done / (time.monotonic() - began)


def growth(points: Sequence[tuple[float, int]], warm_up: float) -> float:
    """MB per hour of `points` (seconds, bytes) after the first `warm_up` seconds."""
    seconds, sizes = zip(*(point for point in points if point[0] >= warm_up), strict=True)
    return round(statistics.linear_regression(seconds, sizes).slope * 3600 / 2**20, 2)


def _resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


async def run_against(
    server: LiveServer, seconds: float, seed: int, only: list[str], soak: float, fuzzed: int
) -> Run:
    luck = random.Random(seed)
    traffic = Traffic(server.url, cases(luck), luck)
    await traffic.learn()
    run = Run(server, traffic, luck)
    if soak:
        await run.soak(soak, fuzzed)
    workers = [asyncio.create_task(traffic.work()) for _ in range(WORKERS)]
    try:
        await run.go_on(seconds, only)
    finally:
        await traffic.close()
        await asyncio.gather(*workers, return_exceptions=True)
    return run


def report(run: Run, seconds: float, seed: int, soak: float) -> dict[str, Any]:
    tally = run.traffic.tally
    ratio = statistics.median(run.ratios) if run.ratios else None
    if ratio is not None and ratio < RATIO:
        run.problems.append(f"goodput at ten times the load is {ratio} of the peak")
    return {
        "machine": machine.facts() | {"load": machine.load()},
        "seconds": round(seconds),
        "seed": seed,
        "settings": SETTINGS,
        "faults": dict(run.counts),
        "notes": dict(run.notes),
        "requests": sum(tally.ends.values()),
        "ends": dict(tally.ends),
        "kinds": dict(tally.by_kind),
        "goodput_at_10x": run.ratios,
        "soak_minutes": round(soak / 60, 1),
        "growth_mb_per_hour": run.growth,
        "mb": run.sizes,
        "problems": run.problems,
    }


def main(
    minutes: Annotated[float, typer.Option(help="How long faults are made.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Of traffic and faults.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Only these faults.")] = None,
    soak: Annotated[float, typer.Option(help="Minutes of quiet traffic before the faults.")] = 0.0,
    fuzz: Annotated[int, typer.Option(help="Spoilt requests in these minutes.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Write the results there, as JSON.")] = None,
) -> None:
    """Harm a server, and say what came of it."""
    known = [*FAULTS, "ten times the load"]
    if unknown := set(only or ()) - set(known):
        raise typer.BadParameter(f"{sorted(unknown)}; known are {known}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="aerie-chaos-") as folder:
        model = Path(folder) / "model"
        model.mkdir()
        write_tiny_llama(model, TinyLlama(max_position_embeddings=4096))
        settings = (f"model.source={model}", f"capture.dir={folder}/captured", *SETTINGS)
        with LiveServer(*settings) as server:
            run = asyncio.run(
                run_against(server, minutes * 60, seed, only or known, soak * 60, fuzz)
            )
            code = server.stop()
            if code:
                run.problems.append(f"the exit code is {code}")
            log = server.log.text()
    found = report(run, time.monotonic() - began, seed, soak * 60)
    if "Traceback" in log:
        found["tracebacks"] = log.count("Traceback")
    print(json.dumps(found, indent=1))
    if output is not None:
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if run.problems:
        Path("build").mkdir(exist_ok=True)
        Path("build/chaos.log").write_text(log, encoding="utf-8")
        print(f"{len(run.problems)} problems; the server's log is build/chaos.log")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
