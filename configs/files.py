"""Reads files that an operator names: regular ones only, and no more of them than they may hold.

A named pipe would block its reader for ever, and a device may have no end. Symbolic links are
followed; what they lead to is checked.
"""

from __future__ import annotations

import os
import select
import stat
import time
from pathlib import Path

MAX_TEXT = 64 * 2**20  # bytes of a configuration, template or list of keys
PIPE_TIMEOUT = 10.0  # seconds for all that a pipe has to say
PIECE = 65_536


def check_regular(path: Path, max_bytes: int | None = None) -> None:
    """Check a file that a library is going to read.

    Raises:
        OSError: there is no such file.
        ValueError: it is no regular file, or has more than `max_bytes`.
    """
    status = path.stat()
    _check_kind(path, status)
    if max_bytes is not None and status.st_size > max_bytes:
        raise _too_long(path, max_bytes)


def read_text(path: Path, max_bytes: int = MAX_TEXT, *, pipes: bool = False) -> str:
    """The text of a file with at most `max_bytes`. `pipes`: it may also be a pipe, such as a
    shell's `<(command)`.

    Raises:
        OSError: it cannot be read; TimeoutError: a pipe does not end.
        ValueError: it is no regular file, too long, or not UTF-8.
    """
    content = read_bytes(path, max_bytes, pipes=pipes)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {content[error.start]:#04x} at {error.start}"
        raise ValueError(f"{path} is not UTF-8: {where}") from error


def read_bytes(path: Path, max_bytes: int = MAX_TEXT, *, pipes: bool = False) -> bytes:
    """As `read_text`, undecoded."""
    # Opening a pipe without O_NONBLOCK would wait for a writer.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(handle)
        if pipes and stat.S_ISFIFO(status.st_mode):
            content = _read_pipe(handle, max_bytes)
        else:
            _check_kind(path, status)
            content = _read_regular(handle, max_bytes)
    finally:
        os.close(handle)
    if len(content) > max_bytes:
        raise _too_long(path, max_bytes)
    return content


def _read_regular(handle: int, max_bytes: int) -> bytes:
    pieces, length = [], 0
    while length <= max_bytes and (piece := os.read(handle, max_bytes + 1 - length)):
        pieces.append(piece)
        length += len(piece)
    return b"".join(pieces)


def _read_pipe(handle: int, max_bytes: int) -> bytes:
    """Until the writer closes. Nothing at first means that the writer is still to come."""
    content, end = b"", time.monotonic() + PIPE_TIMEOUT
    while len(content) <= max_bytes:
        ready, _, _ = select.select([handle], [], [], 0 if content else _left(end))
        try:
            piece = os.read(handle, PIECE)
        except BlockingIOError:
            ready, _, _ = select.select([handle], [], [], _left(end))
            continue
        if not piece and (content or ready):
            break
        content += piece
    return content


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"the pipe was not written and closed within {PIPE_TIMEOUT:g} s")
    return left


def _check_kind(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        known = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = known.get(stat.S_IFMT(status.st_mode), "a device")
        raise ValueError(f"{path} is {kind}, not a regular file")


def _too_long(path: Path, max_bytes: int) -> ValueError:
    return ValueError(f"{path} has more than {max_bytes} bytes")
