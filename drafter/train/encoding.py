"""Conversations as token ids, with a mark on every token that the target itself would write."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from drafter.train.conversations import AnyConversation, CapturedConversation, Conversation, Message


class Encode(Protocol):
    """Chat template and tokenizer: messages to the ids that the target sees."""

    def __call__(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        """Raises ValueError when the template refuses the messages."""


@dataclass(frozen=True, slots=True)
class EncodingSettings:
    """What the ids must fit: the target's vocabulary and end-of-text ids, and a length."""

    vocab_size: int
    eos_ids: frozenset[int]
    max_tokens: int = 2048  # of one example; what lies behind is cut off

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
    """What became of the conversations. Only `encode_conversations` counts."""

    num_examples: int = 0
    num_truncated: int = 0  # examples that lost tokens to `max_tokens`
    num_dropped: int = 0  # conversations that lost all of their answers to it
    num_merged: int = 0  # conversations cut before an answer that begins inside a template's token
    num_tokens: int = 0
    num_answer_tokens: int = 0


@dataclass(slots=True)
class _Draft:
    """An example while its conversation is walked through."""

    token_ids: list[int]
    answers: list[range]  # positions of answer tokens
    more: bool = False  # there are answers behind `max_tokens`
    merged: bool = False


def encode_conversations(
    conversations: Iterable[AnyConversation],
    encode: Encode,
    settings: EncodingSettings,
    coverage: Coverage,
) -> Iterator[Example]:
    """One example per conversation, in order, one at a time; adds to `coverage`.

    Answer tokens are what the target writes behind the generation prompt, up to the first
    end-of-text id and with it. An answer that ended by length has none.

    Raises:
        ValueError: naming file:line, for an id outside of the vocabulary, a chat template that
            renders earlier messages differently later on, or one that refuses the messages.
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
    """Encode answer by answer, no further than `max_tokens`: a longer history is never seen."""
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
            # "\n" of the template and "\n" of an answer may be one token: the target never saw it.
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
    """Where the answer that begins at `start` ends; without any end-of-text id, at the end."""
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
    """The example up to its last answer token within `max_tokens`; None if none is there."""
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
