"""The server that a command talks to: one that runs, or one of its own."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console

from server.commands.options import DEFAULT_URL
from server.terminal.background import BackgroundServer
from server.terminal.remote import Remote


@contextmanager
def reached(
    url: str | None,
    api_key: str | None,
    overrides: list[str] | None,
    config: Path | None,
    console: Console,
) -> Iterator[Remote]:
    """The server at `url`; without one, that at DEFAULT_URL, or if none answers there or settings
    are given, one that is started and ends with the block.

    Raises:
        ValueError: settings for a server that runs already, or an odd URL or key.
        OSError: the server did not start.
    """
    settings = bool(overrides) or config is not None
    if settings and url is not None:
        raise ValueError("--url names a server that runs: its settings are its own")
    remote = Remote(url or DEFAULT_URL, api_key)
    with _leaving_at_signals():
        if url is not None or (not settings and remote.answers()):
            yield remote
            return
        chosen = [] if config is None else ["--config", str(config)]
        own = BackgroundServer([*chosen, *(overrides or ())])
        with console.status("Loading the model"):
            own.__enter__()
        try:
            yield Remote(own.url, api_key)
        finally:
            own.close()


@contextmanager
def _leaving_at_signals() -> Iterator[None]:
    """End as usual, and with it a server of our own, when told to or when the window closes."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, _leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)
