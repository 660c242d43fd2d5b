"""Prompts that precede their completions, as `echo` asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.text.output.stream import StreamOptions, TextStream
from server.text.tokens.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as it precedes its completion."""

    text: str
    offsets: Sequence[int]  # where the text of each prompt token begins


def echo_of(
    tokenizer: Tokenizer, token_ids: Sequence[int], text: str | None, skip_special_tokens: bool
) -> Echo:
    """The echo of a prompt. Text is echoed unchanged, an added BOS token with no width; token ids
    are echoed as their decoded text."""
    if text is None:
        options = StreamOptions(skip_special_tokens=skip_special_tokens)
        delta = TextStream(tokenizer, (), options).push(token_ids)
        return Echo(delta.text, delta.offsets)
    lead = 1 if _begins_with_added_bos(tokenizer, token_ids, text) else 0
    stream = TextStream(tokenizer, (), StreamOptions(skip_special_tokens=False))
    offsets = stream.push(token_ids[lead:]).offsets
    return Echo(text, [0] * lead + [min(offset, len(text)) for offset in offsets])


def _begins_with_added_bos(tokenizer: Tokenizer, token_ids: Sequence[int], text: str) -> bool:
    bos = tokenizer.bos_token_id
    if bos is None or not token_ids or token_ids[0] != bos:
        return False
    return not text.startswith(tokenizer.special_tokens["bos_token"])
