"""The command `aerie`."""

from __future__ import annotations

import typer

from server.commands import drafts, plan, serve

app = typer.Typer(
    help="Aerie serves Llama models over the OpenAI HTTP API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for commands in (serve, plan, drafts):
    commands.register(app)


@app.callback()
def _group() -> None:
    """There are no options before the sub-command."""


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    typer.echo(installed("aerie"))


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
