"""How the acceptance of a head that learns while serving changes as requests change: prompts of one
file, then of another, to a running server with speculation.learn.

    aerie serve speculation.learn=true --capture DIR --capture-consent capture.sample_rate=1 ...
    python -m benchmarks.learning --url http://127.0.0.1:8000 --admin-key root \\
        --first chat.jsonl --second code.jsonl --requests 1000 --output learning.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from drafter.train.data.conversations import read_prompts
from drafter.train.results.chart import LineChart

Messages = Sequence[Mapping[str, str]]
POLL = 0.5  # seconds
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


def chart(found: Sequence[Burst]) -> bytes:
    """Tokens per step over requests."""
    xs = [float(burst.num_requests) for burst in found]
    groups = itertools.groupby(found, lambda burst: burst.domain)
    begins = [f"{name} until {list(group)[-1].num_requests}" for name, group in groups]
    caption = f"requests: {', '.join(begins)}"
    lines = {"tokens per step": [burst.tokens_per_step for burst in found]}
    return LineChart("A head that learns while it serves", caption, xs, lines).svg()


def main() -> None:
    asked = _arguments()
    headers = {"authorization": f"Bearer {asked.admin_key}"}
    with httpx.Client(base_url=asked.url, timeout=600) as http:
        model = http.get("/v1/models").json()["data"][0]["id"]
        served = Served(http, model, asked.max_tokens, headers)
        domains = [
            (path.stem, [list(prompt.messages) for prompt in read_prompts(path)])
            for path in (asked.first, asked.second)
        ]
        found = []
        for burst in bursts(served, domains, asked.requests, asked.burst, asked.patience):
            found.append(burst)
            print(json.dumps(asdict(burst)), flush=True)
    text = json.dumps([asdict(burst) for burst in found], indent=1)
    asked.output.write_text(text + "\n", encoding="utf-8")
    asked.output.with_suffix(".svg").write_bytes(chart(found))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--admin-key", required=True)
    parser.add_argument("--first", type=Path, required=True, help="JSONL of prompts")
    parser.add_argument("--second", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=1000, help="of each file")
    parser.add_argument("--burst", type=int, default=20, help="requests sent together")
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--patience", type=float, default=60.0, help="seconds for a round")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
