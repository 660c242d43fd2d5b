"""A vocabulary of bytes for the tiny model, and an independent judge of what a regex allows."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import regex
from llguidance import LLTokenizer

from engine.grammar.compiler import GrammarCompiler
from engine.grammar.grammars import Grammars
from engine.request import Grammar

EOS = 2
SPECIALS = [b"<pad>", b"<s>", b"</s>"]
LETTERS = [bytes([code]) for code in range(32, 127)] + [b"\n", b"\t"]
WORDS = [b"ab", b"aba", b"bb", b"ca", b'{"', b'"}', b'":', b'", "', b'": "', b"12", b"true", b"a b"]
UNUSED = [b""] * (131 - len(SPECIALS) - len(LETTERS) - len(WORDS))
TOKENS = SPECIALS + LETTERS + WORDS + UNUSED


class TinyTokenizer:
    """What llguidance needs to know of a tokenizer."""

    eos_token_id, bos_token_id = EOS, 1
    special_token_ids = (0, 1, 2)
    tokens: Sequence[bytes] = TOKENS

    def __call__(self, text: str) -> list[int]:
        """Greedy: the longest token first."""
        data, ids = text.encode(), []
        while data:
            known = [i for i, token in enumerate(TOKENS) if token and data.startswith(token)]
            ids.append(max(known, key=lambda i: len(TOKENS[i])))
            data = data[len(TOKENS[ids[-1]]) :]
        return ids


def compiler() -> GrammarCompiler:
    tokenizer = TinyTokenizer()
    tokenizer.is_tokenizer_wrapper = True  # type: ignore[attr-defined]
    size = len(TOKENS)
    return GrammarCompiler(LLTokenizer(tokenizer, n_vocab=size, eos_token=EOS), size)  # type: ignore[arg-type]


def grammars() -> Grammars:
    return Grammars(compiler, frozenset({EOS}))


def matching(pattern: str) -> Grammar:
    return Grammar("regex", pattern)


def text_of(token_ids: Sequence[int]) -> str:
    return b"".join(TOKENS[i] for i in token_ids if i != EOS).decode()


@functools.cache
def allowed(pattern: str, text: str) -> frozenset[int]:
    """The tokens that may follow `text`, by brute force over the vocabulary."""
    found = {EOS} if regex.fullmatch(pattern, text) else set()
    for token_id, token in enumerate(TOKENS[3:], 3):
        if token and regex.fullmatch(pattern, text + token.decode(), partial=True):
            found.add(token_id)
    return frozenset(found)
