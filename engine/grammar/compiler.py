"""Compiles grammars with llguidance. Imports no torch: the front end checks them here, too."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from engine.request import Grammar

Mask = NDArray[np.int32]  # [W]: bit v % 32 of word v // 32 allows token v

# Between the tokens of JSON: a space, or a line break and an indent. A model that may write any
# number of spaces sometimes writes nothing else.
WHITESPACE = r"(\x20|\r?\n(\x20{0,64}|\t{0,16}))"
MAX_REASON = 300  # characters of an error


class GrammarCompiler:
    """Compiles grammars for one vocabulary. Threads may share it."""

    def __init__(self, tokenizer: LLTokenizer, vocab_size: int) -> None:
        """`tokenizer` must have the model's `vocab_size` and the tokens that end its answers."""
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.num_words = -(-vocab_size // 32)
        self.not_ends = all_but(tokenizer.eos_tokens, self.num_words)

    @classmethod
    def of(
        cls, tokenizer_json: str, vocab_size: int, eos_token_ids: Iterable[int]
    ) -> GrammarCompiler:
        """For a tokenizer in the format of the `tokenizers` library. It holds the interpreter's
        lock for some tenths of a second.

        Raises:
            ValueError: llguidance cannot use the tokenizer.
        """
        ends = sorted(eos_token_ids)
        try:
            tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=ends)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"the model's tokenizer has no grammars: {error}") from error
        return cls(tokenizer, vocab_size)

    def compile(self, grammar: Grammar) -> LLMatcher:
        """A matcher at the start of a text; copy it for each text. The time depends on the grammar;
        meanwhile other threads run.

        Raises:
            ValueError: the grammar is invalid, not supported or too complex, or no text matches it.
        """
        matcher = LLMatcher(self._tokenizer, _source(grammar), log_level=0, limits=_limits())
        check(matcher)
        first = np.zeros(self.num_words, np.int32)
        compute_mask(matcher, first)
        if not first.any() or "NoExtension" in matcher.get_error():
            raise ValueError("no text matches it")
        check(matcher)
        if not (first & self.not_ends).any():
            raise ValueError("only the empty text matches it")
        return matcher


def check(matcher: LLMatcher) -> None:
    """ValueError with the reason if the matcher has failed."""
    if matcher.is_error():
        raise ValueError(reason_of(matcher.get_error()))


def reason_of(error: str) -> str:
    """The line of an error of llguidance that says what is wrong; others quote the grammar."""
    lines = error.strip().split("\n")
    line = next((line for line in lines if line.startswith("error: ")), lines[0])
    return line if len(line) <= MAX_REASON else line[:MAX_REASON] + "…"


def compute_mask(matcher: LLMatcher, into: Mask) -> None:
    """Write the tokens that may come next into a contiguous array."""
    matcher.unsafe_compute_mask_ptr(into.ctypes.data, into.nbytes)


def all_but(token_ids: Iterable[int], num_words: int) -> Mask:
    """A mask of all tokens but these."""
    words = np.full(num_words, 0xFFFFFFFF, np.uint32)
    for token_id in token_ids:
        words[token_id >> 5] &= ~np.uint32(1 << (token_id & 31))
    return words.view(np.int32)


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's own format. ValueError for text that is not JSON."""
    if grammar.kind == "json_schema":
        try:
            return LLMatcher.grammar_from_json_schema(
                grammar.text, overrides={"whitespace_pattern": WHITESPACE}
            )
        except ValueError as error:
            raise ValueError(f"the schema is not valid JSON: {reason_of(str(error))}") from error
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(grammar.text)
    return grammar.text


def _limits() -> LLParserLimits:
    """Bounds the time of compiling, and of each mask to some milliseconds."""
    return LLParserLimits(
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )
