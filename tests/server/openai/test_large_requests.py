"""Large requests cost as much as they are long, whatever their form: work is counted, not timed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import msgspec
import pytest

from server.http.errors import ApiError
from server.openai.inputs.convert import PIECE, encode
from server.openai.request.conversation import ChatMessage, ToolCall, check_results
from server.text.answer.instructions import with_single_calls
from server.text.letters import Rendered, SpecialLetters
from tests.support.counting import CountedText, num_lines
from tests.support.engines.scripted_engine import INFO

Work = Callable[[int], Callable[[], object]]  # of a size


def calls(size: int) -> Callable[[], object]:
    function = {"name": "f", "arguments": {}}
    made = [
        ToolCall.model_construct(id=CountedText(f"c{number}"), function=function)
        for number in range(size)
    ]
    results = [
        ChatMessage.model_construct(role="tool", tool_call_id=call.id, content="")
        for call in reversed(made)
    ]
    asked = ChatMessage.model_construct(role="assistant", content=None, tool_calls=made)
    return lambda: check_results([asked, *results])


def single_calls(size: int) -> Callable[[], object]:
    ids = [CountedText(f"c{number}") for number in range(size)]
    made: list[dict[str, Any]] = [{"id": id, "function": {}} for id in ids]
    results = [{"role": "tool", "tool_call_id": id, "content": ""} for id in reversed(ids)]
    shown = [{"role": "assistant", "tool_calls": made}, *results]

    def work() -> None:
        found = with_single_calls(shown)
        assert [each["role"] for each in found] == ["assistant", "tool"] * size

    return work


def letters(size: int) -> Callable[[], object]:
    texts = [f"{chr(0x4E00 + number)}{chr(0x5000 + number)} <" for number in range(size)]
    private = "".join(map(chr, range(0xE000, 0xE000 + size)))
    return lambda: SpecialLetters(["<|end|>"], "{{ x }}").hide([*texts, private, "<|end|>"])


@pytest.mark.parametrize("work", [calls, single_calls, letters])
def test_twice_as_much_is_twice_the_work(work: Work) -> None:
    def cost(size: int) -> int:
        prepared = work(size)
        CountedText.compared = 0
        return num_lines(prepared) + CountedText.compared

    assert cost(400) < 3 * cost(200)


class WideTokens:
    """A tokenizer with a token for many spaces."""

    special_tokens: ClassVar[dict[str, str]] = {}
    encoded = 0

    def fewest_tokens(self, text: str) -> int:
        return 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.encoded += len(text)
        return [0] * (len(text) // 200)

    def encode_rendered(self, prompt: Rendered, add_special_tokens: bool = False) -> list[int]:
        return self.encode(prompt.text)


def test_a_text_of_wide_tokens_is_not_tokenised_whole() -> None:
    tokenizer: Any = WideTokens()
    context: Any = SimpleNamespace(tokenizer=tokenizer)
    limited = msgspec.structs.replace(INFO, max_model_len=90)
    with pytest.raises(ApiError) as caught:
        encode(context, limited, Rendered(" " * 40 * PIECE), False, "prompt")
    assert caught.value.detail.code == "context_length_exceeded"
    assert tokenizer.encoded <= PIECE
