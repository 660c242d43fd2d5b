"""Logprobs in the two formats of the API: chat and completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import msgspec

from engine.messages import TokenLogprob
from server.openai.reply.bodies import (
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptScores,
    PromptTokenScore,
    TopLogprob,
)
from server.openai.reply.choice import ScoredToken
from server.text.tokens.tokenizer import Tokenizer

SMALLEST = -9999.0  # as OpenAI: for minus infinity, which JSON has not


def finite(logprob: float) -> float:
    """`logprob` as a JSON number: minus infinity, and NaN of a broken model, become SMALLEST."""
    return logprob if logprob > SMALLEST else SMALLEST


def chat_logprobs(
    tokenizer: Tokenizer, scored: Sequence[ScoredToken], as_ids: bool = False
) -> list[ChatTokenLogprob]:
    """The entries of `ChatLogprobs`, encoded one by one: all of a long reply at its end would
    block the event loop. With `as_ids`, tokens are written as their ids."""
    name = token_name if as_ids else tokenizer.token_text
    entries = (_chat_entry(tokenizer, item.logprob, name) for item in scored)
    return [cast(ChatTokenLogprob, _encoded(entry)) for entry in entries]


def _encoded(value: Any) -> msgspec.Raw:
    """A value as JSON, which `msgspec` copies into the JSON around it."""
    return msgspec.Raw(msgspec.json.encode(value))


def token_name(token_id: int) -> str:
    """A token as its id: unlike its text, it is never ambiguous."""
    return f"token_id:{token_id}"


def _chat_entry(
    tokenizer: Tokenizer, entry: TokenLogprob, name: Callable[[int], str]
) -> ChatTokenLogprob:
    return ChatTokenLogprob(
        token=name(entry.token_id),
        logprob=finite(entry.logprob),
        bytes=list(tokenizer.token_bytes(entry.token_id)),
        top_logprobs=[
            TopLogprob(
                token=name(token_id),
                logprob=finite(logprob),
                bytes=list(tokenizer.token_bytes(token_id)),
            )
            for token_id, logprob in entry.top
        ],
    )


def prompt_scores(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprob | None], count: int
) -> PromptScores:
    """The scores of a prompt's tokens, with at most `count` alternatives."""
    return [None if each is None else _prompt_entry(tokenizer, each, count) for each in entries]


def _prompt_entry(
    tokenizer: Tokenizer, entry: TokenLogprob, count: int
) -> dict[str, PromptTokenScore]:
    ranks = {token_id: rank for rank, (token_id, _) in enumerate(entry.top, 1)}
    known = [*entry.top[:count], (entry.token_id, entry.logprob)]
    found = {
        str(token_id): PromptTokenScore(
            logprob=finite(logprob),
            rank=ranks.get(token_id),
            decoded_token=tokenizer.token_text(token_id),
        )
        for token_id, logprob in known
    }
    return cast(dict[str, PromptTokenScore], _encoded(found))


class CompletionLogprobsWriter:
    """Collects the parallel lists of a completion's logprobs."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool = False) -> None:
        """With `as_ids`, tokens are written as their ids."""
        self._tokenizer = tokenizer
        self._as_ids = as_ids
        self._content = CompletionLogprobs(
            tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[]
        )

    def add(self, token_id: int, offset: int, entry: TokenLogprob | None) -> None:
        """One token whose text begins at `offset`; the first of a prompt has no `entry`."""
        content = self._content
        content.tokens.append(self._text(token_id))
        content.text_offset.append(offset)
        content.token_logprobs.append(None if entry is None else finite(entry.logprob))
        top = None if entry is None else cast(dict[str, float], _encoded(self._top(entry)))
        content.top_logprobs.append(top)

    def take(self) -> CompletionLogprobs:
        """What was added since the last `take`."""
        content = self._content
        self._content = CompletionLogprobs(
            tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[]
        )
        return content

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """Logprobs of the alternatives and of the token itself, by text. Of alternatives with
        equal text the likeliest counts; the token itself always keeps its own value."""
        top: dict[str, float] = {}
        for token_id, logprob in entry.top:
            text = self._text(token_id)
            top[text] = max(top.get(text, SMALLEST), finite(logprob))
        top[self._text(entry.token_id)] = finite(entry.logprob)
        return top

    def _text(self, token_id: int) -> str:
        r"""This format has no field for bytes, so an incomplete character is written as OpenAI
        does: `bytes:\xe4\xbd`."""
        if self._as_ids:
            return token_name(token_id)
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + data.decode(errors="backslashreplace")
