"""The command `aerie`."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from configs.host import host_config
from configs.schema import Config
from server import draft_commands
from server.command_options import ConfigFile, Overrides, failed, parse_bytes
from server.version import version as own_version

app = typer.Typer(
    help="Aerie serves Llama models over the OpenAI HTTP API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

CaptureFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Write sampled sequences there as token ids, to train draft heads on (capture.dir); "
        "needs --capture-consent.",
        show_default=False,
    ),
]
CaptureConsent = Annotated[
    bool,
    typer.Option(
        "--capture-consent",
        help="You may store what clients send and get (capture.consent).",
        show_default=False,
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(own_version())
        raise typer.Exit


@app.callback()
def _group(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
) -> None:
    """Sub-commands share nothing."""


@app.command()
def serve(
    overrides: Overrides = None,
    config: ConfigFile = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on (server.host).", show_default=False)
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="Port; 0 picks a free one (server.port).", show_default=False),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Accept this bearer token; may be repeated. Other users of this machine can see "
            "arguments: prefer server.api_key_file or AERIE_SERVER__API_KEYS.",
            show_default=False,
        ),
    ] = None,
    capture: CaptureFolder = None,
    capture_consent: CaptureConsent = False,
) -> None:
    """Start the server. Prints the resolved configuration, then one line `READY <url>`.

    Settings come from the file, then `AERIE_SECTION__KEY` environment variables, then the command
    line; `aerie config` lists all of them. SIGTERM and Ctrl-C drain: open requests finish (up to
    server.drain_timeout seconds), new ones get 503.

    Examples:

        aerie serve

        aerie serve --config smollm2-fp32 --port 8123 cache.num_blocks=512

        aerie serve model.source=/models/Llama-3.2-1B-Instruct server.api_key_file=keys.txt
    """
    # Until the server has its own handler. PID 1 of a container ignores signals without one.
    signal.signal(signal.SIGTERM, _leave)
    from server.launch import serve as run

    options = {
        "server.host": host,
        "server.port": port,
        "server.api_keys": api_key,
        "capture.dir": None if capture is None else str(capture),
        "capture.consent": capture_consent or None,
    }
    extra = [
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in options.items()
        if value is not None
    ]
    try:
        resolved = host_config(config, [*(overrides or ()), *extra])
        raise typer.Exit(run(resolved))
    except (ValueError, OSError) as error:
        raise failed(error) from None


@app.command(name="config")
def show_config(overrides: Overrides = None, config: ConfigFile = None) -> None:
    """Check a configuration and print it whole, with the meaning of every key."""
    try:
        resolved = host_config(config, overrides or ())
    except (ValueError, OSError) as error:
        raise failed(error) from None
    for name in Config.model_fields:
        section = getattr(resolved, name)
        typer.echo(f"{name}:  # {type(section).__doc__}")
        for key, about in type(section).model_fields.items():
            value = section.model_dump(mode="json")[key]
            if key in ("api_keys", "admin_keys"):
                value = ["***"] * len(value)
            text = f"{key}: {json.dumps(value)}"
            typer.echo(f"  {text}" + (f"  # {about.description}" if about.description else ""))


@app.command()
def prepare(overrides: Overrides = None, config: ConfigFile = None) -> None:
    """Do now what the first start would do: compile the CPU kernels, convert the tokenizer."""
    from server.compose import prepare_kernels
    from server.text.chat_codec import load_codec

    try:
        resolved = host_config(config, overrides or ())
        typer.echo(f"native kernels: {prepare_kernels(resolved)}")
        load_codec(resolved)
    except (ValueError, OSError) as error:
        raise failed(error) from None


@app.command()
def plan_memory(
    overrides: Overrides = None,
    config: ConfigFile = None,
    gpu_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory of one GPU, such as 80GiB or 79000MiB.")
    ] = "80GiB",
) -> None:
    """Say what would lie on every GPU, and how many 8k-token sequences fit. Reads no weights.

    Of the model and its draft head only config.json is needed (and fetched, for hub ids).

    Example:

        aerie plan-memory --config llama33-70b-8xh100 --gpu-memory 80GiB
    """
    from server.memory_plan import plan_memory as plan

    try:
        size = parse_bytes(gpu_memory, "--gpu-memory")
        found = plan(host_config(config, overrides or ()), size)
    except (ValueError, OSError) as error:
        raise failed(error) from None
    for line in found.lines():
        typer.echo(line)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(own_version())


draft_commands.register(app)


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
