"""Conversations become the token ids of the chat endpoint, and ids become text."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from configs.load import load_config
from server.text.chat_codec import ChatCodec, load_codec
from server.text.template.chat_template import ChatTemplate
from server.text.tokens.tokenizer import Tokenizer
from tests.support.configurations import hosted
from tests.support.models.tiny_llama import write_tiny_llama

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the quick brown fox"},
    {"role": "assistant", "content": "jumps, café 😀"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_llama(folder)
    return folder


def load(folder: Path, *settings: str) -> ChatCodec:
    config = load_config(None, [f"model.source={folder}", f"files.dir={folder}", *settings])
    return load_codec(hosted(config))


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_messages_are_encoded_as_transformers_encodes_them(
    folder: Path, add_generation_prompt: bool
) -> None:
    oracle = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    expected = oracle.apply_chat_template(
        MESSAGES, add_generation_prompt=add_generation_prompt, return_dict=True
    )
    assert load(folder).encode(MESSAGES, add_generation_prompt) == expected["input_ids"]


def test_decoding_leaves_special_tokens_out(folder: Path) -> None:
    codec = load(folder)
    text = codec.decode(codec.encode(MESSAGES[2:], False))
    assert text == "assistant\njumps, café 😀\n"


def test_the_configured_template_replaces_the_models_own(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.jinja"
    path.write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    codec = load(folder, f"model.chat_template={path}")
    assert codec.decode(codec.encode(MESSAGES, True)) == "Be brief."


def test_a_begin_token_is_not_added_before_the_templates_own(sentencepiece: Tokenizer) -> None:
    template = ChatTemplate("{{ bos_token }}a", sentencepiece.special_tokens)
    ids = ChatCodec(sentencepiece, template).encode(MESSAGES, True)
    assert ids.count(sentencepiece.bos_token_id) == 1


def test_a_model_without_a_template_is_a_value_error(sentencepiece: Tokenizer) -> None:
    codec = ChatCodec(sentencepiece, ChatTemplate(None, {}))
    with pytest.raises(ValueError, match="this model has no chat template"):
        codec.encode(MESSAGES, True)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}", {2, 0}),
        ("{% for m in messages %}{{ m.content }} \n<|im_end|>\n{% endfor %}", {2}),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", {2}),
        ("{{ messages[0].content }}<|endoftext|>", {2}),  # it has no answers
        ("{{ raise_exception('never') }}", {2}),
        (None, {2}),
    ],
)
def test_answers_end_with_eos_and_with_what_the_template_writes_after_them(
    folder: Path, template: str | None, expected: set[int]
) -> None:
    tokenizer = load(folder).tokenizer
    codec = ChatCodec(tokenizer, ChatTemplate(template, tokenizer.special_tokens))
    assert codec.ending_ids() == expected
