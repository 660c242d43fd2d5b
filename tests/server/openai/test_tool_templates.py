"""Templates that know tools get tools, calls and results as transformers gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from configs.schema import ModelConfig
from server.openai.request.conversation import ChatMessage, RenderingFields, render_chat
from server.openai.request.tools import Tool
from server.text.answer.forms import SYNTAXES, answer_form
from server.text.template.chat_template import ChatTemplate
from server.text.template.rendering import Renderer
from tests.support.models.tiny_llama import CHAT_TEMPLATE, write_tokenizer
from tests.support.servers.http_server import SPECIAL_TOKENS
from tests.support.text.tool_templates import LLAMA3, LLAMA4, QWEN

Oracle = Callable[..., str]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "What it's like in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


def call(id: str, **arguments: Any) -> dict[str, Any]:
    return {
        "id": id, "type": "function", "function": {"name": "get_weather", "arguments": arguments},
    }  # fmt: skip


def result(id: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": text}


ASKED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How is it in Rome?"},
]
FIRST, SECOND = call("c1", city="Rome", days=2), call("c2", city="Oslo")
CALLED = [*ASKED, {"role": "assistant", "tool_calls": [FIRST]}, result("c1", '{"sun": "é"}')]
AGAIN = [*CALLED, {"role": "assistant", "content": "Sunny."}, ASKED[1]]
TWICE = {"role": "assistant", "content": "", "tool_calls": [FIRST, SECOND]}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder = tmp_path_factory.mktemp("oracle")
    write_tokenizer(folder)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, local_files_only=True
    )

    def render(source: str, messages: list[Any], tools: list[Any] | None) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=source,
                tokenize=False,
                add_generation_prompt=True,
            )
        )

    return render


@pytest.fixture(scope="module")
def render() -> Iterator[Oracle]:
    renderers = {
        source: Renderer(ChatTemplate(source, SPECIAL_TOKENS)) for source in (LLAMA3, LLAMA4, QWEN)
    }

    def rendered(source: str, messages: list[Any], tools: list[Any] | None) -> str:
        renderer = renderers[source]
        form = answer_form(renderer.template, ModelConfig())
        how = RenderingFields(tools=tools and [Tool.model_validate(tool) for tool in tools])
        shown = [ChatMessage.model_validate(message) for message in messages]
        return render_chat(renderer, form, shown, how).plain()

    with closing(renderers[LLAMA3]), closing(renderers[LLAMA4]), closing(renderers[QWEN]):
        yield rendered


@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["no tools", "tools"])
@pytest.mark.parametrize("messages", [ASKED, CALLED, AGAIN], ids=len)
@pytest.mark.parametrize("source", [LLAMA3, LLAMA4, QWEN], ids=["llama3", "llama4", "qwen"])
def test_conversations_with_tools_are_rendered_as_by_transformers(
    oracle: Oracle, render: Oracle, source: str, messages: list[Any], tools: list[Any] | None
) -> None:
    assert render(source, messages, tools) == oracle(source, messages, tools)


def test_several_calls_become_several_messages_where_a_template_takes_one(
    oracle: Oracle, render: Oracle
) -> None:
    results = [result("c2", "cold"), result("c1", "warm")]
    split = [
        {"role": "assistant", "content": "", "tool_calls": [FIRST]},
        results[1],
        {"role": "assistant", "content": "", "tool_calls": [SECOND]},
        results[0],
    ]
    messages = [*ASKED, TWICE, *results, ASKED[1]]
    expected = oracle(LLAMA3, [*ASKED, *split, ASKED[1]], [TOOL])
    assert render(LLAMA3, messages, [TOOL]) == expected
    assert render(QWEN, messages, None) == oracle(QWEN, messages, None)


@pytest.mark.parametrize(
    ("source", "settings", "name", "thinks"),
    [
        (LLAMA3, {}, "llama3_json", False),
        (LLAMA4, {}, "llama4_pythonic", False),
        (QWEN, {}, "hermes", True),
        (CHAT_TEMPLATE, {}, "hermes", False),
        (None, {}, "hermes", False),
        ("{{ tools }}", {}, "hermes", False),
        (LLAMA3, {"tool_parser": "hermes", "reasoning_parser": "think"}, "hermes", True),
        (QWEN, {"tool_parser": "none", "reasoning_parser": "none"}, None, False),
    ],
)
def test_the_form_of_answers_is_told_by_the_template_or_the_operator(
    source: str | None, settings: dict[str, Any], name: str | None, thinks: bool
) -> None:
    form = answer_form(ChatTemplate(source, SPECIAL_TOKENS), ModelConfig(**settings))
    assert form.syntax is (None if name is None else SYNTAXES[name])
    assert form.thinks is thinks
