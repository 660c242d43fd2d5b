"""A follower rank: loads its part of the model, then carries out the orders of rank 0.

Run by rank 0 as `python -m server.process.follower RANK STORE SOCKET MEMORY WAKE`, where the last
three are open handles, with the configuration as JSON in the first line of standard input. It ends
when standard input or the socket closes.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import msgspec

from configs.resolve import HostConfig
from engine.parallel.agreement import RefusedByAllError
from engine.parallel.lockstep import Following
from engine.parallel.orders import (
    DraftLoaded,
    DropDraft,
    LoadDraft,
    OpenScratch,
    Order,
    PrepareDraft,
    RunStep,
    Stop,
    UseDraft,
)
from engine.parallel.transport import Board, Channel, Inbox
from server.assembly.drafting import Drafting, LoadedDraft
from server.assembly.ranks.followers import EXIT_LOST, device_of, join
from server.assembly.ranks.rank import BAD_SETUP, Rank, build_rank
from server.process.engine_process import EXIT_BAD_SETUP
from server.process.setup.garbage import spare_loaded
from server.process.setup.logs import set_up_logging
from server.process.setup.parent import die_with_parent, open_pipe

logger = logging.getLogger(__name__)


class Follower:
    """Carries out orders one after the other; only draft heads are loaded on another thread."""

    def __init__(self, rank: Rank, inbox: Inbox, channel: Channel) -> None:
        self._rank = rank
        self._inbox = inbox
        self._channel = channel  # for answers
        self._serving = Following(rank.executor)
        self._scratch: Following | None = None
        self._loaded: tuple[LoadedDraft, Drafting] | None = None
        self._next = Drafting()  # what `UseDraft` puts to use
        self._preparing: Iterator[None] | None = None

    def run(self) -> None:
        """Run until rank 0 sends `Stop` or ends."""
        decoder = msgspec.msgpack.Decoder(Order)
        while (frame := self._inbox.receive()) is not None:
            order = decoder.decode(frame)
            if isinstance(order, Stop):
                return
            self._do(order)

    def _do(self, order: Order) -> None:
        if isinstance(order, RunStep):
            runner = self._scratch if order.scratch else self._serving
            assert runner is not None, "no scratch was opened"
            runner.run(order.plan)
        elif isinstance(order, LoadDraft):
            threading.Thread(target=self._load, args=(order.path,), daemon=True).start()
        elif isinstance(order, PrepareDraft):
            self._prepare(self._loaded if order.loaded else None)
        elif isinstance(order, UseDraft):
            self._use(loaded=order.loaded)
        elif isinstance(order, DropDraft):
            self._loaded = None
        elif isinstance(order, OpenScratch):
            assert self._loaded is not None
            _, executor = self._rank.scratch(self._loaded[0])
            self._scratch = Following(executor)

    def _prepare(self, loaded: tuple[LoadedDraft, Drafting] | None) -> None:
        if self._preparing is None:
            draft, self._next = loaded or (None, Drafting())
            self._preparing = self._rank.prepare_swap(draft, self._next)
        next(self._preparing, None)

    def _use(self, *, loaded: bool) -> None:
        self._serving.land()
        self._rank.runner.draft_with(self._next.proposer)
        self._loaded = self._preparing = None
        if not loaded:
            self._scratch = None

    def _load(self, path: str) -> None:
        error = None
        try:
            self._loaded = self._rank.load_draft(Path(path))
        except (ValueError, OSError) as fault:
            error = str(fault)
        except Exception as fault:
            logger.exception("the draft head cannot be loaded")
            error = f"it cannot be loaded ({type(fault).__name__})"
        answer = DraftLoaded(self._rank.place.group.rank, error)
        self._channel.send(msgspec.msgpack.encode(answer))


def main() -> None:
    """Entry point of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the engine process
    number, store = int(sys.argv[1]), Path(sys.argv[2])
    end, memory, wake = map(int, sys.argv[3:])
    pipe = open_pipe()
    config = HostConfig.model_validate_json(pipe.readline())
    set_up_logging(config.log)
    die_with_parent(pipe)
    channel = Channel(socket.socket(fileno=end))
    inbox = Inbox(channel, Board(memory, wake), number - 1)
    try:
        device = device_of(number, config)
        rank = build_rank(config, join(config, store, number, device), device)
    except RefusedByAllError:
        inbox.receive()  # wait for `Stop`: rank 0 reports the error
        _leave(EXIT_BAD_SETUP)
    except BAD_SETUP as error:
        logger.error("rank %d cannot start: %s", number, error)
        logger.debug("", exc_info=True)
        _leave(EXIT_BAD_SETUP)
    spare_loaded()
    try:
        Follower(rank, inbox, channel).run()
    except Exception:
        logger.exception("rank %d failed", number)
        _leave(EXIT_LOST)
    rank.place.group.close()
    _leave(0)


def _leave(code: int) -> NoReturn:
    """Exit at once: a regular exit takes long, and might wait for other ranks."""
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    main()
