"""Folders for the socket between the two processes and the files of an engine; leftovers of killed
servers are removed."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from server.assembly.ranks.meeting_folder import RANKS, holds_nothing_else
from server.assembly.running_requests import RUNNING

PREFIX = "aerie-engine-"
SOCKET = "engine"
MAX_LOOKED_AT, MAX_REMOVED = 10_000, 100  # of the temporary folder
FRESH = 60.0  # seconds; by then an owner has locked its new folder


@contextlib.contextmanager
def private_endpoint() -> Iterator[str]:
    """The ZeroMQ address of a socket that only this user can reach. OSError if none can be made.

    The folder is locked as long as its owner lives. Unlike process numbers, locks also work between
    containers that share the temporary folder.
    """
    own = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
    with own as folder, _opened(Path(folder)) as handle:
        # Without locks in this file system, the folder is never removed.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield f"ipc://{Path(folder) / SOCKET}"


def folder_of(endpoint: str) -> Path:
    """The folder of a `private_endpoint`, which is removed when the engine has ended."""
    return Path(endpoint.removeprefix("ipc://")).parent


def remove_stale_folders() -> int:
    """Remove folders that killed servers of this user left; return how many."""
    num_removed = 0
    with contextlib.suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for entry in itertools.islice(entries, MAX_LOOKED_AT):
            if entry.name.startswith(PREFIX):
                num_removed += _remove_if_stale(Path(entry.path))
            if num_removed == MAX_REMOVED:
                break
    return num_removed


def _remove_if_stale(folder: Path) -> bool:
    """Remove the folder only if it is ours, unlocked, and holds only what engines leave."""
    try:
        with _opened(folder) as handle:
            status = os.fstat(handle)
            if status.st_uid != os.getuid() or time.time() - status.st_mtime < FRESH:
                return False
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            names = os.listdir(handle)
            if not all(_is_ours(name, handle) for name in names):
                return False
            for name in names:
                if name in (SOCKET, RUNNING):
                    os.unlink(name, dir_fd=handle)
                else:
                    shutil.rmtree(name, dir_fd=handle)
            folder.rmdir()
    except OSError:  # it is in use, not empty, or another user's: keep it
        return False
    return True


def _is_ours(name: str, parent: int) -> bool:
    """Whether it is our socket, our record of what runs, or a meeting folder of ranks that holds
    nothing else."""
    mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    if name == SOCKET:
        return stat.S_ISSOCK(mode)
    if name == RUNNING:
        return stat.S_ISREG(mode)
    if not (name.startswith(RANKS) and stat.S_ISDIR(mode)):
        return False
    with _opened(name, parent) as handle:
        return holds_nothing_else(handle)


@contextlib.contextmanager
def _opened(folder: Path | str, parent: int | None = None) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    try:
        yield handle
    finally:
        os.close(handle)
