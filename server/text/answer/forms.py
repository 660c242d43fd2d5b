"""How the answers of a model are written, told by its chat template or by the operator."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from configs.schema import ModelConfig
from server.text.answer.calls import CallReader, CallRules, Syntax
from server.text.answer.hermes import HermesSyntax
from server.text.answer.llama3_json import Llama3JsonSyntax
from server.text.answer.llama4_pythonic import Llama4PythonicSyntax
from server.text.answer.parts import AnswerReader, PlainReader
from server.text.answer.thinking import MARKS, OPEN, ThinkingReader
from server.text.template.chat_template import ChatTemplate

SYNTAXES: Mapping[str, Syntax] = {
    "hermes": HermesSyntax(),
    "llama3_json": Llama3JsonSyntax(),
    "llama4_pythonic": Llama4PythonicSyntax(),
}
# What templates ask the model to write, or write for its earlier calls.
SIGNS = {
    "hermes": re.compile("<tool_call>"),
    "llama4_pythonic": re.compile(r"\[\w+\("),
    "llama3_json": re.compile(r"""["']parameters["']|<\|python_tag\|>"""),
}
NOTHING = CallRules(())
OTHERS = "hermes"  # what is asked of models whose template says nothing of tools


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How the answers of one model are read."""

    syntax: Syntax | None = None  # of calls; None: tools cannot be called
    thinks: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """How the answers to one request are read."""

    syntax: Syntax | None = None  # None: nothing may be called
    rules: CallRules = NOTHING
    thinks: bool = False

    def reader(self, prompt: str) -> AnswerReader:
        """For one answer to `prompt`."""
        calls = None if self.syntax is None else CallReader(self.syntax, self.rules)
        after = calls or PlainReader()
        return ThinkingReader(after, prompt.rstrip().endswith(OPEN)) if self.thinks else after

    @property
    def marks(self) -> frozenset[str]:
        """Texts that a reader must see, also where they are special tokens."""
        of_calls = () if self.syntax is None else self.syntax.marks
        return frozenset([*of_calls, *(MARKS if self.thinks else ())])


def answer_form(template: ChatTemplate, config: ModelConfig) -> AnswerForm:
    """The form that the configuration names, or that the template asks for."""
    name: str = config.tool_parser
    source = template.source or ""
    if name == "auto":
        name = _syntax_of(source) if template.shows_tools else OTHERS
    thinks = config.reasoning_parser == "think"
    if config.reasoning_parser == "auto":
        thinks = any(mark in source for mark in MARKS)
    return AnswerForm(SYNTAXES.get(name), thinks)


def _syntax_of(source: str) -> str:
    return next((name for name, sign in SIGNS.items() if sign.search(source)), OTHERS)
