"""A server for one chat: started when none answers, ended with the chat."""

from __future__ import annotations

import queue
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import IO, Self

READY = re.compile(r"READY (\S+)")
PROGRAM = f"{__package__.removesuffix('terminal')}cli"  # also where it is installed as aerie.server
SHOWN_LINES = 5  # of its log, if it does not start


class BackgroundServer:
    """`aerie serve` on a free port, as a context manager; `url` is where."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = arguments
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by `close`
        self.url = ""

    def __enter__(self) -> Self:
        """Waits until it is ready.

        Raises:
            OSError: it ended instead.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-m", PROGRAM, "serve", "--port", "0", *self._arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # Ctrl-C stops an answer, not the server
        )
        assert self._process.stdout is not None
        found: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        reader = threading.Thread(target=_read, args=(self._process.stdout, found), daemon=True)
        reader.start()
        try:
            url = found.get()
        except BaseException:
            self.close()
            raise
        if url is None:
            self._process.wait()
            problem = self._newest_lines()
            self.close()
            raise OSError(f"the server did not start:\n{problem}")
        self.url = url
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it, and wait for its end."""
        self._process.terminate()
        self._process.wait()
        self._log.close()

    def _newest_lines(self) -> str:
        self._log.seek(0)
        lines = self._log.read().splitlines()
        return "\n".join(lines[-SHOWN_LINES:])


def _read(pipe: IO[str], found: queue.SimpleQueue[str | None]) -> None:
    """Read the output to its end, so that the server can go on; tell the address, or None."""
    with pipe:
        for line in pipe:
            if (ready := READY.match(line)) is not None:
                found.put(ready[1])
    found.put(None)
