"""What rank 0 tells its followers besides plans. Without followers, nothing."""

from __future__ import annotations

import msgspec

from engine.parallel.channel import Broadcast
from engine.parallel.frames import (
    DraftLoaded,
    DropDraft,
    LoadDraft,
    OpenScratch,
    Order,
    Stop,
    UseDraft,
)


class Orders:
    """Sends orders, in their place between the plans."""

    def __init__(self, followers: Broadcast) -> None:
        self._followers = followers

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
        self._followers.send(msgspec.msgpack.encode(order))
