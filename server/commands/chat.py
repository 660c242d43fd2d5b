"""The command `aerie chat`."""

from __future__ import annotations

import contextlib
import signal
from types import FrameType
from typing import Annotated, NoReturn

import typer

from server.commands.options import ConfigFile, Overrides, failed

DEFAULT_URL = "http://127.0.0.1:8000"


def register(app: typer.Typer) -> None:
    """Add the command of this module to `app`."""
    app.command()(chat)


def chat(
    overrides: Overrides = None,
    config: ConfigFile = None,
    url: Annotated[
        str | None,
        typer.Option(
            help=f"Any server of the OpenAI API. Default: {DEFAULT_URL}, and a server of its own "
            "if none answers there.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Default: the server's first.", show_default=False)
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="OPENAI_API_KEY", help="Key of the server.", show_default=False),
    ] = None,
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

    from server.terminal.background import BackgroundServer
    from server.terminal.remote import Remote, RemoteError
    from server.terminal.session import Session

    for number in (signal.SIGTERM, signal.SIGHUP):  # also when the window closes, end the server
        signal.signal(number, _leave)
    console = Console(highlight=False)
    with contextlib.ExitStack() as stack:
        try:
            remote = Remote(url or DEFAULT_URL, api_key)
            if overrides or config is not None or (url is None and not remote.answers()):
                if url is not None:
                    raise ValueError("--url names a server that runs: its settings are its own")
                chosen = [] if config is None else ["--config", str(config)]
                with console.status("Loading the model"):
                    own = stack.enter_context(BackgroundServer([*chosen, *(overrides or ())]))
                remote = Remote(own.url, api_key)
            session = Session(remote, model or remote.models()[0], console)
        except (ValueError, OSError, RemoteError) as error:
            raise failed(error) from None
        session.tell(f"{session.model} at {remote.url}; /help lists the commands, Ctrl-D ends")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # lines can be edited
        session.run(lambda: console.input("[bold]> [/bold]"))


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)
