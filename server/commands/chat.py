"""The command `aerie chat`."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from server.commands.options import SERVING, ApiKey, ConfigFile, Overrides, Url, failed


def register(app: typer.Typer) -> None:
    """Add the command of this module to `app`."""
    app.command(rich_help_panel=SERVING)(chat)


def chat(
    overrides: Overrides = None,
    config: ConfigFile = None,
    url: Url = None,
    model: Annotated[
        str | None, typer.Option(help="Default: the server's first.", show_default=False)
    ] = None,
    api_key: ApiKey = None,
) -> None:
    """Talk to a model in the terminal.

    Tokens have the colour of their origin: blue, the darker the deeper in the draft tree, if the
    draft head drafted them, orange if they were looked up, violet if a grammar forced them. /help
    lists what can be set. The configuration is for the server that the command starts.

    Examples:

        aerie chat

        aerie chat --url http://gpu-box:8000 --model llama

        aerie chat model.source=/models/Llama-3.2-1B-Instruct
    """
    from rich.console import Console

    from server.commands.reaching import reached
    from server.terminal.remote import RemoteError
    from server.terminal.session import Session

    console = Console(highlight=False)
    with contextlib.ExitStack() as stack:
        try:
            server = reached(url, api_key, overrides, config, console)
            remote = stack.enter_context(server)
            session = Session(remote, model or remote.models()[0], console)
        except (ValueError, OSError, RemoteError) as error:
            raise failed(error) from None
        session.tell(f"{session.model} at {remote.url}; /help lists the commands, Ctrl-D ends")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # lines can be edited
        session.run(lambda: console.input("[bold]> [/bold]"))
