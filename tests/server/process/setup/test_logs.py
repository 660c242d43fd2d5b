"""The format of log records."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from typing import Any

import pytest
import yaml

from configs.schema import LogConfig
from engine.progress import Progress
from server.process.announcement import announcement
from server.process.setup.logs import TerminalHandler, log_formatter, quiet


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


def test_progress_is_one_line_of_a_terminal_that_other_lines_take_the_place_of() -> None:
    stream = io.StringIO()
    handler = TerminalHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for progress in (Progress("loading", 3, 12), Progress("step", 7), Progress("starting")):
        record = logging.makeLogRecord({"msg": "a", "progress": progress})
        handler.handle(record)
    handler.handle(logging.makeLogRecord({"msg": "a warning"}))
    handler.handle(logging.makeLogRecord({"msg": "done", "progress": Progress("")}))
    assert stream.getvalue().split(TerminalHandler.CLEARED) == [
        "",
        "loading [######..................] 3 of 12",
        "step 7",
        "starting",
        "a warning\n",
        "",
    ]


WATCHED = """
from configs.schema import LogConfig
from engine.progress import finish, report
from server.process.setup.logs import set_up_logging
set_up_logging(LogConfig())
report("loading", 1, 2)
finish()
"""


@pytest.mark.parametrize(("terminal", "term"), [(True, "xterm"), (True, "dumb"), (False, "xterm")])
def test_progress_is_for_terminals_that_can_draw(terminal: bool, term: str) -> None:
    theirs, ours = os.openpty() if terminal else os.pipe()
    variables = os.environ | {"TERM": term}
    subprocess.run([sys.executable, "-c", WATCHED], stderr=ours, check=True, env=variables)
    os.write(ours, b"end")
    text = ""
    while not text.endswith("end"):  # a terminal gives what was written piece by piece
        text += os.read(theirs, 1000).decode()
    os.close(theirs)
    os.close(ours)
    assert ("loading [" in text) == (terminal and term == "xterm")


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
