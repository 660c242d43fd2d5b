"""Where conversations are rendered: small ones at once, large ones in processes that can be ended.

A template writes many times what it is given, in the worst case; for a small conversation that is
little, and `sandbox` bounds its time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from server.text.letters import Rendered
from server.text.template.chat_template import ChatTemplate, Messages
from server.text.template.render_process import Conversation, Prompt, Setup
from server.text.worker_processes import Child, Children

SMALL = 16 * 1024  # characters of a conversation, with some for every value
NUM_PROCESSES = 2
FAILED = "chat template: it took too long or too much memory for this conversation"


class Renderer:
    """Renders conversations for many threads. Processes start when they are first needed."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._children = Children(lambda: _start(template), NUM_PROCESSES)

    def render(
        self, messages: Messages, add_generation_prompt: bool, kwargs: Mapping[str, Any]
    ) -> Rendered:
        """As `ChatTemplate.render`. It may wait for a process."""
        if self.template.source is None or is_small(messages, kwargs):
            return self.template.render(messages, add_generation_prompt, **kwargs)
        asked = Conversation(list(map(dict, messages)), add_generation_prompt, dict(kwargs))
        return self._rendered(asked)

    def close(self) -> None:
        """End all processes, and with them what they render."""
        self._children.close()

    def _rendered(self, asked: Conversation) -> Rendered:
        """The prompt. ValueError when the template fails, or ends the process."""
        try:
            answer = msgspec.msgpack.decode(self._children.ask(asked), type=Prompt)
        except OverflowError as error:
            raise ValueError("chat template: numbers may have at most 64 bits") from error
        except (EOFError, BrokenPipeError) as error:
            raise ValueError(FAILED) from error
        if answer.error is not None:
            raise ValueError(answer.error)
        return Rendered(answer.text, answer.letters)


def _start(template: ChatTemplate) -> Child:
    assert template.source is not None
    setup = Setup(template.source, template.special_tokens, template.specials_in_content)
    return Child(f"{__package__}.render_process", setup)


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
