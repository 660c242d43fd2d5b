"""The launcher, `aerie serve` itself: opens the port and keeps the HTTP process running. That one
keeps the engine process running."""

from __future__ import annotations

import contextlib
import os
import sys

from configs.resolve import HostConfig
from server.assembly.roles.role import check_transfer
from server.process.http_process import run_http_process
from server.process.setup.listening import check_tls, open_listener
from server.process.setup.logs import set_up_logging
from server.process.setup.open_files import raise_limit
from server.process.setup.socket_folder import remove_stale_folders
from server.process.supervision.restarts import Restarts
from server.process.supervision.supervisor import supervise

SWITCH_INTERVAL = 0.001  # seconds that other threads keep the event loop waiting


def serve(config: HostConfig) -> int:
    """Run the server until it is told to stop; returns the exit code.

    Raises:
        OSError, ValueError: the port, the model's files or the API keys cannot be used, or NIXL
            is missing.
    """
    set_up_logging(config.log)
    sys.setswitchinterval(SWITCH_INTERVAL)
    raise_limit()
    remove_stale_folders()
    check_tls(config.server)
    check_transfer(config.parallel)
    listener = open_listener(config.server)
    limit = Restarts(config.server.max_restarts) if config.server.restart_engine else None
    launcher = os.getpid()
    try:
        with contextlib.closing(listener):
            return supervise(lambda pipe: run_http_process(config, listener, pipe), limit)
    finally:
        if config.server.socket is not None and os.getpid() == launcher:
            config.server.socket.unlink(missing_ok=True)
