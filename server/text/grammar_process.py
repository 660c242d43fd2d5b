"""The process that checks grammars: python -m server.text.grammar_process.

It gets a tokenizer, and then one grammar after another, each of which it compiles.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec
from llguidance.gbnf_to_lark import any_to_lark

from engine.grammar.compiler import GrammarCompiler
from engine.request import Grammar
from server.text.worker_processes import answer_parent

TIMEOUT = 2.0  # seconds to compile one grammar; usually it takes some milliseconds
MAX_MEMORY = 2**32  # bytes, most of them never used: libraries reserve some for each core
# A rule as in GBNF; Lark has one colon.
GBNF = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)


class Setup(msgspec.Struct, frozen=True):
    """The arguments of `GrammarCompiler.of`."""

    tokenizer_json: str
    vocab_size: int
    eos_token_ids: list[int]


class Checked(msgspec.Struct, frozen=True):
    """The grammar for the engine, or why it cannot be used."""

    grammar: Grammar | None = None
    error: str | None = None


def serve(data: bytes) -> Callable[[bytes], Checked]:
    setup = msgspec.msgpack.decode(data, type=Setup)
    try:
        compiler = GrammarCompiler.of(setup.tokenizer_json, setup.vocab_size, setup.eos_token_ids)
    except ValueError as error:
        refused = Checked(error=str(error))
        return lambda _: refused
    return lambda asked: _checked(compiler, msgspec.msgpack.decode(asked, type=Grammar))


def _checked(compiler: GrammarCompiler, grammar: Grammar) -> Checked:
    try:
        if grammar.kind == "lark" and GBNF.search(grammar.text):
            grammar = Grammar("lark", _lark(grammar.text))
        compiler.compile(grammar)
    except (ValueError, MemoryError) as error:
        return Checked(error=str(error) or "it needs too much memory")
    return Checked(grammar)


def _lark(text: str) -> str:
    try:
        return str(any_to_lark(text))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"it is no valid GBNF: {error}") from error


if __name__ == "__main__":
    answer_parent(serve, TIMEOUT, MAX_MEMORY)
