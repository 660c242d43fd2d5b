"""A process that ends with its parent."""

from __future__ import annotations

import logging
import signal
import threading
from io import FileIO

STDIN = 0


def open_pipe() -> FileIO:
    """Standard input, which stays open as long as the parent lives. Unbuffered, so that the first
    line can be read and the end still be noticed."""
    return FileIO(STDIN, "rb", closefd=False)


def die_with_parent(pipe: FileIO) -> None:
    """From now on, exit at once when the parent's end of the pipe closes."""
    threading.Thread(target=_wait_for_end, args=(pipe,), daemon=True).start()


def _wait_for_end(pipe: FileIO) -> None:
    pipe.read(1)
    logging.shutdown()
    signal.raise_signal(signal.SIGKILL)
