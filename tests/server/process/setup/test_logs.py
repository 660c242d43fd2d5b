"""The format of log records."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from typing import Any

import yaml

from configs.schema import LogConfig
from server.process.announcement import announcement
from server.process.setup.logs import log_formatter, quiet


def test_json_log_lines_are_objects() -> None:
    formatter = log_formatter(LogConfig(format="json"))
    record = logging.LogRecord("a", logging.INFO, "", 0, "x %s", ("y",), None)
    assert json.loads(formatter.format(record))["message"] == "x y"
    record.__dict__["fields"] = {"event": "request", "status": 200}
    entry: dict[str, Any] = json.loads(formatter.format(record))
    assert (entry["event"], entry["status"], entry["level"]) == ("request", 200, "info")


def test_the_announcement_is_lines_of_json_where_the_log_is() -> None:
    facts = {"config": {"server": {"port": 1}}, "ops": {"linear": "native\nAMX"}}
    text = announcement(facts, "http://a:1", "json")
    configuration, ready = [json.loads(line) for line in text.splitlines()]
    assert configuration["event"] == "configuration"
    assert configuration | facts == configuration
    assert (ready["event"], ready["level"]) == ("ready", "info")
    assert (ready["url"], ready["openai_base_url"]) == ("http://a:1", "http://a:1/v1")
    first, last, _ = announcement(facts, "http://a:1", "text").rpartition("READY ")
    assert yaml.safe_load(first) == facts
    assert last == "READY "


def test_a_person_reads_a_few_lines_of_a_start_and_all_of_them_on_demand() -> None:
    parts = {"engine.runner", "drafter", "uvicorn.error"}
    assert parts <= set(quiet(LogConfig()))
    for config in (LogConfig(configuration=True), LogConfig(level="debug")):
        assert not {"engine.runner", "drafter"} & set(quiet(config))
    assert not {"engine.runner", "drafter"} & set(quiet(LogConfig(format="json")))


FAILING = """
import threading, warnings
from configs.schema import LogConfig
from server.process.setup.logs import set_up_logging
set_up_logging(LogConfig(format="json"))
warnings.warn("odd")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
raise KeyError("nobody catches it")
"""


def test_what_nothing_catches_is_lines_of_json_too() -> None:
    done = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["level"] for line in lines] == ["warning", "critical", "critical"]
    assert "odd" in lines[0]["message"]
    assert "ZeroDivisionError" in lines[1]["exception"]
    assert "nobody catches it" in lines[2]["exception"]
    assert done.returncode == 1
