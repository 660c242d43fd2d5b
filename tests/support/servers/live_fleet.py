"""`aerie deploy ray` as users run it: a cluster of Ray on this machine, and a real port."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

from tests.support.servers.live_server import LiveServer, command_line, descendants, wait_gone
from tests.support.waiting import wait_until

TAKING = re.compile(r"engines that take requests: (\d+)")  # said by a front end when it changes
RAY_SETTINGS = {
    # Ray pushes loads every ten seconds otherwise.
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_AUTH_MODE": "disabled",
    # A process that has no processor for some seconds is not dead. Ray asks anew, and starts anew,
    # what has not answered by then, which a busy machine can do least.
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "10",
    "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "10",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}


class LiveFleet(LiveServer):
    """`aerie deploy ray` on a free port."""

    def __init__(self, *overrides: str, **options: Any) -> None:
        super().__init__(*overrides, extra=RAY_SETTINGS, **options)
        self._arguments = ["deploy", "ray", "--port", "0", *overrides]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends a cluster that still runs, too: some of Ray's processes outlive a killed parent, and
        keep its pipes open."""
        running = descendants(self.pid) if self.process.poll() is None else ()
        for handle in list(_handles(running)):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            wait_gone(handle)
        super().__exit__(kind, error, trace)

    @property
    def engine_pids(self) -> list[int]:
        return [pid for pid in descendants(self.pid) if "engine_process" in command_line(pid)]

    def wait_engines(self, number: int) -> list[int]:
        """The engines, once so many run and a front end sees that so many take requests."""
        found: list[int] = []

        def are_there() -> bool:
            found[:] = self.engine_pids
            return len(found) == number == self._num_taking()

        wait_until(
            are_there,
            lambda: f"{len(found)} engines run, and {self._num_taking()} of them take requests",
        )
        return found

    def _num_taking(self) -> int:
        said = TAKING.findall(self.log.text())
        return int(said[-1]) if said else 0


def _handles(pids: Iterable[int]) -> Iterator[int]:
    """Of those processes that have not ended yet."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            yield os.pidfd_open(pid)
