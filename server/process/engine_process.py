"""The engine process: builds an engine, then serves messages until told to stop.

Run as `python -m server.process.engine_process ENDPOINT [ROLE]` with the configuration as JSON in
the first line of standard input; ROLE is the text of a `Role`, whose handles are open. The engine
ends when this pipe closes, that is, with its parent.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from typing import Protocol

import zmq

from configs.resolve import HostConfig
from engine.capture import CaptureWriter, ShardWriter
from engine.core import EngineCore
from engine.messages import (
    ClientMessage,
    DraftSwapped,
    EngineFailed,
    ErrorCode,
    Shutdown,
    SwapDraft,
)
from engine.progress import finish
from server.assembly.roles.role import Role
from server.process.channel.wire import decode_client, encode, unbounded
from server.process.setup.garbage import spare_loaded
from server.process.setup.logs import set_up_logging, show_stacks_on_request
from server.process.setup.parent import die_with_parent, open_pipe
from server.process.setup.socket_folder import folder_of

EXIT_BAD_SETUP = 3  # the configuration or the model is invalid: starting again would not help
BEAT = 1.0  # seconds between signs of life while a draft head is loaded or a prompt awaited
LOADING_POLL = 0.02  # seconds between polls of a draft head that is being loaded, when idle
STOPPING = "the server is shutting down"

logger = logging.getLogger(__name__)


class EngineChannel:
    """The engine's end of the ZeroMQ pair."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        unbounded(self._socket)
        self._socket.connect(endpoint)

    def receive(self, *, wait: bool, at_most: float | None = None) -> list[ClientMessage]:
        """All messages that have arrived. With `wait`, first waits for one, if `at_most` is given
        no longer than that many seconds."""
        messages: list[ClientMessage] = []
        if wait and at_most is not None and not self._socket.poll(int(at_most * 1000)):
            return messages
        flags = 0 if wait else zmq.NOBLOCK
        try:
            while True:
                messages += decode_client(self._socket.recv(flags))
                flags = zmq.NOBLOCK
        except zmq.Again:
            return messages

    def send(self, frame: bytes) -> None:
        self._socket.send(frame)

    def close(self) -> None:
        """Send what is still queued, then close."""
        self._socket.close(linger=1000)
        self._context.term()


class Swaps(Protocol):
    """Requested swaps of the draft head; see `DraftSwaps`."""

    @property
    def busy(self) -> bool: ...

    def ask(self, message: SwapDraft) -> None: ...

    def settle(self) -> list[DraftSwapped]: ...


def run(core: EngineCore, channel: EngineChannel, swaps: Swaps) -> None:
    """Serve until a `Shutdown` comes. An exception in a step ends all requests and the process: its
    state may be inconsistent, and the HTTP process starts a new engine."""
    channel.send(encode([core.info]))
    sent_at = time.monotonic()
    try:
        while True:
            idle_for = BEAT if core.awaits_peers else None
            at_most = LOADING_POLL if swaps.busy else idle_for
            for message in channel.receive(wait=not core.has_work(), at_most=at_most):
                if isinstance(message, Shutdown):
                    channel.send(encode(core.abort_all(STOPPING, ErrorCode.STOPPING)))
                    return
                if isinstance(message, SwapDraft):
                    swaps.ask(message)
                else:
                    core.add(message)
            if answers := swaps.settle():
                channel.send(encode(answers))
            if core.has_work():
                channel.send(encode(core.step()))
                sent_at = time.monotonic()
            elif (swaps.busy or core.awaits_peers) and time.monotonic() - sent_at > BEAT:
                channel.send(encode([core.stats()]))
                sent_at = time.monotonic()
    except Exception as error:
        channel.send(encode([EngineFailed()]))
        channel.send(encode(core.abort_all(f"the engine failed: {type(error).__name__}")))
        raise


def main() -> None:
    """Entry point of the process."""
    show_stacks_on_request()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles a terminal's Ctrl-C
    endpoint = sys.argv[1]
    pipe = open_pipe()
    config = HostConfig.model_validate_json(pipe.readline())
    set_up_logging(config.log)
    die_with_parent(pipe)
    try:
        from server.assembly.compose import build_swappable_engine
        from server.assembly.swaps import DraftSwaps

        role = Role.from_text(sys.argv[2]) if len(sys.argv) > 2 else None
        writes = role is None or not role.computes_prompts
        capture = open_capture(config) if writes else None
        engine = build_swappable_engine(config, folder_of(endpoint), capture, role)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        logger.error("the engine cannot start: %s", error)
        logger.debug("", exc_info=True)
        raise SystemExit(EXIT_BAD_SETUP) from None
    finally:
        finish()
    if capture is not None:
        capture.start()
    spare_loaded()
    try:
        swaps = DraftSwaps(engine.core, engine.swapper, config.speculation.load_timeout)
        _serve(endpoint, engine.core, swaps, capture)
    except Exception as error:
        engine.followers.abandon(f"rank 0 failed: {error!r}")
        raise
    engine.close()


def _serve(endpoint: str, core: EngineCore, swaps: Swaps, capture: CaptureWriter | None) -> None:
    channel = EngineChannel(endpoint)
    try:
        run(core, channel, swaps)
    finally:
        if capture is not None:
            capture.close()
        channel.close()


def open_capture(config: HostConfig) -> CaptureWriter | None:
    """What writes sequences down, None unless the operator wants it. A head that learns from them
    reads complete shards. ValueError when the directory cannot be used."""
    capture, learning = config.capture, config.speculation
    if capture.dir is None:
        return None
    size = min(capture.shard_tokens, learning.learn_tokens) if learning.learn else None
    shards = ShardWriter(capture.dir, capture.max_bytes, size or capture.shard_tokens)
    return CaptureWriter(shards, capture.sample_rate)


if __name__ == "__main__":
    main()
