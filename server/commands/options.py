"""Options shared by the commands of `aerie` that read a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from configs.load import shipped_configs
from server.terminal.screen import harmless

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        envvar="AERIE_CONFIG",
        metavar="FILE",
        help=f"YAML file, or a shipped one: {', '.join(shipped_configs())}.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.KEY=VALUE]...",
        help="Overrides, such as `model.dtype=float32 kernels.graphs=off server.api_keys=[a, b]`.",
        show_default=False,
    ),
]

# Headings of `aerie --help`.
SERVING = "Serve and talk"
LOOKING = "Models and settings"
MEASURING = "Measure and plan"
HEADS = "Draft heads"

DEFAULT_URL = "http://127.0.0.1:8000"
Url = Annotated[
    str | None,
    typer.Option(
        help=f"Any server of the OpenAI API. Default: {DEFAULT_URL}, and a server of its own if "
        "none answers there.",
        show_default=False,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="OPENAI_API_KEY", help="Key of the server.", show_default=False),
]


def failed(error: Exception) -> typer.Exit:
    """Print the error on one line; return the exit to raise."""
    typer.echo(f"aerie: {harmless(str(error))}", err=True)
    return typer.Exit(2)
