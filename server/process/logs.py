"""Logging of a process: one handler on standard error."""

from __future__ import annotations

import logging
import sys

from configs.schema import LogConfig
from server.http.request_log import log_formatter


def set_up_logging(config: LogConfig) -> None:
    """Send the records of this process to standard error, in the configured format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(log_formatter(config))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(config.level.upper())
    for name in ("httpx", "urllib3", "asyncio", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.WARNING)
