"""Which tuning of attention is chosen from times, on keys too few to time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch

from kernels.attention.triton_plan import SHORT_STEPS, TUNINGS, Tuning
from kernels.registry import ATTENTION_DEFAULT
from tests.kernels import triton_env
from tests.kernels.triton_env import DEVICE

choice = triton_env.load("kernels.attention.triton_choice")
kernel = triton_env.load("kernels.attention.triton_kernel")
pytestmark = triton_env.MARKS

HEADS = choice.Heads(4, 2, 16, torch.float32, torch.bfloat16)
CONTEXTS = (17, 140)


@pytest.fixture(autouse=True)
def many_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_num_processors", lambda device: 132)


class Clock:
    """Says how long the runs of each tuning took, in the order in which they are timed."""

    def __init__(self, times: Sequence[float]) -> None:
        self._times = iter(times)

    def __call__(self, runs: Sequence[Callable[[], object]]) -> float:
        assert len(runs) == choice.CALLS
        return next(self._times)


choose = partial(choice.choose_tuning, HEADS, DEVICE, contexts=CONTEXTS, pool_bytes=2**15)
DIFFERENT = ["short", "early", "medium", "long", "long_parts"]


def test_the_least_sum_of_relative_times_wins(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    # Of both contexts, medium is best in neither.
    found = choose(Clock([12e-6, 30e-6, 9e-6, 31e-6, 7e-6, 20e-6, 6e-6, 24e-6, 8e-6, 19e-6]))
    assert list(found.seconds) == DIFFERENT
    assert found.name == "medium"
    assert "attention: medium; one row, 17 and 140 positions: short 12.0 and 30.0 us" in (
        caplog.text
    )


def test_what_gives_other_results_or_cannot_run_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def faulty(*args: object, tuning: Tuning) -> torch.Tensor:
        if tuning == TUNINGS["long"]:
            raise RuntimeError("out of resources")
        found = kernel.attention(*args, tuning=tuning)
        return found + (tuning == TUNINGS["medium"])

    monkeypatch.setattr(choice, "attention", faulty)
    found = choose(Clock([3.0, 3.0, 2.0, 2.0, 1.0, 1.0]))
    assert list(found.seconds) == ["short", "early", "long_parts"]
    assert "medium gives other results here" in caplog.text
    assert "long cannot run here" in caplog.text


def test_a_failure_of_what_has_run_most_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, tuning: Tuning) -> torch.Tensor:
        raise RuntimeError(tuning.name)

    monkeypatch.setattr(choice, "attention", broken)
    with pytest.raises(RuntimeError, match=SHORT_STEPS.name):
        choose(lambda runs: float(runs[0]() is None))


def test_tunings_have_names() -> None:
    assert {tuning.name for tuning in TUNINGS.values()} == set(TUNINGS)
    assert ATTENTION_DEFAULT in TUNINGS
