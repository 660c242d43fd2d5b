"""How the acceptance of a head that learns while serving changes as requests change: prompts of one
file, then of another. And what learning costs: requests while a head learns, and while it does not.

    python -m benchmarks.learning --first chat.jsonl --second code.jsonl --output learning.json
    python -m benchmarks.learning --first chat.jsonl --pairs 40 --output cost.json

Each starts a server of its own with speculation.learn; settings of it, SECTION.KEY=VALUE, follow.
"""

from __future__ import annotations

import itertools
import json
import secrets
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import httpx
import typer

from benchmarks.measuring import machine
from benchmarks.peers.known import Setting, aerie
from benchmarks.peers.running import free_port, started
from configs.host import this_host
from drafter.train.data.conversations import read_prompts
from drafter.train.results.chart import LineChart
from engine.checkpoints.source import BUNDLED_ALIAS

Messages = Sequence[Mapping[str, str]]
POLL = 0.5  # seconds
REST = 1.0  # seconds before a request, in which training goes on
START = 300.0  # seconds for a server to start
DRAFTS = "aerie:spec_decode_num_drafts_total"
ACCEPTED = "aerie:spec_decode_num_accepted_tokens_total"


@dataclass(frozen=True, slots=True)
class Burst:
    """Some requests that were sent together, and the state of learning after them."""

    domain: str
    num_requests: int  # sent so far
    tokens_per_step: float  # in these requests, the target's own token included
    num_rounds: int
    num_adopted: int
    num_reverted: int


