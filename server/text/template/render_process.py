"""The process that renders large conversations: python -m server.text.template.render_process.

It gets a template, and then one conversation after another. The alarm bounds the time of a
rendering also where the template is inside one long call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from server.text.letters import Rendered
from server.text.template.chat_template import ChatTemplate
from server.text.template.sandbox import TIMEOUT
from server.text.worker_processes import answer_parent

MAX_MEMORY = 2**30  # bytes


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


def serve(data: bytes) -> Callable[[bytes], Prompt]:
    setup = msgspec.msgpack.decode(data, type=Setup)
    template = ChatTemplate(setup.source, setup.special_tokens, setup.specials_in_content)
    return lambda asked: _prompt(template, asked)


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
    answer_parent(serve, 2 * TIMEOUT, MAX_MEMORY)
