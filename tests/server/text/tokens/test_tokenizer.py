"""Text to ids and back; the files from which a tokenizer is read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models
from transformers import AutoTokenizer

from engine.checkpoints.source import ModelFiles
from server.text.tokens.tokenizer import BYTE_LETTERS, Tokenizer
from server.text.tokens.tokenizer_files import load_tokenizer
from tests.support.models.tiny_llama import CHAT_TEMPLATE, SPECIALS

TEXTS = [
    "",
    "the quick fox",
    "  two  spaces\n\t",
    "naïve 日本 😀 e\u0301",
    "1234 12",
    "<|im_start|>user",
]


def load(folder: Path, chat_template: str | None = None) -> Tokenizer:
    return load_tokenizer(ModelFiles("hf", folder, "test"), folder / "cache", chat_template)


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def test_the_text_layer_loads_a_model_without_torch_and_transformers(tiny_folder: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from engine.checkpoints.source import ModelFiles, resolve_source\n"
        "from server.text.output import stream\n"
        "from server.text.template import chat_template\n"
        "from server.text.tokens.tokenizer_files import load_tokenizer\n"
        "cache = Path('/nonexistent')\n"
        f"load_tokenizer(ModelFiles('hf', Path({str(tiny_folder)!r}), 'tiny'), cache, None)\n"
        "load_tokenizer(resolve_source('smollm2-135m-instruct'), cache, None)\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_encoding_equals_that_of_transformers(
    tiny: Tokenizer, tiny_folder: Path, text: str
) -> None:
    oracle = AutoTokenizer.from_pretrained(tiny_folder, local_files_only=True)
    assert tiny.encode(text) == oracle(text)["input_ids"]
    assert tiny.decode(tiny.encode(text)) == oracle.decode(
        oracle(text)["input_ids"], skip_special_tokens=True
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=40))
def test_any_text_comes_back(tiny: Tokenizer, text: str) -> None:
    ids = tiny.encode(text)
    assert tiny.decode(ids, skip_special_tokens=False) == text
    assert b"".join(map(tiny.token_bytes, ids)) == text.encode()


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\ude00\ud83d"], ids=ascii)
def test_a_lone_surrogate_is_a_value_error(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        tokenizer.encode(text)


@pytest.mark.parametrize("token_id", [-1, 2**32, 2**70])
def test_an_invalid_id_is_a_value_error(tiny: Tokenizer, token_id: int) -> None:
    for use in (tiny.token_bytes, tiny.token_text, lambda bad: tiny.decode([5, bad])):
        with pytest.raises(ValueError, match=f"token id {token_id} is not in the vocabulary"):
            use(token_id)


def test_ids_beyond_the_vocabulary_are_empty_text(tiny: Tokenizer) -> None:
    behind = tiny.vocab_size
    assert tiny.token_bytes(behind) == b""
    assert tiny.decode([behind, *tiny.encode("a")]) == "a"


def test_special_tokens_are_known_by_name_and_by_id(tiny: Tokenizer, bundled: Tokenizer) -> None:
    assert tiny.special_ids == {0, 1, 2}
    assert (tiny.bos_token_id, tiny.eos_token_id) == (1, 2)
    assert tiny.encode("<|im_end|>") == [2]
    assert (bundled.bos_token_id, bundled.eos_token_id) == (1, 2)
    assert bundled.special_tokens["eos_token"] == "<|im_end|>"


def test_every_byte_has_a_letter_of_its_own() -> None:
    assert sorted(BYTE_LETTERS.values()) == list(range(256))
    assert BYTE_LETTERS.keys() == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def test_token_text_shows_a_part_of_a_character_as_a_replacement(tiny: Tokenizer) -> None:
    first = next(i for i in range(tiny.vocab_size) if tiny.token_bytes(i) == b"\xe2")
    assert tiny.token_text(first) == "�"
    assert tiny.token_text(tiny.encode("the")[0]) in "the"


def test_an_unknown_decoder_is_refused() -> None:
    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match=r"WordPiece.* is not supported; ByteLevel"):
        Tokenizer(backend, {}, None)


def test_padding_and_truncation_of_the_file_are_ignored(folder: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    backend.save(str(folder / "tokenizer.json"))
    text = "the quick brown fox jumps over the lazy dog"
    loaded = load(folder)
    assert loaded.decode(loaded.encode(text), skip_special_tokens=False) == text


def test_the_template_comes_from_the_operator_then_the_file_then_the_configuration(
    folder: Path,
) -> None:
    config = folder / "tokenizer_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"chat_template": "from config"}))
    assert load(folder, "from operator").chat_template == "from operator"
    assert load(folder).chat_template == CHAT_TEMPLATE
    (folder / "chat_template.jinja").unlink()
    assert load(folder).chat_template == "from config"
    named = [
        {"name": "tool_use", "template": "for tools"},
        {"name": "default", "template": "plain"},
    ]
    config.write_text(json.dumps(content | {"chat_template": named}))
    assert load(folder).chat_template == "plain"
    config.write_text(json.dumps(content | {"chat_template": named[:1]}))
    assert load(folder).chat_template == "for tools"  # the only one
    config.write_text(json.dumps(content))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "of a processor"}))
    assert load(folder).chat_template == "of a processor"
    (folder / "chat_template.json").unlink()
    assert load(folder).chat_template is None


def test_several_templates_without_a_default_are_named_in_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    named = [{"name": name, "template": name} for name in ("rag", "tool_use")]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": named}))
    assert load(folder).chat_template is None
    assert "none of the chat templates 'rag', 'tool_use' is called 'default'" in caplog.text


def test_special_tokens_may_be_objects_or_stand_in_their_own_file(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": SPECIALS[2], "lstrip": False}, "unk_token": None})
    )
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": SPECIALS[1]}))
    assert load(folder).special_tokens == {"eos_token": SPECIALS[2], "bos_token": SPECIALS[1]}


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("tokenizer.json", "{}", "tokenizer.json cannot be loaded"),
        ("tokenizer_config.json", "{", "tokenizer_config.json cannot be read as JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json must hold a JSON object"),
    ],
)
def test_a_broken_file_is_named(folder: Path, file: str, content: str, problem: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=problem):
        load(folder)
