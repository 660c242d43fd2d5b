"""The command `aerie serve`."""

from __future__ import annotations

import json
import logging
import signal
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from configs.host import host_config
from server.commands.options import SERVING, ConfigFile, Overrides, failed

logger = logging.getLogger(__name__)

Host = Annotated[
    str | None, typer.Option(help="Address to listen on (server.host).", show_default=False)
]
Port = Annotated[
    int | None, typer.Option(help="Port; 0 picks a free one (server.port).", show_default=False)
]
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
        help="Confirm that you may store what clients send and get (capture.consent).",
        show_default=False,
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        help="Print the whole configuration and all kernels (log.configuration).",
        show_default=False,
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command of this module to `app`."""
    app.command(rich_help_panel=SERVING)(serve)


def serve(
    overrides: Overrides = None,
    config: ConfigFile = None,
    host: Host = None,
    port: Port = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Accept this bearer token; may be repeated. Other users of this machine can see "
            "arguments: prefer server.api_key_file or AERIE_SERVER__API_KEYS.",
            show_default=False,
        ),
    ] = None,
    verbose: Verbose = False,
    capture: CaptureFolder = None,
    capture_consent: CaptureConsent = False,
) -> None:
    """Start the server. Prints what it serves, then, at last, one line `READY <url>`.

    Settings come from the file, then `AERIE_SECTION__KEY` environment variables, then the command
    line; `aerie config` lists all of them. SIGTERM and Ctrl-C drain: open requests finish (up to
    server.drain_timeout seconds), new ones get 503.

    Examples:

        aerie serve

        aerie serve --config smollm2-fp32 --port 8123 cache.num_blocks=512

        aerie serve model.source=/models/Llama-3.2-1B-Instruct server.api_key_file=keys.txt
    """
    # Until the server has its own handler: PID 1 of a container ignores signals without one.
    signal.signal(signal.SIGTERM, _leave)
    from server.process.launcher import serve as run

    options = {
        "server.host": host,
        "server.port": port,
        "server.api_keys": api_key,
        "log.configuration": verbose or None,
        "capture.dir": None if capture is None else str(capture),
        "capture.consent": capture_consent or None,
    }
    extra = [
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in options.items()
        if value is not None
    ]
    resolved = None
    try:
        resolved = host_config(config, [*(overrides or ()), *extra])
        raise typer.Exit(run(resolved))
    except (ValueError, OSError) as error:
        if resolved is not None and resolved.log.format == "json":
            logger.error("%s", error)
            raise typer.Exit(2) from None
        raise failed(error) from None


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)
