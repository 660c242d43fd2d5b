"""A server as users run it: real processes and a real port."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self
from urllib.parse import urlsplit

import httpx
import openai
import yaml

from configs.env import environment
from server.process.supervision.process_table import children_of, entries
from tests.support.waiting import DEADLINE, wait_until

STACKS_TIME = 2  # seconds for a process to write them
POLL = 0.05  # seconds between requests to a server, which needs the cores itself
READY = re.compile(
    r"READY (?P<url>http://\S+)  \(OpenAI base URL: (?P<base>\S+)\)\n"
    r'|"event": "ready", "url": "(?P<url_json>[^"]+)", "openai_base_url": "(?P<base_json>[^"]+)"'
)
OUTERMOST = r"in _run_module_as_main\n"  # ends the stack of the main thread, which comes last
REASON = re.compile(r'finished_reason="(\w+)"')
SAMPLE = re.compile(r"^(aerie:\w+)(\{.*\})? (\S+)$", re.MULTILINE)


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of this process without Aerie's variables and without access to the hub."""
    kept = {name: value for name, value in environment().items() if not name.startswith("AERIE_")}
    return kept | {"HF_HUB_OFFLINE": "1"} | dict(extra or {})


def aerie_command(*arguments: str) -> list[str]:
    """`aerie` of this interpreter, whatever is on PATH."""
    return [sys.executable, "-m", "server.cli", *arguments]


