"""Logging of a process: one handler on standard error."""

from __future__ import annotations

import json
import logging
import sys

from configs.schema import LogConfig


def set_up_logging(config: LogConfig) -> None:
    """Send the records of this process to standard error, in the configured format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(log_formatter(config))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(config.level.upper())
    for name in ("httpx", "urllib3", "asyncio", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.WARNING)


class JsonFormatter(logging.Formatter):
    """One JSON object per line; the `fields` of a record become its members."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = getattr(record, "fields", None)
        entry |= fields if fields is not None else {"message": record.getMessage()}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def log_formatter(config: LogConfig) -> logging.Formatter:
    """The formatter of `log.format`."""
    if config.format == "json":
        return JsonFormatter()
    return logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")
