"""The first signal ends training early; the second one does what it always did."""

from __future__ import annotations

import os
import signal

import pytest

from server.assembly.heads.early_end import at_first_signal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_is_not(number: signal.Signals) -> None:
    heard: list[str] = []
    before = signal.signal(number, lambda *_: heard.append("as before"))
    try:
        with at_first_signal(lambda: heard.append("first")):
            for _ in range(2):
                os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert heard == ["first", "as before", "as before"]
        with at_first_signal(lambda: heard.append("first")):
            pass
        os.kill(os.getpid(), number)
        assert heard[3:] == ["as before"]
    finally:
        signal.signal(number, before)
