"""The orders of rank 0 to its followers, and their answers: msgpack, no pickles. Without followers
nothing is sent."""

from __future__ import annotations

import msgspec

from engine.parallel.transport import Broadcast
from engine.step.plan import StepPlan


class RunStep(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """Launch this plan."""

    plan: StepPlan
    scratch: bool = False  # on the runner that measures a head, not on the serving one


class LoadDraft(msgspec.Struct, frozen=True, array_like=True, tag="load"):
    """Load the head in this directory in a thread, and answer with `DraftLoaded`."""

    path: str


class PrepareDraft(msgspec.Struct, frozen=True, array_like=True, tag="prepare"):
    """Capture the next step with the head that was loaded last, or without a head if not `loaded`:
    one order for each step, and one more."""

    loaded: bool


class UseDraft(msgspec.Struct, frozen=True, array_like=True, tag="use"):
    """From the next plan on, draft with the head that was loaded last, or without a head if not
    `loaded`. `PrepareDraft` came before."""

    loaded: bool


class DropDraft(msgspec.Struct, frozen=True, array_like=True, tag="drop"):
    """Drop the head that was loaded last, because another rank could not load it."""


class OpenScratch(msgspec.Struct, frozen=True, array_like=True, tag="scratch"):
    """Build the runner that measures the last loaded head; it replaces an earlier such runner."""


class DraftLoaded(msgspec.Struct, frozen=True, array_like=True, tag="loaded"):
    """A follower's answer; `error` says why the head cannot be used."""

    rank: int
    error: str | None


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """End the follower."""


Order = RunStep | LoadDraft | PrepareDraft | UseDraft | DropDraft | OpenScratch | Stop


class Orders:
    """Sends orders; all ranks carry them out in the order of sending."""

    def __init__(self, followers: Broadcast) -> None:
        self._followers = followers
        self._encoder = msgspec.msgpack.Encoder()

    def run_step(self, plan: StepPlan, *, scratch: bool) -> None:
        self._send(RunStep(plan, scratch))

    def load_draft(self, path: str) -> None:
        """Make followers load the head in the directory `path`; call `failures` next."""
        self._send(LoadDraft(path))

    def failures(self) -> list[str]:
        """Wait until every follower has loaded the head or failed; returns which failed and why."""
        reasons = []
        for rank, frame in enumerate(self._followers.receive_all(), 1):
            if frame is None:
                reasons.append(f"rank {rank} has ended")
                continue
            answer = msgspec.msgpack.decode(frame, type=DraftLoaded)
            if answer.error is not None:
                reasons.append(f"rank {answer.rank}: {answer.error}")
        return reasons

    def drop_draft(self) -> None:
        self._send(DropDraft())

    def prepare_draft(self, *, loaded: bool) -> None:
        self._send(PrepareDraft(loaded))

    def use_draft(self, *, loaded: bool) -> None:
        self._send(UseDraft(loaded))

    def open_scratch(self) -> None:
        self._send(OpenScratch())

    def stop(self) -> None:
        self._send(Stop())

    def _send(self, order: Order) -> None:
        self._followers.send(self._encoder.encode(order))
