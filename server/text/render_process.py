"""The process that renders large conversations: python -m server.text.render_process.

It reads a template, and then one conversation after another, from standard input, and writes each
prompt to standard output. Python cannot end a thread, but it can end a process: an alarm bounds the
time of a rendering also where the template is inside one long call, and the memory has a limit.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
from typing import IO, Any

import msgspec

from server.text.chat_template import ChatTemplate
from server.text.letters import Rendered
from server.text.template_sandbox import TIMEOUT

MAX_MEMORY = 2**30  # bytes
LENGTH = 8  # bytes that say how long a message is


class Setup(msgspec.Struct, frozen=True):
    """The template, as `ChatTemplate` takes it."""

    source: str
    special_tokens: dict[str, str]
    specials_in_content: list[str]


class Conversation(msgspec.Struct, frozen=True):
    """The arguments of `ChatTemplate.render`."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    kwargs: dict[str, Any]


class Prompt(msgspec.Struct, frozen=True):
    """What the template wrote, or why it failed."""

    text: str = ""
    letters: dict[str, str] = {}
    error: str | None = None


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


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    with contextlib.suppress(EOFError, BrokenPipeError):
        setup = msgspec.msgpack.decode(read_message(requests), type=Setup)
        template = ChatTemplate(setup.source, setup.special_tokens, setup.specials_in_content)
        while True:
            data = read_message(requests)
            signal.setitimer(signal.ITIMER_REAL, 2 * TIMEOUT)  # without a handler it ends us
            answer = _prompt(template, data)
            write_message(answers, answer)
            signal.setitimer(signal.ITIMER_REAL, 0)


def _prompt(template: ChatTemplate, data: bytes) -> Prompt:
    try:
        asked = msgspec.msgpack.decode(data, type=Conversation)
        found: Rendered = template.render(
            asked.messages, asked.add_generation_prompt, **asked.kwargs
        )
    except (ValueError, MemoryError) as error:
        return Prompt(error=str(error) or "chat template: it needs too much memory")
    return Prompt(found.text, dict(found.letters))


if __name__ == "__main__":
    main()
