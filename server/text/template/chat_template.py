"""Render a conversation with the model's Jinja chat template, as transformers does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2 import Template, TemplateError

from server.text.letters import Rendered, SpecialLetters
from server.text.template.sandbox import LETTERS, MAX_OUTPUT, WATCH, SandboxedTemplates, Watch

Messages = Sequence[Mapping[str, Any]]
RESERVED = ("messages", "add_generation_prompt")
# transformers defines these for every template; some templates test only `is none`
ALWAYS_DEFINED = {"tools": None, "documents": None}
NULL_CONTENT = re.compile(r"""\bcontent(['"]\])?\s+is\s+(not\s+)?none\b""")
NO_TEMPLATE = (
    "this model has no chat template; use /v1/completions, or set model.chat_template to a file"
)
# For each role the roles before it in a conversation that every template accepts.
BEFORE = {"user": (), "system": (), "assistant": ("user",), "tool": ("user", "assistant")}
PROBE_TIMEOUT = 1.0  # seconds of computing
WORD = "aerieprobe"
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": WORD,
        "description": "None",
        "parameters": {"type": "object", "properties": {}},
    },
}


class ChatTemplate:
    """A compiled template; threads may share it."""

    def __init__(
        self,
        source: str | None,
        special_tokens: Mapping[str, str],
        specials_in_content: Iterable[str] = (),
    ) -> None:
        """`source` is None for a model without a template; then `render` fails. Messages cannot
        write the special tokens `specials_in_content`: they are letters there.

        Raises ValueError for a template that is not valid Jinja.
        """
        self.source = source
        self.special_tokens = dict(special_tokens)
        self.specials_in_content = list(specials_in_content)
        self._letters = SpecialLetters(self.specials_in_content, source or "")
        self.shows_tool_calls = source is not None and "tool_calls" in source
        self.tests_null_content = source is not None and NULL_CONTENT.search(source) is not None
        self._template: Template | None = None
        self.part_roles: frozenset[str] = frozenset()  # whose content must be a list of parts
        self.shows_tools = False  # those that the model may call
        self.shows_results = False  # of tools, in messages of their own role
        self.takes_one_call = False  # in a message, and no more
        if source is not None:
            environment = SandboxedTemplates()
            try:
                self._template = environment.from_string(environment.limited(source))
            except TemplateError as error:
                raise ValueError(f"chat template: {error}") from error
            for role in BEFORE:  # the user's first: the others need it
                if self._wants_parts(role):
                    self.part_roles |= {role}
            self.shows_tools = "tools" in source and WORD in self._probe("user", "Hi", [PROBE_TOOL])
            content = self._readable({"role": "tool", "content": WORD})["content"]
            self.shows_results = WORD in self._probe("tool", content)
            self.takes_one_call = self._takes_calls(1) and not self._takes_calls(2)

    def render(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        /,  # so that a client's variable may have any name
        **chat_template_kwargs: Any,
    ) -> Rendered:
        """The prompt of a conversation, special tokens included. A message's content is text, or
        text parts; the template gets what it can read. ValueError("chat template: ...") when the
        template refuses it, fails, takes too long or writes more than MAX_OUTPUT characters."""
        for name in RESERVED:
            if name in chat_template_kwargs:
                raise ValueError(f"chat template: {name!r} cannot be set by chat_template_kwargs")
        found = [self._readable(message) for message in messages]
        roles = [message["role"] for message in found]  # a fixed set of words, which templates test
        strings = [{**message, "role": None} for message in found]
        try:
            (strings, kwargs), letters = self._letters.hide((strings, chat_template_kwargs))
        except ValueError as error:
            raise ValueError(f"chat template: {error}") from error
        for message, role in zip(strings, roles, strict=True):
            message["role"] = role
        variables = {
            **ALWAYS_DEFINED,
            **self.special_tokens,
            **kwargs,
            "messages": strings,
            "add_generation_prompt": add_generation_prompt,
            LETTERS: letters,
        }
        return Rendered(self._run(variables, Watch()), letters)

    def _run(self, variables: dict[str, Any], watch: Watch) -> str:
        if self._template is None:
            raise ValueError(f"chat template: {NO_TEMPLATE}")
        try:
            return _bounded(self._template, {**variables, WATCH: watch})
        except Exception as error:  # a template may fail in any way Python can
            reason = str(error) or type(error).__name__
            raise ValueError(f"chat template: {reason}") from error

    def _readable(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message with its content in the form that the template reads."""
        content, parts = message.get("content"), message["role"] in self.part_roles
        if isinstance(content, str) and parts:
            content = [{"type": "text", "text": content}]
        elif isinstance(content, list) and not parts:
            content = plain_text(content)
        return {**message, "content": content} if "content" in message else dict(message)

    def _wants_parts(self, role: str) -> bool:
        """Whether the text of this role is lost unless it comes as a list of parts."""
        if WORD in self._probe(role, WORD):
            return False
        prompt = self._probe(role, [{"type": "text", "text": WORD}])
        return WORD in prompt and "'type'" not in prompt

    def _takes_calls(self, number: int) -> bool:
        """Whether a message with so many calls can be rendered."""
        user = self._readable({"role": "user", "content": "Hi"})
        call = {"type": "function", "function": {"name": WORD, "arguments": {}}}
        calls = [{"id": f"call0000{index}", **call} for index in range(number)]
        message = {"role": "assistant", "content": "", "tool_calls": calls}
        return self._rendered([user, self._readable(message)]) != ""

    def _probe(self, role: str, content: Any, tools: Sequence[Any] | None = None) -> str:
        """The prompt of a conversation with this content; empty if the template refuses it."""
        other = [self._readable({"role": each, "content": "Hi"}) for each in BEFORE[role]]
        message = {"role": role, "content": content}
        if role == "tool":
            message |= {"name": "f", "tool_call_id": "call00001"}
        after = [] if role == "user" else [self._readable({"role": "user", "content": "Hi"})]
        return self._rendered([*other, message, *after], tools)

    def _rendered(self, messages: Messages, tools: Sequence[Any] | None = None) -> str:
        """The prompt of a made-up conversation; empty if the template refuses it."""
        variables = {
            **ALWAYS_DEFINED,
            **self.special_tokens,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": True,
        }
        try:
            return self._run(variables, Watch(PROBE_TIMEOUT))
        except ValueError:
            return ""


def plain_text(content: Any) -> str:
    """The content of a message, which may be a list of parts or None, as one text."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    return content or ""


def _bounded(template: Template, variables: dict[str, Any]) -> str:
    pieces, length = [], 0
    for piece in template.generate(variables):
        length += len(piece)
        if length > MAX_OUTPUT:
            raise ValueError(f"it writes more than {MAX_OUTPUT} characters")
        pieces.append(piece)
    return "".join(pieces)
