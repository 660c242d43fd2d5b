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

from benchmarks import machine
from benchmarks.plots import plot_serving
from benchmarks.tables import write_results
from server.measuring.answers import Endpoint
from server.measuring.open_load import Goal, Plan, Row, check, measure, saturation


def main(
    url: Annotated[str, typer.Option(help="Ends with /v1 or the like.")],
    name: Annotated[str, typer.Option(help="Of the server, in the results.")] = "server",
    api_key: Annotated[str | None, typer.Option()] = None,
    rate: Annotated[list[float] | None, typer.Option(help="Requests/s; in rising order.")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of arrivals, per rate.")] = 60.0,
    drain: Annotated[float, typer.Option(help="Seconds for the last requests.")] = 60.0,
    ttft: Annotated[float, typer.Option(help="Goal, ms.")] = 1000.0,
    ttit: Annotated[float, typer.Option(help="Goal, ms.")] = 100.0,
    share: Annotated[float, typer.Option(min=0, max=1, help="Goal: share of good ones.")] = 0.9,
    prompt_words: Annotated[tuple[int, int], typer.Option(help="Least and most.")] = (16, 192),
    output_tokens: Annotated[tuple[int, int], typer.Option(help="Least and most.")] = (16, 128),
    seed: Annotated[int, typer.Option()] = 0,
    output: Annotated[Path, typer.Option(help="JSON; .md and .png are written beside it.")] = Path(
        "benchmarks/out/serving.json"
    ),
) -> None:
    """Find how many requests per second a server answers in time."""
    rates = tuple(rate or (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0))
    plan = Plan(rates, seconds, drain, prompt_words, output_tokens, seed)
    try:
        check(plan)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    goal = Goal(ttft, ttit, share)
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
