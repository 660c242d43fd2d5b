"""The command `aerie deploy`."""

from __future__ import annotations

import importlib.util
import json
from typing import Annotated

import typer

from configs.env import environment, set_up_ray
from configs.load import load_config
from server.commands.options import SERVING, ConfigFile, Overrides, failed

MISSING = "Ray is not installed: pip install 'aerie[ray]'"

app = typer.Typer(help="Run several engines as one server.", no_args_is_help=True)


def register(parent: typer.Typer) -> None:
    """Add the command of this module to `parent`."""
    parent.add_typer(app, name="deploy", rich_help_panel=SERVING)


@app.callback()
def _group() -> None:
    """Run several engines as one server."""


@app.command()
def ray(
    overrides: Overrides = None,
    config: ConfigFile = None,
    replicas: Annotated[
        int | None, typer.Option(help="Engines (fleet.replicas).", show_default=False)
    ] = None,
    max_replicas: Annotated[
        int | None,
        typer.Option(
            help="Most engines, started as the load needs them (fleet.max_replicas).",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on (server.host).", show_default=False)
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="Port; 0 picks a free one (server.port).", show_default=False),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="A running Ray cluster: `auto`, or host:port. The application stays there. "
            "Default: a cluster on this machine, which ends with this command.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve with Ray Serve: engines as its replicas, and the API in front of them.

    Prints one line `READY <url>` when the engines are loaded. SIGTERM and Ctrl-C drain, as with
    `aerie serve`.

    Examples:

        aerie deploy ray --replicas 2

        aerie deploy ray --config llama31-8b-1xh100 --replicas 1 --max-replicas 8 --address auto
    """
    options = {
        "fleet.replicas": replicas,
        "fleet.max_replicas": max_replicas,
        "server.host": host,
        "server.port": port,
    }
    extra = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    try:
        found = load_config(config, [*(overrides or ()), *extra], environment())
        if importlib.util.find_spec("ray") is None:
            raise ValueError(MISSING)
        set_up_ray()
        from server.ray.deploy import deploy

        code = deploy(found, address)
    except (ValueError, OSError, RuntimeError) as error:
        raise failed(error) from None
    raise typer.Exit(code)
