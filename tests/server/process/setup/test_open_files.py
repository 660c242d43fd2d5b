"""The limit of open files, in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import logging, resource
from server.process.setup.open_files import PROBES, RESERVE, connection_limit, raise_limit
logging.basicConfig()
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
raise_limit()
room = connection_limit(None)
found = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
print(found, found - RESERVE - PROBES - room, connection_limit(50) == min(50, room), room > 0)
"""


@pytest.mark.parametrize(
    ("soft", "hard", "used", "warns"), [(100, 200, range(3, 60), False), (24, 24, (), True)]
)
def test_the_limit_is_raised_and_connections_leave_a_reserve(
    soft: int, hard: int, used: range | tuple[()], warns: bool
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(soft=soft, hard=hard)],
        capture_output=True,
        text=True,
        check=True,
    )
    found, other, bounded, positive = done.stdout.split()
    assert (int(found), bounded, positive) == (hard, "True", "True")
    assert not used or int(other) in used
    assert ("leaves room for" in done.stderr) is warns
