"""A server under open load: `python -m benchmarks.serving --url http://127.0.0.1:8000/v1`.

As `aerie bench serving`, with the facts of this machine, a table in Markdown and a picture.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.measuring import machine
from benchmarks.measuring.plots import plot_serving
from benchmarks.tables import write_results
from server.commands.bench import (
    RATES,
    Drain,
    Range,
    Rates,
    Seconds,
    Seed,
    Share,
    TpotGoal,
    TtftGoal,
)
from server.measuring.answers import Endpoint
from server.measuring.open_load import Goal, Plan, Row, check, measure, saturation


def main(
    url: Annotated[str, typer.Option(help="Ends with /v1 or the like.")],
    name: Annotated[str, typer.Option(help="Of the server, in the results.")] = "server",
    api_key: Annotated[str | None, typer.Option()] = None,
    rates: Rates = None,
    seconds: Seconds = 60.0,
    drain: Drain = 60.0,
    ttft: TtftGoal = 1000.0,
    tpot: TpotGoal = 100.0,
    share: Share = 0.9,
    prompt_words: Range = (16, 192),
    output_tokens: Range = (16, 128),
    seed: Seed = 0,
    output: Annotated[Path, typer.Option(help="JSON; .md and .png are written beside it.")] = Path(
        "benchmarks/out/serving.json"
    ),
) -> None:
    """Find how many requests per second a server answers in time."""
    plan = Plan(tuple(rates or RATES), seconds, drain, prompt_words, output_tokens, seed)
    try:
        check(plan)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    goal = Goal(ttft, tpot, share)
    before = machine.load()
    rows = asyncio.run(measure(Endpoint.discover(name, url, api_key), plan, goal, _say))
    content: dict[str, object] = {
        "benchmark": "serving",
        **machine.facts(),
        "server": name,
        "goal": asdict(goal),
        "plan": asdict(plan),
        "rows": [asdict(row) for row in rows],
        "saturation": saturation(rows, share),
        "load": [before, machine.load()],
    }
    write(output, content)


def _say(row: Row) -> None:
    print(f"{row.rate:g} requests/s: {row.good:.0%} are good", flush=True)


def write(output: Path, content: Mapping[str, object]) -> None:
    """The JSON, and beside it the table and the picture."""
    write_results("serving", output, content)
    print(f"wrote {output}, and beside it the table; {plot_serving(content, output)}")


if __name__ == "__main__":
    typer.run(main)
