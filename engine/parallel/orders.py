"""What rank 0 tells its followers, and what they answer: msgpack, no pickles. Without followers,
nothing."""

from __future__ import annotations

import msgspec

from engine.parallel.transport import Broadcast
from engine.step.plan import StepPlan


class RunStep(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """Launch this plan."""

    plan: StepPlan
    scratch: bool = False  # on the runner that measures a head, not on the one that serves


class LoadDraft(msgspec.Struct, frozen=True, array_like=True, tag="load"):
    """Load the head in this directory on a thread, and answer with `DraftLoaded`."""

    path: str


class UseDraft(msgspec.Struct, frozen=True, array_like=True, tag="use"):
    """Draft with the head that was loaded last, from the next plan on; not `loaded`: with none."""

    loaded: bool


class DropDraft(msgspec.Struct, frozen=True, array_like=True, tag="drop"):
    """Forget the head that was loaded last: another rank could not load it."""


class OpenScratch(msgspec.Struct, frozen=True, array_like=True, tag="scratch"):
    """Build the runner that measures the head that was loaded last, instead of an earlier one."""


class DraftLoaded(msgspec.Struct, frozen=True, array_like=True, tag="loaded"):
    """A follower's answer; `error` says why the head cannot be used."""

    rank: int
    error: str | None


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """Leave."""


Order = RunStep | LoadDraft | UseDraft | DropDraft | OpenScratch | Stop


class Orders:
    """Sends orders, in the order in which all ranks follow them."""

    def __init__(self, followers: Broadcast) -> None:
        self._followers = followers
        self._encoder = msgspec.msgpack.Encoder()

    def run_step(self, plan: StepPlan, *, scratch: bool) -> None:
        self._send(RunStep(plan, scratch))

    def load_draft(self, path: str) -> None:
        """Let followers load the head in the directory `path`; `failures` must be called next."""
        self._send(LoadDraft(path))

    def failures(self) -> list[str]:
        """Wait until every follower has loaded or failed; says who failed, and why."""
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

    def use_draft(self, *, loaded: bool) -> None:
        self._send(UseDraft(loaded))

    def open_scratch(self) -> None:
        self._send(OpenScratch())

    def stop(self) -> None:
        self._send(Stop())

    def _send(self, order: Order) -> None:
        self._followers.send(self._encoder.encode(order))
