"""Answer tokens: as transformers marks them, cut to a length, or an error if they cannot be
found."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from drafter.train.data.conversations import (
    AnyConversation,
    CapturedConversation,
    Conversation,
    Message,
    read_conversations,
)
from drafter.train.data.encoding import (
    Coverage,
    Encode,
    EncodingSettings,
    Example,
    encode_conversations,
)
from engine.checkpoints.gguf_files.header import read_gguf
from engine.checkpoints.source import BUNDLED_ALIAS, bundled_gguf, resolve_source
from server.text.chat_codec import ChatCodec
from server.text.template.chat_template import ChatTemplate
from server.text.tokens.gguf_tokenizer import build_tokenizer
from server.text.tokens.tokenizer_files import load_tokenizer

SAMPLE = Path(__file__).parents[3] / "drafter/train/sample/conversations.jsonl"
EOS = 2
WHERE = "f.jsonl:1"
# The bundled template's text of a message, and the same with marks for transformers.
MESSAGE = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
MARKED = (
    "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{message['content'] + '<|im_end|>'}}{% endgeneration %}"
    "{% else %}{{message['content'] + '<|im_end|>'}}{% endif %}{{'\n'}}"
)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> ChatCodec:
    files = resolve_source(BUNDLED_ALIAS)
    tokenizer = load_tokenizer(files, tmp_path_factory.mktemp("cache"), None)
    return ChatCodec(tokenizer, ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens))


def chat(*texts: str, reason: str | None = None) -> Conversation:
    """User and assistant messages in turn."""
    roles = ("user", "assistant")
    messages = tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))
    return Conversation(WHERE, messages, reason)


def encode_one(
    conversation: AnyConversation, encode: Encode, max_tokens: int = 2048, vocab_size: int = 49152
) -> tuple[Example | None, Coverage]:
    coverage = Coverage()
    settings = EncodingSettings(vocab_size, frozenset({EOS}), max_tokens)
    found = list(encode_conversations([conversation], encode, settings, coverage))
    assert len(found) <= 1
    return (found[0] if found else None), coverage


def letters(messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
    """A codec for counting: U text E for a user, A text E N for an assistant; one id per letter."""
    ids: list[int] = []
    for message in messages:
        ids += [10 if message["role"] == "user" else 11, *message["content"].encode(), EOS, 12]
    return ids + [11] * add_generation_prompt


def answers(example: Example | None) -> list[list[int]]:
    """Each run of answer tokens."""
    assert example is not None
    marks = "".join("x" if mark else "." for mark in example.is_answer)
    return [example.token_ids[m.start() : m.end()] for m in re.finditer("x+", marks)]


def test_answer_tokens_of_the_sample_are_those_that_transformers_marks(codec: ChatCodec) -> None:
    source = codec.tokenizer.chat_template
    assert source is not None
    assert MESSAGE in source
    oracle = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(read_gguf(bundled_gguf()).metadata)
    )
    num_turns = set()
    for conversation in read_conversations(SAMPLE):
        assert isinstance(conversation, Conversation)
        expected = oracle.apply_chat_template(
            [dict(message) for message in conversation.messages],
            chat_template=source.replace(MESSAGE, MARKED),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        mask = [bool(mark) for mark in expected["assistant_masks"]]
        # After the last answer comes the template's "\n", and <|im_end|> before it if it was cut.
        end = len(mask) - (2 if conversation.finish_reason == "length" else 1)
        example, _ = encode_one(conversation, codec.encode)
        assert example == Example(expected["input_ids"][:end], mask[:end])
        num_turns.add(len(answers(example)))
    assert num_turns == {1, 2}


def test_the_closing_token_is_an_answer_token_unless_the_last_answer_was_cut() -> None:
    ab, cd = [*b"ab", EOS], [*b"cd", EOS]
    example, _ = encode_one(chat("q", "ab", "r", "cd", reason="stop"), letters)
    assert answers(example) == [ab, cd]
    example, _ = encode_one(chat("q", "ab", "r", "cd", reason="length"), letters)
    assert answers(example) == [ab, cd[:-1]]
    assert example is not None
    assert example.token_ids == [10, *b"q", EOS, 12, 11, *ab, 12, 10, *b"r", EOS, 12, 11, *b"cd"]


def test_a_question_after_the_last_answer_is_left_out() -> None:
    assert encode_one(chat("q", "ab", "r"), letters) == encode_one(chat("q", "ab"), letters)


def test_an_answer_without_any_end_of_text_goes_to_the_end() -> None:
    def open_ended(messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        return [i for i in letters(messages, add_generation_prompt) if i not in (EOS, 12)]

    example, _ = encode_one(chat("q", "ab", "r", "cd"), open_ended)
    assert answers(example) == [[*b"ab"], [*b"cd"]]


def test_captured_tokens_are_answers_after_the_prompt() -> None:
    captured = CapturedConversation(WHERE, (10, 5, EOS, 11, 7, EOS, 8), 4)
    example, coverage = encode_one(captured, letters)
    assert example == Example([10, 5, EOS, 11, 7, EOS, 8], [False] * 4 + [True] * 3)
    assert coverage == Coverage(num_examples=1, num_tokens=7, num_answer_tokens=3)


# "q" "ab" "r" "cd" is  U q E N A a b E N U r E N A c d E : the answers lie at 5-7 and 14-16.
@pytest.mark.parametrize(
    ("max_tokens", "num_tokens", "num_answer_tokens", "truncated"),
    [
        (18, 17, 6, False),
        (17, 17, 6, False),
        (16, 16, 5, True),
        (15, 15, 4, True),
        (14, 8, 3, True),
        (8, 8, 3, True),
        (6, 6, 1, True),
    ],
)
def test_examples_are_cut_to_max_tokens_and_counted(
    max_tokens: int, num_tokens: int, num_answer_tokens: int, truncated: bool
) -> None:
    whole, _ = encode_one(chat("q", "ab", "r", "cd"), letters)
    example, coverage = encode_one(chat("q", "ab", "r", "cd"), letters, max_tokens)
    assert whole is not None
    assert example == Example(whole.token_ids[:num_tokens], whole.is_answer[:num_tokens])
    assert coverage == Coverage(1, int(truncated), 0, 0, num_tokens, num_answer_tokens)


def test_a_conversation_whose_answers_are_cut_away_is_dropped_and_counted() -> None:
    assert encode_one(chat("q", "ab"), letters, 5) == (None, Coverage(num_dropped=1))
    captured = CapturedConversation(WHERE, (10, 5, 11, 7), 3)
    assert encode_one(captured, letters, 3) == (None, Coverage(num_dropped=1))


def test_a_long_history_is_not_encoded_beyond_max_tokens() -> None:
    calls: list[int] = []

    def counting(messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        calls.append(len(messages))
        return letters(messages, add_generation_prompt)

    encode_one(chat(*["q", "a"] * 100), counting, 20)
    assert calls == [1, 2, 3, 4, 5, 6]


def test_a_template_that_changes_earlier_turns_is_refused() -> None:
    def forgetful(messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        """Shortens all answers except the last message, like templates that drop reasoning."""
        kept = [
            m if m["role"] == "user" else {"role": "assistant", "content": m["content"][-1]}
            for m in messages[:-1]
        ]
        return letters([*kept, messages[-1]], add_generation_prompt)

    assert encode_one(chat("q", "ab"), forgetful)[0] is not None
    with pytest.raises(ValueError) as caught:
        encode_one(chat("q", "ab", "r", "cd"), forgetful)
    assert str(caught.value) == (
        "f.jsonl:1: the chat template renders what stands before messages[3] differently once "
        "that message is there, so the answers cannot be found; it must only add text"
    )


def test_a_template_whose_prompt_is_no_prefix_is_refused() -> None:
    def other_prompt(messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        return letters(messages, False) + [11, 99, 98] * add_generation_prompt

    with pytest.raises(ValueError, match=r"^f\.jsonl:1: .* before messages\[1\] differently"):
        encode_one(chat("q", "ab"), other_prompt)


def test_an_answer_that_merges_with_the_templates_last_token_ends_the_example(
    codec: ChatCodec,
) -> None:
    # "\n" after "assistant" and "\n\n" of the answer give a token that the target never saw.
    merged = "\n\nand so on"
    assert encode_one(chat("q", merged), codec.encode) == (None, Coverage(num_merged=1))
    example, coverage = encode_one(chat("q", "ab", "r", merged), codec.encode)
    assert example == encode_one(chat("q", "ab"), codec.encode)[0]
    assert (coverage.num_merged, coverage.num_examples) == (1, 1)


@pytest.mark.parametrize(
    "conversation", [chat("q", "ab\x80"), CapturedConversation(WHERE, (10, 194, 1), 1)]
)
def test_an_id_outside_of_the_vocabulary_is_refused(conversation: AnyConversation) -> None:
    assert encode_one(conversation, letters, vocab_size=195)[0] is not None
    with pytest.raises(ValueError) as caught:
        encode_one(conversation, letters, vocab_size=194)
    assert str(caught.value) == (
        "f.jsonl:1: token id 194 is not in the vocabulary of 194 tokens; is this the target's "
        "tokenizer?"
    )


def test_what_the_template_or_tokenizer_refuses_names_the_line(
    codec: ChatCodec, tmp_path: Path
) -> None:
    path = tmp_path / "f.jsonl"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\ud800"}]
    path.write_text(json.dumps({"messages": messages}), encoding="utf-8")
    (conversation,) = read_conversations(path)
    with pytest.raises(ValueError, match=r"f\.jsonl:1: text is not valid Unicode"):
        encode_one(conversation, codec.encode)


def test_max_tokens_leaves_room_for_a_prompt_and_an_answer() -> None:
    with pytest.raises(ValueError, match=r"^max_tokens is 1; it must be 2 or more$"):
        EncodingSettings(10, frozenset({EOS}), 1)
