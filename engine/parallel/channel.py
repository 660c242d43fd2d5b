"""Frames of bytes over a socket pair: four bytes of length, then the frame."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence

LENGTH = 4


class Channel:
    """One end. Any thread may send; one at a time may receive."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._sending = threading.Lock()

    def send(self, frame: bytes) -> None:
        """Raises OSError when the other end is gone."""
        with self._sending:
            self._end.sendall(len(frame).to_bytes(LENGTH, "little") + frame)

    def receive(self) -> bytes | None:
        """The next frame; None when the other end is gone."""
        head = self._read(LENGTH)
        return None if head is None else self._read(int.from_bytes(head, "little"))

    def close(self) -> None:
        self._end.close()

    def _read(self, size: int) -> bytes | None:
        parts = []
        while size:
            try:
                part = self._end.recv(size)
            except ConnectionError:
                return None
            if not part:
                return None
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


class Broadcast:
    """Rank 0's ends, one per follower: every frame goes to all of them, in the same order."""

    def __init__(self, channels: Sequence[Channel]) -> None:
        self._channels = channels
        self._sending = threading.Lock()

    def send(self, frame: bytes) -> None:
        """Raises OSError when a follower is gone."""
        with self._sending:
            for channel in self._channels:
                channel.send(frame)

    def receive_all(self) -> list[bytes | None]:
        """One frame of each follower, in order of ranks. One thread at a time."""
        return [channel.receive() for channel in self._channels]

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
