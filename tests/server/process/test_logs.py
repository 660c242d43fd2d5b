"""The format of log records."""

from __future__ import annotations

import json
import logging
from typing import Any

from configs.schema import LogConfig
from server.process.logs import log_formatter


def test_json_log_lines_are_objects() -> None:
    formatter = log_formatter(LogConfig(format="json"))
    record = logging.LogRecord("a", logging.INFO, "", 0, "x %s", ("y",), None)
    assert json.loads(formatter.format(record))["message"] == "x y"
    record.__dict__["fields"] = {"event": "request", "status": 200}
    entry: dict[str, Any] = json.loads(formatter.format(record))
    assert (entry["event"], entry["status"], entry["level"]) == ("request", 200, "info")
