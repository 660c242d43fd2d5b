"""Conversations as token ids. Every token that the target itself would write is marked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from drafter.train.data.conversations import (
    AnyConversation,
    CapturedConversation,
    Conversation,
    Message,
)


class Encode(Protocol):
    """Chat template and tokenizer: turns messages into the ids that the target sees."""

    def __call__(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        """Raises ValueError if the template refuses the messages."""


@dataclass(frozen=True, slots=True)
class EncodingSettings:
    """Limits of the ids: the target's vocabulary and end-of-text ids, and a length."""

    vocab_size: int
    eos_ids: frozenset[int]
    max_tokens: int = 2048  # of one example; the rest is cut off

    def __post_init__(self) -> None:
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be 2 or more")


@dataclass(frozen=True, slots=True)
class Example:
    """One training sequence of T tokens, the last of them an answer token."""

    token_ids: list[int]  # [T]
    is_answer: list[bool]  # [T]


@dataclass(slots=True)
class Coverage:
    """Counts of the conversations and their tokens. Only `encode_conversations` changes them."""

    num_examples: int = 0
    num_truncated: int = 0  # examples that lost tokens to `max_tokens`
    num_dropped: int = 0  # conversations that lost all of their answers to `max_tokens`
    num_merged: int = 0  # conversations cut before an answer that begins inside a template token
    num_tokens: int = 0
    num_answer_tokens: int = 0


@dataclass(slots=True)
class _Draft:
    """An example while its conversation is encoded."""

    token_ids: list[int]
    answers: list[range]  # positions of answer tokens
    more: bool = False  # there are answers after `max_tokens`
    merged: bool = False


def encode_conversations(
    conversations: Iterable[AnyConversation],
    encode: Encode,
    settings: EncodingSettings,
    coverage: Coverage,
) -> Iterator[Example]:
    """One example per conversation, in order, one at a time; adds to `coverage`.

    Answer tokens are those that the target writes after the generation prompt, up to and including
    the first end-of-text id. An answer that ended by length has no such id.

    Raises:
        ValueError: an id is outside of the vocabulary, or the chat template renders earlier
            messages differently later on or refuses the messages. The error names file:line.
    """
    for conversation in conversations:
        if isinstance(conversation, CapturedConversation):
            ids = list(conversation.token_ids)
            draft = _Draft(ids, [range(conversation.num_prompt, len(ids))])
        else:
            draft = _walk(conversation, encode, settings)
        _check_ids(conversation.where, draft.token_ids, settings.vocab_size)
        example = _finished(draft, settings.max_tokens, coverage)
        if example is not None:
            yield example


def _walk(conversation: Conversation, encode: Encode, settings: EncodingSettings) -> _Draft:
    """Encode answer by answer, no further than `max_tokens`, since the rest is cut off."""
    where, messages = conversation.where, conversation.messages
    indices = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    draft = _Draft([], [])
    for index in indices:
        if len(draft.token_ids) >= settings.max_tokens:
            draft.more = True
            break
        prompt = _encoded(where, encode, messages[:index], True)
        whole = _encoded(where, encode, messages[: index + 1], False)
        _check_prefix(where, draft.token_ids, prompt, index)
        if whole[: len(prompt)] != prompt:
            # The template's "\n" and the answer's may be one token, which the target never saw.
            _check_prefix(where, prompt[:-1], whole, index)
            draft.merged = True
            break
        cut_off = index == indices[-1] and conversation.finish_reason == "length"
        end = _answer_end(whole, len(prompt), settings.eos_ids, with_eos=not cut_off)
        draft.answers.append(range(len(prompt), end))
        draft.token_ids = whole
    return draft


def _encoded(
    where: str, encode: Encode, messages: Sequence[Message], add_generation_prompt: bool
) -> list[int]:
    try:
        return encode(messages, add_generation_prompt)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_prefix(where: str, earlier: list[int], later: list[int], index: int) -> None:
    if later[: len(earlier)] != earlier:
        raise ValueError(
            f"{where}: the chat template renders what stands before messages[{index}] differently "
            "once that message is there, so the answers cannot be found; it must only add text"
        )


def _answer_end(ids: list[int], start: int, eos_ids: frozenset[int], with_eos: bool) -> int:
    """End of the answer that begins at `start`; without an end-of-text id, the end of `ids`."""
    for position in range(start, len(ids)):
        if ids[position] in eos_ids:
            return position + with_eos
    return len(ids)


def _check_ids(where: str, ids: list[int], vocab_size: int) -> None:
    if ids and max(ids) >= vocab_size:
        raise ValueError(
            f"{where}: token id {max(ids)} is not in the vocabulary of {vocab_size} tokens; is "
            "this the target's tokenizer?"
        )


def _finished(draft: _Draft, max_tokens: int, coverage: Coverage) -> Example | None:
    """The example up to its last answer token within `max_tokens`; None if there is none."""
    coverage.num_merged += draft.merged
    answers = [found for found in draft.answers if len(found) and found.start < max_tokens]
    if not answers:
        coverage.num_dropped += bool(draft.answers)
        return None
    end = min(answers[-1].stop, max_tokens)
    is_answer = [False] * end
    for found in answers:
        stop = min(found.stop, end)
        is_answer[found.start : stop] = [True] * (stop - found.start)
    complete = len(answers) == len(draft.answers) and answers[-1].stop <= max_tokens
    coverage.num_examples += 1
    coverage.num_truncated += draft.more or not complete
    coverage.num_tokens += end
    coverage.num_answer_tokens += sum(is_answer)
    return Example(draft.token_ids[:end], is_answer)
