"""The commands `aerie bench latency` and `aerie bench serving`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.commands.options import MEASURING, ApiKey, ConfigFile, Overrides, Url, failed
from server.version import version

if TYPE_CHECKING:
    from server.measuring.answers import Endpoint
    from server.measuring.open_load import Row as LoadRow
    from server.measuring.streams import Row as StreamsRow

JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write all numbers there.", show_default=False),
]
Seed = Annotated[int, typer.Option(help="Of the prompts and the times of arrival.")]
Rates = Annotated[
    list[float] | None,
    typer.Option(
        "--rate",
        help="Requests per second, rising; may be repeated. Default: 0.25, 0.5, 1 ... 16.",
        show_default=False,
    ),
]
Seconds = Annotated[float, typer.Option(min=0.1, help="Of arrivals, at each rate.")]
Drain = Annotated[float, typer.Option(help="Seconds for the last requests.")]
TtftGoal = Annotated[float, typer.Option(help="Goal: ms to the first token.")]
TpotGoal = Annotated[float, typer.Option(help="Goal: ms per token after it.")]
Share = Annotated[float, typer.Option(min=0, max=1, help="Goal: of good requests.")]
Range = Annotated[tuple[int, int], typer.Option(help="Least and most.")]
RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # requests per second
TERMS = """\
TTFT: time to the first token. TPOT (also called TTIT): mean time per token
after it, of each answer. ITL: time from one arrival to the next, which may
bring several tokens. tokens/step: of steps with drafts, the bonus included."""

app = typer.Typer(
    name="bench",
    help="Measure a server as its clients see it.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


def register(parent: typer.Typer) -> None:
    """Add the commands of this module to `parent`."""
    parent.add_typer(app, rich_help_panel=MEASURING)


@app.command()
def latency(
    overrides: Overrides = None,
    config: ConfigFile = None,
    url: Url = None,
    api_key: ApiKey = None,
    streams: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Requests at a time; may be repeated. Default: 1, 8 and 32.",
            show_default=False,
        ),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="At least, at each of them.")] = 8,
    prompt_words: Annotated[int, typer.Option(min=1)] = 64,
    output_tokens: Annotated[int, typer.Option(min=2)] = 64,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Times and tokens per second at some numbers of requests at a time.

    Asks a server that runs, of any make, or one of its own. Answers are greedy and have all the
    same length; prompts are pieces of a book, which no cache knows.

    Examples:

        aerie bench latency

        aerie bench latency --url http://gpu-box:8000 --streams 64 --output-tokens 256

        aerie bench latency speculation.draft=null speculation.lookup=false
    """
    from server.measuring.streams import Plan, run

    with _endpoint(url, api_key, overrides, config) as endpoint:
        plan = Plan(tuple(streams or (1, 8, 32)), requests, prompt_words, output_tokens, seed)
        typer.echo(f"{prompt_words} words in, {output_tokens} tokens out")
        typer.echo(_line("streams", "TTFT ms", "p99", "TPOT ms", "p99", "ITL p99", *TOKENS))
        rows = run(endpoint, plan, lambda row: typer.echo(_of_streams(row)))
        typer.echo(TERMS)
        _write(json_file, "latency", endpoint, asdict(plan), [asdict(row) for row in rows])


@app.command()
def serving(
    overrides: Overrides = None,
    config: ConfigFile = None,
    url: Url = None,
    api_key: ApiKey = None,
    rates: Rates = None,
    seconds: Seconds = 30.0,
    drain: Drain = 60.0,
    ttft: TtftGoal = 1000.0,
    tpot: TpotGoal = 100.0,
    share: Share = 0.9,
    prompt_words: Range = (16, 192),
    output_tokens: Range = (16, 128),
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """How many requests per second a server answers in time.

    Requests arrive at random, whether or not earlier ones are answered, at one rate after the
    other, until half of them are late. Good are those within both goals.

    Examples:

        aerie bench serving --url http://gpu-box:8000 --rate 4 --rate 8 --ttft 500 --tpot 50
    """
    from server.measuring import open_load

    plan = open_load.Plan(tuple(rates or RATES), seconds, drain, prompt_words, output_tokens, seed)
    goal = open_load.Goal(ttft, tpot, share)
    with _endpoint(url, api_key, overrides, config) as endpoint:
        open_load.check(plan)
        typer.echo(f"good: first token within {ttft:g} ms, {tpot:g} ms per token after it")
        typer.echo(
            _line("rate/s", "good/s", "good", "TTFT ms", "p99", "TPOT ms", "p99", "tokens/s")
        )
        rows = open_load.run(endpoint, plan, goal, lambda row: typer.echo(_of_load(row)))
        found = open_load.saturation(rows, share)
        end = "not reached at these rates" if found is None else f"{found:.2f} requests/s"
        typer.echo(f"saturation (fewer than {share:.0%} are good): {end}")
        for problem in sorted({error for row in rows for error in row.errors}):
            typer.echo(f"failed: {problem}")
        facts = asdict(plan) | {"goal": asdict(goal), "saturation": found}
        _write(json_file, "serving", endpoint, facts, [asdict(row) for row in rows])


TOKENS = ("tokens/s", "tokens/step")


@contextlib.contextmanager
def _endpoint(
    url: str | None, api_key: str | None, overrides: list[str] | None, config: Path | None
) -> Iterator[Endpoint]:
    """The first model of the server; what goes wrong with it ends the command with one line."""
    import httpx
    from rich.console import Console

    from server.commands.reaching import reached
    from server.measuring.answers import Endpoint
    from server.terminal.remote import RemoteError

    try:
        with reached(url, api_key, overrides, config, Console(stderr=True)) as remote:
            model = remote.models()[0]
            typer.echo(f"{model} at {remote.url}")
            headers = () if api_key is None else (("Authorization", f"Bearer {api_key}"),)
            yield Endpoint(model, f"{remote.url}/v1", model, headers)
    except (ValueError, OSError, RuntimeError, RemoteError, httpx.HTTPError) as error:
        raise failed(error) from None


def _line(*cells: str) -> str:
    """At most 80 columns."""
    return "".join(f"{cell:>{max(9, len(cell) + 1)}}" for cell in cells)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _of_streams(row: StreamsRow) -> str:
    times = (row.ttft_p50, row.ttft_p99, row.tpot_p50, row.tpot_p99, row.itl_p99)
    end = _number(row.tokens_per_step).rjust(len(TOKENS[1]))
    return _line(str(row.streams), *map(_number, (*times, row.tokens_per_second)), end)


def _of_load(row: LoadRow) -> str:
    times = (row.ttft_p50, row.ttft_p99, row.ttit_p50, row.ttit_p99, row.tokens_per_second)
    return _line(f"{row.rate:g}", _number(row.goodput), f"{row.good:.0%}", *map(_number, times))


def _write(
    path: Path | None,
    kind: str,
    endpoint: Endpoint,
    plan: dict[str, Any],
    rows: Sequence[dict[str, Any]],
) -> None:
    if path is None:
        return
    content = {
        "benchmark": kind,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "model": endpoint.model,
        "url": endpoint.base_url,
        "measured_by": f"aerie {version()}",
        "plan": plan,
        "rows": rows,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    typer.echo(f"wrote {path}")
