"""The command `aerie`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from server.commands import bench, chat, deploy, drafts, models, plan, quantize, serve
from server.commands.options import LOOKING
from server.version import version as own_version

app = typer.Typer(
    help="Aerie serves Llama models over the OpenAI HTTP API.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for commands in (serve, chat, models, bench, deploy, plan, drafts, quantize):
    commands.register(app)


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
    """Options before the sub-command."""


@app.command(rich_help_panel=LOOKING)
def version() -> None:
    """Print the version."""
    typer.echo(own_version())


def main() -> None:
    """Entry point of the console script."""
    open_standard_streams()
    app()


def open_standard_streams() -> None:
    """Replace streams that the caller has closed by ones that say and hear nothing: else files and
    sockets would get their numbers, and be written to."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is taken.
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(number, True)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


if __name__ == "__main__":
    main()