@dataclass(frozen=True, slots=True)
class Served:
    """A running server."""

    http: httpx.Client
    model: str
    max_tokens: int
    headers: dict[str, str]

    def ask(self, messages: Messages) -> None:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": self.max_tokens,
            "temperature": 0,
        }
        self.http.post("/v1/chat/completions", json=body).raise_for_status()

    def seconds(self, messages: Messages) -> float:
        """Of one request."""
        started = time.perf_counter()
        self.ask(messages)
        return time.perf_counter() - started

    def pause(self, *, paused: bool) -> dict[str, Any]:
        """Pause learning or let it go on; the state of learning."""
        answer = self.http.post("/admin/learning", json={"paused": paused}, headers=self.headers)
        status: dict[str, Any] = answer.raise_for_status().json()
        return status

    def counts(self) -> tuple[float, float]:
        """Trees, and accepted tokens."""
        lines = self.http.get("/metrics").text.splitlines()
        found = {line.split("{")[0]: float(line.split()[-1]) for line in lines if line[:1] != "#"}
        return found[DRAFTS], found[ACCEPTED]

    def learning(self) -> dict[str, Any]:
        status: dict[str, Any] = self.http.get("/admin/learning", headers=self.headers).json()
        return status

    def let_it_learn(self, patience: float, poll: float) -> dict[str, Any]:
        """Wait while a round of training runs, for `patience` seconds at most."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            time.sleep(poll)
            status = self.learning()
            if status["phase"] != "training":
                return status
        return self.learning()


def bursts(
    served: Served,
    domains: Sequence[tuple[str, Sequence[Messages]]],
    num_requests: int,
    size: int,
    patience: float,
    poll: float = POLL,
) -> Iterator[Burst]:
    """Send `num_requests` of each domain, `size` at a time, with pauses in which a head learns."""
    sent = 0
    with ThreadPoolExecutor(size) as threads:
        for name, prompts in domains:
            again = itertools.cycle(prompts)
            for _ in range(num_requests // size):
                drafts, accepted = served.counts()
                list(threads.map(served.ask, itertools.islice(again, size)))
                sent += size
                drafts_now, accepted_now = served.counts()
                status = served.let_it_learn(patience, poll)
                yield Burst(
                    name,
                    sent,
                    round(1 + (accepted_now - accepted) / max(drafts_now - drafts, 1), 4),
                    *(status[key] for key in ("num_rounds", "num_adopted", "num_reverted")),
                )


@dataclass(frozen=True, slots=True)
class Cost:
    """Requests that came while a head learnt, and the same requests while learning was paused."""

    num_pairs: int
    num_running: int  # of the former, those before which training really ran
    paused: list[float]  # seconds of each request
    learning: list[float]

    @property
    def ratio(self) -> float:
        """The median of how much longer a request takes while a head learns."""
        pairs = zip(self.learning, self.paused, strict=True)
        return statistics.median(mine / other for mine, other in pairs)


def cost(served: Served, prompts: Sequence[Messages], num_pairs: int, rest: float = REST) -> Cost:
    """Ask one request at a time, each of a pair with and without learning, in turn first. Before
    each is a `rest` in seconds, in which training runs; the answers of a pair are equal, and both
    find their prompt in the prefix cache."""
    found: dict[bool, list[float]] = {True: [], False: []}
    num_running = 0
    for number, messages in enumerate(itertools.islice(itertools.cycle(prompts), num_pairs)):
        served.ask(messages)
        for paused in (number % 2 == 0, number % 2 == 1):
            served.pause(paused=paused)
            time.sleep(rest)
            status = served.learning()
            num_running += status["phase"] == "training" and not status["interrupted"]
            found[paused].append(served.seconds(messages))
    return Cost(num_pairs, num_running, found[True], found[False])


def busy_learning(
    served: Served, prompts: Sequence[Messages], size: int, patience: float, poll: float = POLL
) -> None:
    """Send requests, `size` at a time, until a round of training begins. RuntimeError if none does
    within `patience` seconds."""
    end, again = time.monotonic() + patience, itertools.cycle(prompts)
    with ThreadPoolExecutor(size) as threads:
        while served.learning()["phase"] != "training":
            if time.monotonic() > end:
                raise RuntimeError(f"no training began: {served.learning()}")
            list(threads.map(served.ask, itertools.islice(again, size)))
            time.sleep(poll)


def chart(found: Sequence[Burst]) -> bytes:
    """Tokens per step over requests."""
    xs = [float(burst.num_requests) for burst in found]
    groups = itertools.groupby(found, lambda burst: burst.domain)
    begins = [f"{name} until {list(group)[-1].num_requests}" for name, group in groups]
    caption = f"requests: {', '.join(begins)}"
    lines = {"tokens per step": [burst.tokens_per_step for burst in found]}
    return LineChart("A head that learns while it serves", caption, xs, lines).svg()


@contextmanager
def learning_server(
    model: str, overrides: Sequence[str], max_tokens: int, folder: Path
) -> Iterator[Served]:
    """A server whose head learns from all that it answers; its files and log are in `folder`."""
    key, port = secrets.token_hex(16), free_port()
    settings = {
        "speculation.learn": "true",
        "speculation.lookup": "false",
        "capture.dir": folder / "captured",
        "capture.consent": "true",
        "capture.sample_rate": 1,
        "server.admin_keys": f"[{key}]",
    }
    own = [f"{name}={value}" for name, value in settings.items()]
    server = aerie("aerie", model, [*own, *overrides])
    setting = Setting(Path(), port, this_host().num_cpus, 1, folder)
    with started(server, setting, folder / "server.log", START) as endpoint:
        headers = {"authorization": f"Bearer {key}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as http:
            yield Served(http, endpoint.model, max_tokens, headers)


def main(
    first: Annotated[Path, typer.Option(help="JSON lines of prompts.")],
    output: Annotated[Path, typer.Option(help="JSON; a chart is written beside it.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", show_default=False)
    ] = None,
    model: Annotated[str, typer.Option(help="As model.source.")] = BUNDLED_ALIAS,
    second: Annotated[Path | None, typer.Option(help="Asked after those of the first.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Of each file.")] = 1000,
    burst: Annotated[int, typer.Option(min=1, help="Requests sent together.")] = 20,
    max_tokens: Annotated[int, typer.Option(min=1)] = 100,
    patience: Annotated[float, typer.Option(help="Seconds for a round of training.")] = 60.0,
    pairs: Annotated[
        int,
        typer.Option(min=0, help="Measure what learning costs, with so many pairs of requests."),
    ] = 0,
) -> None:
    """Let a head learn while requests change, or measure what that costs them."""
    if (second is None) == (pairs == 0):
        raise typer.BadParameter("either --second or --pairs is needed")
    output.parent.mkdir(parents=True, exist_ok=True)
    paths = [first] if second is None else [first, second]
    domains = [(path.stem, [list(one.messages) for one in read_prompts(path)]) for path in paths]
    with (
        TemporaryDirectory(prefix="aerie-learning-") as scratch,
        learning_server(model, overrides or (), max_tokens, Path(scratch)) as served,
    ):
        if second is None:
            busy_learning(served, domains[0][1], burst, patience)
            _tell_cost(cost(served, domains[0][1], pairs), output)
        else:
            _follow(bursts(served, domains, requests, burst, patience), output)


def _follow(burst_by_burst: Iterator[Burst], output: Path) -> None:
    """Everything is written after each burst, so that a run that is cut off leaves it."""
    found: list[Burst] = []
    for one in burst_by_burst:
        found.append(one)
        print(json.dumps(asdict(one)), flush=True)
        _write(output, {**machine.facts(), "bursts": [asdict(each) for each in found]})
        output.with_suffix(".svg").write_bytes(chart(found))


def _tell_cost(found: Cost, output: Path) -> None:
    _write(output, {**machine.facts(), **asdict(found), "ratio": round(found.ratio, 4)})
    print(
        f"{found.num_pairs} pairs, training ran before {found.num_running}: median "
        f"{statistics.median(found.learning):.3f} s with learning, "
        f"{statistics.median(found.paused):.3f} s without, {found.ratio:.3f} times in pairs"
    )


def _write(output: Path, content: object) -> None:
    output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
