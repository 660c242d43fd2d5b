"""Logging of a process: one handler on standard error."""

from __future__ import annotations

import faulthandler
import json
import logging
import signal
import sys
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TextIO

from configs.env import quiet_libraries, terminal_can_draw
from configs.schema import LogConfig
from engine.progress import ATTRIBUTE, Progress
from server.http.monitoring.tracing import CURRENT_TRACE

PACKAGES = __package__.removesuffix("server.process.setup")  # "aerie." where it is installed
STANDARD_ERROR = 2
BAR = 24  # characters
DETAILS = ("engine.runner", "drafter", "server.assembly.compose")  # of a start

logger = logging.getLogger(__name__)


def set_up_logging(config: LogConfig) -> None:
    """Send the records of this process to standard error, in the configured format: also warnings,
    and exceptions that nothing catches."""
    show_stacks_on_request()
    draws = config.format == "text" and sys.stderr.isatty() and terminal_can_draw()
    handler = TerminalHandler(sys.stderr) if draws else logging.StreamHandler(sys.stderr)
    handler.setFormatter(log_formatter(config))
    if draws:
        logging.getLogger(f"{PACKAGES}engine.progress").setLevel(logging.DEBUG)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(config.level.upper())
    for name in quiet(config):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    if config.format == "json":
        sys.excepthook = _log_uncaught
        threading.excepthook = _log_uncaught_in_thread
        quiet_libraries()


def show_stacks_on_request() -> None:
    """Let `kill -USR1` make this process write where each of its threads is to standard error."""
    faulthandler.register(signal.SIGUSR1, STANDARD_ERROR, all_threads=True)


def quiet(config: LogConfig) -> list[str]:
    """Loggers that say only what is wrong. A person who starts a server reads a few lines; the
    parts of the start are told with --verbose, at level debug, and in a log for machines."""
    found = ["httpx", "urllib3", "asyncio", "uvicorn.access"]
    if not config.configuration:
        found.append("uvicorn.error")  # tells of each part of the start
        if config.format == "text" and config.level == "info":
            found += [f"{PACKAGES}{name}" for name in DETAILS]
    return found


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    logger.critical("the process ends", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(caught: threading.ExceptHookArgs) -> None:
    if caught.exc_value is not None:
        logger.critical("a thread ends", exc_info=caught.exc_value)


def machine_line(event: str, fields: Mapping[str, Any]) -> str:
    """One line for standard output, as one of the log in its JSON format."""
    record = logging.makeLogRecord({"name": __name__, "levelno": logging.INFO, "levelname": "INFO"})
    record.fields = {"event": event, **fields}
    return JsonFormatter().format(record) + "\n"


class JsonFormatter(logging.Formatter):
    """One JSON object per line; the `fields` of a record become its members."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = getattr(record, "fields", None)
        if (trace := CURRENT_TRACE.get()) is not None:
            entry["trace_id"] = trace
        entry |= fields if fields is not None else {"message": record.getMessage()}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class TerminalHandler(logging.StreamHandler[TextIO]):
    """Draws progress in one line, which the next record, of any process, takes the place of."""

    CLEARED = "\r\x1b[K"  # the line that the cursor is in

    def format(self, record: logging.LogRecord) -> str:
        progress: Progress | None = getattr(record, ATTRIBUTE, None)
        self.terminator = "\n" if progress is None else ""
        return self.CLEARED + (super().format(record) if progress is None else drawn(progress))


def drawn(progress: Progress) -> str:
    """Fits in 60 columns of ASCII."""
    if not progress.total:
        return f"{progress.text} {progress.done or ''}".strip()
    bar = "#" * (BAR * progress.done // progress.total)
    return f"{progress.text} [{bar:.<{BAR}}] {progress.done} of {progress.total}"


def log_formatter(config: LogConfig) -> logging.Formatter:
    """The formatter of `log.format`."""
    if config.format == "json":
        return JsonFormatter()
    return logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")