def run_aerie(
    *arguments: str, extra: Mapping[str, str] | None = None, prelude: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command that ends by itself; `prelude` is Python code to run before it."""
    command = aerie_command(*arguments)
    if prelude:
        program = f"{prelude}\nfrom server.cli import main; main()"
        command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
        env=child_environment(extra),
    )


class _Lines:
    """The output of a pipe so far; readers can wait for a line."""

    def __init__(self, pipe: IO[str]) -> None:
        self._pipe = pipe
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def text(self) -> str:
        with self._changed:
            return "".join(self._lines)

    def wait_for(
        self, pattern: str | re.Pattern[str], since: int = 0, within: float = DEADLINE
    ) -> re.Match[str] | None:
        """The first match after character `since` of the text; None when the pipe ended."""
        find = re.compile(pattern).search
        with self._changed:
            known = lambda: find("".join(self._lines)[since:]) or self._ended  # noqa: E731
            assert self._changed.wait_for(known, within), f"{pattern!r} never came"
            return find("".join(self._lines)[since:])

    def close(self) -> None:
        self._thread.join(DEADLINE)
        self._pipe.close()

    def _read(self) -> None:
        for line in self._pipe:
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class LiveServer:
    """`aerie serve` on a free port, as a context manager.

    Args:
        overrides: `section.key=value`.
        wait: return from `with` only once READY is printed.
        extra: further environment variables.
        verbose: print the whole configuration, which `resolved` reads.
    """

    def __init__(
        self,
        *overrides: str,
        config: str | None = None,
        wait: bool = True,
        extra: Mapping[str, str] | None = None,
        verbose: bool = True,
    ) -> None:
        chosen = [] if config is None else ["--config", config]
        chosen += ["--verbose"] if verbose else []
        self.overrides = overrides
        self._arguments = ["serve", *chosen, "--port", "0", *overrides]
        self._wait = wait
        self._extra = extra
        self._connections = contextlib.ExitStack()
        self.url = ""

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            aerie_command(*self._arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=child_environment(self._extra),
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.out, self.log = _Lines(self.process.stdout), _Lines(self.process.stderr)
        if self._wait:
            self.wait_ready()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            error.add_note(f"the server said:\n{self.log.text()}")
        self._connections.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(DEADLINE)
        self.out.close()
        self.log.close()

    def wait_ready(self) -> None:
        """Wait for READY to be printed."""
        try:
            match = self.out.wait_for(READY)
            assert match is not None, "the server ended instead"
        except AssertionError as error:
            self.show_stacks()
            self.__exit__(type(error), error, None)
            raise
        self.url = match["url"] or match["url_json"]
        assert (match["base"] or match["base_json"]) == f"{self.url}/v1"

    @property
    def resolved(self) -> dict[str, Any]:
        """The configuration printed before READY."""
        text = self.out.text()
        first = text.splitlines()[0] if text.startswith("{") else text.partition("READY")[0]
        found: dict[str, Any] = yaml.safe_load(first)
        return found

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def http_pid(self) -> int:
        """The child that answers requests now."""
        return self._one(lambda: _copies(self.pid))

    @property
    def engine_pid(self) -> int:
        """Its child that runs the engine now."""
        return self._one(lambda: _running(children_of(self.http_pid), "engine_process"))

    def _one(self, find: Callable[[], list[int]]) -> int:
        """The only process that `find` finds, once there is one: it may be starting."""
        found: list[int] = []

        def seen() -> bool:
            found[:] = find()
            return bool(found) or self.process.poll() is not None

        wait_until(seen)
        (pid,) = found
        return pid

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for the process to end by itself; return its exit code."""
        return self.process.wait(DEADLINE)

    def stop(self) -> int:
        """Send SIGTERM; return the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def client(self, **options: Any) -> openai.OpenAI:
        """A client without retries unless `max_retries` is given; closed with the server."""
        plain = openai.DefaultHttpxClient(verify=False)
        found = openai.OpenAI(**self._client_options(options), http_client=plain)
        return self._connections.enter_context(found)

    def async_client(self, **options: Any) -> openai.AsyncOpenAI:
        """As `client`, but the caller closes it."""
        plain = openai.DefaultAsyncHttpxClient(verify=False)
        return openai.AsyncOpenAI(**self._client_options(options), http_client=plain)

    def _client_options(self, options: dict[str, Any]) -> dict[str, Any]:
        default = {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0}
        return default | {"timeout": DEADLINE} | options

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        # Without `verify`, reading the certificates of the world takes longer than most answers.
        url = self.url + path
        return httpx.request(method, url, timeout=DEADLINE, verify=False, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.request("POST", path, json=body, **options)

    def metrics(self) -> dict[str, float]:
        """Every metric by name, added up over its labels; `ended_stop`, `ended_abort` and so on
        count requests by their reason."""
        found: dict[str, float] = {}
        for name, labels, value in SAMPLE.findall(self.get("/metrics").text):
            short = name.removeprefix("aerie:")
            found[short] = found.get(short, 0.0) + float(value)
            if short == "request_success_total" and (reason := REASON.search(labels)):
                found[f"ended_{reason[1]}"] = float(value)
        return found

    def wait_metrics(self, condition: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """Scrape until `condition` holds; return those metrics."""
        end = time.monotonic() + DEADLINE
        while not condition(found := self.metrics()):
            assert time.monotonic() < end, f"the metrics stayed at {found}"
            time.sleep(POLL)
        return found

    def wait_status(self, path: str, status: int) -> httpx.Response:
        """Poll until the answer has this status."""
        end = time.monotonic() + DEADLINE
        while (response := self.get(path)).status_code != status:
            if time.monotonic() > end:
                self.show_stacks()
                raise AssertionError(f"{path} stayed at {response.status_code}")
            time.sleep(POLL)
        return response

    def show_stacks(self) -> None:
        """Have each process of the server say in the log what its threads do."""
        for pid in descendants(self.pid):
            before = len(self.log.text())
            with contextlib.suppress(ProcessLookupError, AssertionError):
                os.kill(pid, signal.SIGUSR1)
                self.log.wait_for(OUTERMOST, before, within=STACKS_TIME)


def idle(metrics: Mapping[str, float]) -> bool:
    """Whether the engine has nothing to do and its cache is free."""
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return all(metrics[name] == 0 for name in gauges)


def post(url: str, path: str, body: bytes) -> socket.socket:
    """Send a request and return the unread connection, which has a small receive buffer."""
    address = urlsplit(url)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    connection = socket.socket()
    connection.settimeout(DEADLINE)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((address.hostname, address.port))
    connection.sendall(head.encode() + body)
    return connection


def wait_gone(pidfd: int) -> None:
    """Wait until the process of `pidfd` has ended, whoever its parent is."""
    assert select.select([pidfd], [], [], DEADLINE)[0], "the process lives on"
    os.close(pidfd)


def descendants(pid: int) -> list[int]:
    """`pid`, its children, theirs, and so on, parents first. From one look at all processes: a look
    for each of them takes as long as a server needs to start."""
    children = defaultdict(list)
    for entry in entries():
        children[entry.parent].append(entry.pid)
    found = [pid]
    for parent in found:
        found.extend(children[parent])
    return found


def _copies(pid: int) -> list[int]:
    """Children that run the program of their parent; others are what a dead one has left."""
    return _running(children_of(pid), command_line(pid))


def _running(pids: list[int], words: str) -> list[int]:
    return [pid for pid in pids if words in command_line(pid)]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""
