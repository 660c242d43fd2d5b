"""Processes for work on what clients sent that a thread could not be stopped from.

Python cannot end a thread, but it can end a process. A child reads messages from standard input,
and answers each on standard output. An alarm bounds the time of an answer; memory has a limit.
"""

from __future__ import annotations

import contextlib
import queue
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import IO

import msgspec

LENGTH = 8  # bytes that say how long a message is
BY_OTHERS = {-signal.SIGKILL, -signal.SIGTERM}  # ends that its own limits do not cause


class Child:
    """A running process: `python -m module`, which calls `answer_parent`."""

    def __init__(self, module: str, setup: msgspec.Struct) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C is for the server
        )
        self._send(setup)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def killed(self) -> bool:
        """Whether something else than its own limits has ended it, such as the system when memory
        was short."""
        return self._process.poll() in BY_OTHERS

    def ask(self, message: msgspec.Struct) -> bytes:
        """The answer, encoded. EOFError or BrokenPipeError when the process ended instead, as it
        does when it takes too long; OverflowError for a number above 64 bits."""
        assert self._process.stdout is not None
        try:
            self._send(message)
            return read_message(self._process.stdout)
        except (EOFError, BrokenPipeError):
            self.end()
            raise
        except ValueError as error:  # of a pipe that another thread has closed, or the message
            if not self._process.stdout.closed:
                raise
            raise EOFError from error

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _send(self, message: msgspec.Struct) -> None:
        assert self._process.stdin is not None
        write_message(self._process.stdin, message)


class Children:
    """A few children of one kind, for many threads. They start when they are first needed."""

    def __init__(self, start: Callable[[], Child], number: int) -> None:
        self._start_one = start
        self._idle: queue.LifoQueue[Child | None] = queue.LifoQueue()
        for _ in range(number):
            self._idle.put(None)
        self._running: set[Child] = set()
        self._lock = threading.Lock()
        self._closed = False
        weakref.finalize(self, _end, self._running)

    def ask(self, message: msgspec.Struct) -> bytes:
        """As `Child.ask`, of a child that is free. If it is killed, which need not be the fault of
        the message, another one is asked, once. Waits until one is free.

        Raises:
            ValueError: `close` was called.
        """
        with self.one() as child:
            try:
                return child.ask(message)
            except (EOFError, BrokenPipeError):
                if not child.killed:
                    raise
        with self.one() as child:
            return child.ask(message)

    @contextlib.contextmanager
    def one(self) -> Iterator[Child]:
        """A child that nobody else uses meanwhile. Waits until one is free.

        Raises:
            ValueError: `close` was called.
        """
        child = self._idle.get()
        try:
            if child is None or child.ended:
                child = self._start()
            yield child
        finally:
            self._idle.put(child)

    def close(self) -> None:
        """End all children, and with them what they do."""
        with self._lock:
            self._closed = True
            _end(self._running)

    def _start(self) -> Child:
        with self._lock:
            if self._closed:
                raise ValueError("the server is shutting down")
            self._running -= {child for child in self._running if child.ended}
            child = self._start_one()
            self._running.add(child)
            return child


def _end(children: set[Child]) -> None:
    for child in children:
        child.end()


def answer_parent(
    serve: Callable[[bytes], Callable[[bytes], msgspec.Struct]], seconds: float, memory: int
) -> None:
    """What the process of a `Child` does.

    Args:
        serve: makes, of the encoded setup, the function that answers encoded messages.
        seconds: an answer that takes longer ends the process.
        memory: bytes of address space that it may have.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # asks the server's other processes for stacks
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    with contextlib.suppress(EOFError, BrokenPipeError):
        answer = serve(read_message(requests))
        while True:
            data = read_message(requests)
            _allow(seconds)
            write_message(answers, answer(data))
            _allow(0.0)


def _allow(seconds: float) -> None:
    """End this process after so many seconds of computing, or five times as many of waiting: others
    may keep the machine busy. 0: no longer."""
    signal.setitimer(signal.ITIMER_PROF, seconds)  # without a handler, signals end us
    signal.setitimer(signal.ITIMER_REAL, 5 * seconds)


def write_message(file: IO[bytes], message: msgspec.Struct) -> None:
    """Send one message. OverflowError for a number above 64 bits, UnicodeError for surrogates."""
    data = msgspec.msgpack.encode(message)
    file.write(len(data).to_bytes(LENGTH))
    file.write(data)
    file.flush()


def read_message(file: IO[bytes]) -> bytes:
    """The next message, encoded. EOFError at the end."""
    length = file.read(LENGTH)
    data = file.read(int.from_bytes(length))
    if len(length) < LENGTH or len(data) < int.from_bytes(length):
        raise EOFError
    return data
