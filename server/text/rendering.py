"""Where conversations are rendered: small ones at once, large ones in processes that can be ended.

A template writes many times what it is given, in the worst case; for a small conversation that is
little, and `template_sandbox` bounds its time.
"""

from __future__ import annotations

import contextlib
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from server.text.chat_template import ChatTemplate, Messages
from server.text.letters import Rendered
from server.text.render_process import (
    Conversation,
    Prompt,
    Setup,
    read_message,
    write_message,
)

SMALL = 16 * 1024  # characters of a conversation, with some for every value
NUM_PROCESSES = 2
FAILED = "chat template: it took too long or too much memory for this conversation"


class Renderer:
    """Renders conversations for many threads. Processes start when they are first needed."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._idle: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(NUM_PROCESSES):
            self._idle.put(None)
        self._running: set[_Process] = set()
        self._lock = threading.Lock()
        self._closed = False
        weakref.finalize(self, _end, self._running)

    def render(
        self, messages: Messages, add_generation_prompt: bool, kwargs: Mapping[str, Any]
    ) -> Rendered:
        """As `ChatTemplate.render`. It may wait for a process."""
        if self.template.source is None or is_small(messages, kwargs):
            return self.template.render(messages, add_generation_prompt, **kwargs)
        with self._process() as process:
            asked = Conversation(list(map(dict, messages)), add_generation_prompt, dict(kwargs))
            return process.render(asked)

    def close(self) -> None:
        """End all processes, and with them what they render."""
        with self._lock:
            self._closed = True
            _end(self._running)

    @contextlib.contextmanager
    def _process(self) -> Iterator[_Process]:
        process = self._idle.get()
        try:
            if process is None or process.ended:
                process = self._start()
            yield process
        finally:
            self._idle.put(process)

    def _start(self) -> _Process:
        with self._lock:
            if self._closed:
                raise ValueError("chat template: the server is shutting down")
            self._running -= {process for process in self._running if process.ended}
            process = _Process(self.template)
            self._running.add(process)
            return process


def _end(processes: set[_Process]) -> None:
    for process in processes:
        process.end()


def is_small(messages: Messages, kwargs: Mapping[str, Any]) -> bool:
    """Whether a template cannot make much out of a conversation, of lists and dicts."""
    size, rest = 0, list[Any]((messages, kwargs))
    while rest:
        value = rest.pop()
        size += 8
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, dict):
            rest += value.keys()
            rest += value.values()
        elif isinstance(value, (list, tuple)):
            rest += value
        if size > SMALL:
            return False
    return True


class _Process:
    def __init__(self, template: ChatTemplate) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", f"{__package__}.render_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C is for the server
        )
        assert template.source is not None
        setup = Setup(template.source, template.special_tokens, template.specials_in_content)
        self._send(setup)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def render(self, asked: Conversation) -> Rendered:
        """The prompt. ValueError when the template fails, or ends the process."""
        assert self._process.stdout is not None
        try:
            self._send(asked)
            answer = msgspec.msgpack.decode(read_message(self._process.stdout), type=Prompt)
        except OverflowError as error:
            raise ValueError("chat template: numbers may have at most 64 bits") from error
        except (EOFError, BrokenPipeError) as error:
            self.end()
            raise ValueError(FAILED) from error
        if answer.error is not None:
            raise ValueError(answer.error)
        return Rendered(answer.text, answer.letters)

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
