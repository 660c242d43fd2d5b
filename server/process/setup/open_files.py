"""The limit of open files of this process."""

from __future__ import annotations

import logging
import os
import resource
from pathlib import Path

from server.http.connection.connections import PROBES

MOST = 1 << 20  # files; a higher limit only makes some libraries slow
# Files to start an engine, to read and to write while all connections are in use; a quarter of all
# where there are few.
RESERVE = 32
OPEN = Path("/proc/self/fd")

logger = logging.getLogger(__name__)


def raise_limit() -> None:
    """Allow as many open files as the system lets this process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError) as error:
            logger.warning("the limit of open files stays at %d: %s", soft, error)


def connection_limit(configured: int | None) -> int:
    """Client connections that can be open at a time: those that `server.max_connections` allows,
    but no more than there are files left for, besides a reserve. At least one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST if soft == resource.RLIM_INFINITY else soft
    room = max(1, most - _num_open() - min(RESERVE, most // 4) - PROBES)
    if configured is not None and configured > room:
        logger.warning(
            "server.max_connections is %d, but the limit of open files, %d, leaves room for %d",
            configured,
            most,
            room,
        )
    return room if configured is None else min(configured, room)


def _num_open() -> int:
    try:
        return len(os.listdir(OPEN))
    except OSError:  # no /proc
        return 64
