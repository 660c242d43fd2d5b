"""Render a conversation with the model's Jinja chat template, as transformers does."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_OUTPUT = 16_000_000  # characters
RESERVED = ("messages", "add_generation_prompt")
# transformers defines these for every template; some templates test only `is none`
ALWAYS_DEFINED = {"tools": None, "documents": None}
NULL_CONTENT = re.compile(r"""\bcontent(['"]\])?\s+is\s+(not\s+)?none\b""")
NO_TEMPLATE = (
    "this model has no chat template; use /v1/completions, or set model.chat_template to a file"
)


class GenerationBlock(Extension):
    """`{% generation %}` marks text to train on; rendering outputs its content unchanged."""

    tags = {"generation"}  # noqa: RUF012  (declared so by jinja2)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template; threads may share it."""

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        """`source` is None for a model without a template; then `render` fails.

        Raises ValueError for a template that is not valid Jinja.
        """
        self._special_tokens = dict(special_tokens)
        self.shows_tool_calls = source is not None and "tool_calls" in source
        self.tests_null_content = source is not None and NULL_CONTENT.search(source) is not None
        self._template: Template | None = None
        if source is not None:
            try:
                self._template = _environment().from_string(source)
            except TemplateError as error:
                raise ValueError(f"chat template: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        /,  # so that a client's variable may have any name
        **chat_template_kwargs: Any,
    ) -> str:
        """The prompt of a conversation, special tokens included. ValueError("chat template: ...")
        when the template refuses it, fails, or writes more than MAX_OUTPUT characters."""
        if self._template is None:
            raise ValueError(f"chat template: {NO_TEMPLATE}")
        for name in RESERVED:
            if name in chat_template_kwargs:
                raise ValueError(f"chat template: {name!r} cannot be set by chat_template_kwargs")
        variables = {
            **ALWAYS_DEFINED,
            **self._special_tokens,
            **chat_template_kwargs,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return _bounded(self._template, variables)
        except Exception as error:  # a template may fail in any way Python can
            reason = str(error) or type(error).__name__
            raise ValueError(f"chat template: {reason}") from error


def _bounded(template: Template, variables: dict[str, Any]) -> str:
    pieces, length = [], 0
    for piece in template.generate(variables):
        length += len(piece)
        if length > MAX_OUTPUT:
            raise ValueError(f"it writes more than {MAX_OUTPUT} characters")
        pieces.append(piece)
    return "".join(pieces)


def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models saw it in training: not escaped for HTML, unlike Jinja's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
