"""Several real engines under conversations, once routed by prefix and once in turns.

    python -m benchmarks.routing --replicas 2

Each conversation asks again with all that came before, so that its next prompt begins with the
last one. It runs `aerie deploy ray` on this machine, and needs the extra `ray` and httpx.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from benchmarks.fleet import percentiles
from benchmarks.measuring.machine import facts, load
from benchmarks.peers.known import Server, Setting
from benchmarks.peers.running import free_port, started
from benchmarks.tables import write_results
from server.measuring.answers import Endpoint, ask_all

ROUTINGS = ("prefix", "round_robin")
SAMPLE = r"^aerie:{}_total\S* (\S+)$"
START = 300.0  # seconds for engines to answer
FIRST_ID, LAST_ID = 1000, 40_000  # tokens of prompts


@dataclass(frozen=True)
class Conversations:
    """Prompts of random tokens: each turn's begins with the last one's."""

    number: int
    turns: int
    opening: int = 400  # tokens of the first prompt
    growth: int = 100  # tokens that each turn adds

    def prompts(self, turn: int, seed: int) -> list[str | list[int]]:
        """Of all conversations at this turn, in random order."""
        length = self.opening + turn * self.growth
        found: list[str | list[int]] = []
        for number in range(self.number):
            tokens = random.Random(seed * 1_000 + number)
            found.append([tokens.randint(FIRST_ID, LAST_ID) for _ in range(length)])
        random.Random(turn).shuffle(found)
        return found


def main(
    replicas: Annotated[int, typer.Option(help="Engines.")] = 2,
    cached_tokens: Annotated[int, typer.Option(help="That the cache of one engine holds.")] = 8192,
    conversations: Annotated[int, typer.Option(help="That go on at the same time.")] = 16,
    turns: Annotated[int, typer.Option(help="Questions of each.")] = 4,
    num_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 8,
    streams: Annotated[int, typer.Option(help="Requests at a time.")] = 4,
    overrides: Annotated[
        str, typer.Option(help="Further keys of the configuration, with spaces between.")
    ] = "",
    seed: int = 0,
    routings: Annotated[str, typer.Option(help="Of these.")] = ",".join(ROUTINGS),
    output: Annotated[Path, typer.Option(help="Where results go.")] = Path("out/routing.json"),
    add: Annotated[bool, typer.Option("--add", help="Keep the rows of that file.")] = False,
) -> None:
    """Run both routings, and print a table."""
    before = load()
    talk = Conversations(conversations, turns)
    rows: list[dict[str, Any]] = []
    if add:
        rows += json.loads(output.read_text(encoding="utf-8"))["rows"]
    model = ""
    for routing in routings.split(","):
        keys = [f"fleet.routing={routing}", f"cache.num_blocks={cached_tokens // 16}"]
        keys += ["model.max_model_len=2048", "fleet.load_window=11", *overrides.split()]
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            setting = Setting(place, free_port(), 1, streams, place)
            server = _fleet(routing, replicas, keys)
            with started(server, setting, place / "log", START) as endpoint:
                model = endpoint.model
                rows.append({"routing": routing} | _run(endpoint, talk, num_tokens, streams, seed))
        print(rows[-1], file=sys.stderr, flush=True)
    content = {
        **facts(),
        "model": model,
        "replicas": replicas,
        "cached_tokens": cached_tokens,
        "conversations": conversations,
        "turns": turns,
        "streams": streams,
        "seed": seed,
        "load": [before, load()],
        "rows": rows,
    }
    write_results("routing", output, content)


def _fleet(routing: str, replicas: int, keys: Sequence[str]) -> Server:
    start = [sys.executable, "-m", "server.cli", "deploy", "ray", "--replicas", str(replicas)]
    return Server(routing, lambda setting: [*start, "--port", str(setting.port), *keys])


def _run(
    endpoint: Endpoint, talk: Conversations, num_tokens: int, streams: int, seed: int
) -> dict[str, Any]:
    """All turns, one after the other; what came from the caches, and times to the first token."""
    asyncio.run(ask_all(endpoint, talk.prompts(0, seed + 1)[:streams], num_tokens, streams))
    before, began = _counts(endpoint), time.perf_counter()
    firsts: list[float] = []
    for turn in range(talk.turns):
        answers = asyncio.run(ask_all(endpoint, talk.prompts(turn, seed), num_tokens, streams))
        firsts += [answer.ttft for answer in answers]
    seconds, after = time.perf_counter() - began, _counts(endpoint)
    cached, prompt = (after[name] - before[name] for name in ("cached", "prompt"))
    return {
        "cached": round(cached / prompt, 3),
        "prompt_tokens": int(prompt),
        "seconds": round(seconds, 1),
        **percentiles("ttft", firsts),
    }


def _counts(endpoint: Endpoint) -> dict[str, float]:
    """Prompt tokens, and those that came from a cache."""
    text = httpx.get(endpoint.base_url.removesuffix("/v1") + "/metrics", trust_env=False).text
    found = {}
    for short, name in (("cached", "prompt_tokens_cached"), ("prompt", "prompt_tokens")):
        sample = re.search(SAMPLE.format(name), text, re.MULTILINE)
        assert sample is not None, f"no metric {name}"
        found[short] = float(sample[1])
    return found


if __name__ == "__main__":
    typer.run(main)
