"""Incremental detokenization: the cost per token does not grow with the text."""

from __future__ import annotations

import codecs
from collections.abc import Container, Iterable, Sequence

from server.text.tokens.tokenizer import Tokenizer

MAX_CHARACTER = 4  # bytes of UTF-8


class IncrementalDetokenizer:
    """Text of a growing sequence. The joined results of `add` and `flush` are the text that the
    sequence decodes to after its prompt, however the ids are split into calls.

    A character is emitted when its last byte arrives, even if its first bytes are in the prompt.
    (Next to invalid bytes, SentencePiece's byte fallback also drops valid characters; this does
    not.)
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        skipped: Container[int] | None = None,
    ) -> None:
        """`skipped`: tokens without text; default: all special ones."""
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skipped is None else skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = tokenizer.strips_first_space and all(
            token_id in self._skipped for token_id in prompt_ids
        )
        self._utf8.decode(self._tail(prompt_ids))

    def add(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete; it may be empty."""
        return "".join([self._utf8.decode(self._bytes_of(token_id)) for token_id in token_ids])

    def flush(self) -> str:
        """The end of the text: U+FFFD if a character was left incomplete, else nothing."""
        return self._utf8.decode(b"", final=True)

    def _tail(self, prompt_ids: Sequence[int]) -> bytes:
        """The last bytes of the prompt: enough to hold an incomplete character."""
        tail = b""
        for token_id in reversed(prompt_ids):
            tail = self._bytes_of(token_id) + tail
            if len(tail) >= MAX_CHARACTER:
                break
        return tail

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id in self._skipped:
            return b""
        piece = self._tokenizer.token_bytes(token_id)
        if self._strip and piece:
            self._strip = False
            return piece.removeprefix(b" ")
        return piece
