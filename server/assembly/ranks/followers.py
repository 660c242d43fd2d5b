"""The follower processes, seen from rank 0: starts them, watches them, ends them."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from configs.resolve import HostConfig
from configs.schema import Config
from engine.parallel.distributed import DistributedGroup
from engine.parallel.lockstep import Progress
from engine.parallel.orders import Orders
from engine.parallel.transport import Board, Broadcast, Channel
from engine.parallel.watchdog import Watchdog
from engine.step.group import TPGroup
from server.assembly.ranks.meeting_folder import RANKS, STORE

EXIT_LOST = 4  # a rank was lost, so the engine ends; the HTTP process starts a new one
LAST_STEP = 1.0  # seconds for followers to end once they are told to

SERVER = __name__.partition(".assembly.")[0]  # "aerie.server" where Aerie is installed

logger = logging.getLogger(__name__)
Process = subprocess.Popen[bytes]


@dataclass(frozen=True, slots=True)
class Followers:
    """The other ranks of an engine; there may be none."""

    processes: Sequence[Process]
    broadcast: Broadcast
    progress: Progress
    watchdog: Watchdog
    folder: Path | None  # where ranks meet

    @classmethod
    def start(cls, config: HostConfig, parent: Path | None = None) -> Followers:
        """Start `parallel.tensor` - 1 processes, which load their part at once. When one of them is
        lost, this process ends, too. `parent`: a folder for files, which somebody removes who
        outlives this process. OSError when a process or shared memory cannot be had."""
        progress = Progress(config.parallel.start_timeout)
        if config.parallel.tensor == 1:
            return cls((), Broadcast(()), progress, Watchdog((), progress, _ignore), None)
        with contextlib.ExitStack() as undo:  # clean up after a failure half-way
            folder = Path(tempfile.mkdtemp(prefix=RANKS, dir=parent))
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            board = Board.create(config.parallel.tensor - 1)
            undo.callback(board.close)
            pairs: list[tuple[Process, socket.socket]] = []
            for rank in range(1, config.parallel.tensor):
                process, own = _spawn(config, rank, folder, board)
                undo.callback(own.close)
                undo.callback(_kill, [process])
                pairs.append((process, own))
            undo.pop_all()
        processes = [process for process, _ in pairs]
        end = functools.partial(_end_engine, processes, folder)
        watchdog = Watchdog([process.pid for process in processes], progress, end)
        watchdog.start()
        broadcast = Broadcast([Channel(own) for _, own in pairs], board)
        return cls(processes, broadcast, progress, watchdog, folder)

    @property
    def orders(self) -> Orders:
        return Orders(self.broadcast)

    def meet(self, config: Config, device: torch.device) -> TPGroup:
        """Wait for all ranks; return their group."""
        if self.folder is None:
            return TPGroup()
        group = join(config, self.folder / STORE, 0, device)
        if device.type == "cpu":  # NCCL reads the store again later
            shutil.rmtree(self.folder, ignore_errors=True)
        return group

    def abandon(self, reason: str) -> None:
        """If there are followers, kill them and exit at once: a regular exit might wait for a
        collective that never ends."""
        if self.folder is not None:
            _end_engine(self.processes, self.folder, reason)

    def stop(self, group: TPGroup | None = None) -> None:
        """Stop the followers, and kill those that do not end by themselves; close the `group`."""
        self.watchdog.stop()
        try:
            self.orders.stop()
        except OSError as error:
            logger.debug("a follower is gone already: %s", error)
        if group is not None:
            group.close()
        end = time.monotonic() + LAST_STEP
        for rank, process in enumerate(self.processes, 1):
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                logger.warning("rank %d does not end by itself", rank)
        _kill(self.processes)
        self.broadcast.close()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def join(config: Config, store: Path, rank: int, device: torch.device) -> DistributedGroup:
    """Meet the other ranks; every rank calls it."""
    size, timeout = config.parallel.tensor, config.parallel.start_timeout
    return DistributedGroup.join(store, rank, size, device, timeout)


def device_of(rank: int, config: Config) -> torch.device:
    """The device of a rank. ValueError when there are fewer GPUs than ranks."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if config.parallel.tensor > torch.cuda.device_count():
        raise ValueError(
            f"parallel.tensor = {config.parallel.tensor}: every rank needs a GPU, and there are "
            f"{torch.cuda.device_count()}"
        )
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    return device


def _spawn(
    config: HostConfig, rank: int, folder: Path, board: Board
) -> tuple[Process, socket.socket]:
    own, theirs = socket.socketpair()
    command = ["-P", "-m", f"{SERVER}.process.follower", str(rank), str(folder / STORE)]
    handles = [theirs.fileno(), board.memory, board.wake_handle]
    with theirs:
        process = subprocess.Popen(
            [sys.executable, *command, *map(str, handles)],
            stdin=subprocess.PIPE,
            pass_fds=handles,
        )
    assert process.stdin is not None
    process.stdin.write(config.model_dump_json().encode() + b"\n")
    process.stdin.flush()
    return process, own


def _end_engine(processes: Sequence[Process], folder: Path, reason: str) -> NoReturn:
    logger.error("%s: the engine ends", reason, exc_info=sys.exc_info()[0] is not None)
    for process in processes:
        process.kill()  # not waited for: one that hangs in a driver may never end
    shutil.rmtree(folder, ignore_errors=True)
    logging.shutdown()
    os._exit(EXIT_LOST)


def _kill(processes: Sequence[Process]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def _ignore(reason: str) -> None:
    """One rank has no followers to lose."""
