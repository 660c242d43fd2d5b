"""Tokenizers that only transformers can read are converted once and kept."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
from transformers import AutoTokenizer

from engine.checkpoints.source import ModelFiles
from server.text.output.detokenizer import IncrementalDetokenizer
from server.text.tokens.tokenizer import BYTE_LETTERS
from server.text.tokens.tokenizer_cache import CHECKSUMS, converted_folder
from server.text.tokens.tokenizer_files import load_tokenizer
from tests.support.models.tiny_llama import write_tokenizer

CONVERTING = "this is done once"


def write_slow_tokenizer(folder: Path) -> None:
    """GPT-2's old form: vocab.json and merges.txt, no tokenizer.json."""
    folder.mkdir()
    pieces = ["<|endoftext|>", *sorted(BYTE_LETTERS), "th", "the"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\n", encoding="utf-8")
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")


def write_sentencepiece_gguf(path: Path) -> None:
    """As for Llama 2: pieces with scores, marks for spaces, one piece per byte."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    types = [2, 3, 3] + [6] * 256
    words = ["▁the", "▁t", "he", "▁", "t", "h", "e", "a", "b", "日", "▁a"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces + words)
    writer.add_token_scores([0.0] * len(pieces) + [-float(rank) for rank in range(len(words))])
    writer.add_token_types(types + [1] * len(words))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("token_embd.weight", np.zeros((len(pieces + words), 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def files(tmp_path: Path) -> ModelFiles:
    write_slow_tokenizer(tmp_path / "model")
    return ModelFiles("hf", tmp_path / "model", "old")


@pytest.fixture
def conversions(caplog: pytest.LogCaptureFixture) -> Callable[[], int]:
    """The conversions so far."""
    caplog.set_level(logging.INFO)
    return lambda: sum(CONVERTING in record.message for record in caplog.records)


def test_a_tokenizer_without_tokenizer_json_is_converted_and_loaded(
    files: ModelFiles, tmp_path: Path
) -> None:
    loaded = load_tokenizer(files, tmp_path / "cache", None)
    ids = loaded.encode("the thé")
    assert [loaded.token_bytes(token_id) for token_id in ids][:3] == [b"the", b" ", b"th"]
    assert loaded.decode(ids) == "the thé"
    assert loaded.special_tokens["eos_token"] == "<|endoftext|>"
    assert loaded.chat_template == "{{ messages }}"


def test_a_sentencepiece_gguf_is_converted_and_loaded(
    tmp_path: Path, conversions: Callable[[], int]
) -> None:
    write_sentencepiece_gguf(tmp_path / "m.gguf")
    files = ModelFiles("gguf", tmp_path / "m.gguf", "m")
    for _ in range(2):
        loaded = load_tokenizer(files, tmp_path / "cache", None)
        ids = loaded.encode("the 日é b")
        assert [loaded.token_bytes(token_id) for token_id in ids] == [
            *(b"<s>", b" the", b" ", "日".encode(), b"\xc3", b"\xa9", b" ", b"b")
        ]
        assert loaded.decode(ids) == "the 日é b"
        assert IncrementalDetokenizer(loaded).add(ids) == "the 日é b"
        assert (loaded.bos_token_id, loaded.eos_token_id) == (1, 2)
        assert loaded.special_ids == {0, 1, 2}
        assert loaded.chat_template == "{{ messages }}"
    assert conversions() == 1


def write_llama2_tokenizer(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """tokenizer.model with tokenizer_config.json, as of Llama 2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps", "a server answers", "1234 def"]),
        model_writer=model,
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        hard_vocab_limit=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def test_a_folder_with_only_a_sentencepiece_model_is_read_as_by_transformers(
    tmp_path: Path,
) -> None:
    processor = write_llama2_tokenizer(tmp_path / "llama2")
    files = ModelFiles("hf", tmp_path / "llama2", "llama2")
    loaded = load_tokenizer(files, tmp_path / "cache", None)
    oracle = AutoTokenizer.from_pretrained(tmp_path / "llama2", local_files_only=True)
    texts = ["the quick fox", "naïve 日本 😀", "1234 12\n\t", "a  b", ""]
    for text in [*texts, "  two", "<s>x</s> y"]:
        ids = loaded.encode(text)
        assert ids == oracle(text)["input_ids"], text
        assert loaded.decode(ids) == oracle.decode(ids, skip_special_tokens=True), text
    for text in texts:  # on others transformers differs
        assert loaded.encode(text) == [1, *processor.encode(text)]
        assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.bos_token_id, loaded.eos_token_id) == (1, 2)


def test_the_conversion_is_done_once(
    files: ModelFiles, tmp_path: Path, conversions: Callable[[], int]
) -> None:
    first = converted_folder(files, tmp_path / "cache")
    assert converted_folder(files, tmp_path / "cache") == first
    assert conversions() == 1
    assert [path.name for path in first.parent.iterdir()] == [first.name]  # nothing left over


def test_several_at_once_convert_it_once(
    files: ModelFiles, tmp_path: Path, conversions: Callable[[], int]
) -> None:
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: converted_folder(files, tmp_path / "cache"), range(3)))
    assert len(folders) == conversions() == 1


def truncate_the_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-100])


def lose_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def lose_the_checksums(folder: Path) -> None:
    (folder / CHECKSUMS).unlink()


def empty_the_checksums(folder: Path) -> None:
    (folder / CHECKSUMS).write_text("{}")


def break_the_checksums(folder: Path) -> None:
    (folder / CHECKSUMS).write_bytes(b"\xff{")


def add_a_file(folder: Path) -> None:
    (folder / "special_tokens_map.json").write_text('{"eos_token": "x"}')


def add_a_folder(folder: Path) -> None:
    (folder / "more").mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        truncate_the_tokenizer,
        lose_the_tokenizer,
        lose_the_checksums,
        empty_the_checksums,
        break_the_checksums,
        add_a_file,
        add_a_folder,
    ],
)
def test_a_damaged_folder_is_converted_again(
    files: ModelFiles,
    tmp_path: Path,
    conversions: Callable[[], int],
    damage: Callable[[Path], None],
) -> None:
    folder = converted_folder(files, tmp_path / "cache")
    whole = (folder / "tokenizer.json").read_bytes()
    damage(folder)
    assert converted_folder(files, tmp_path / "cache") == folder
    assert (folder / "tokenizer.json").read_bytes() == whole
    assert conversions() == 2
    converted_folder(files, tmp_path / "cache")
    assert conversions() == 2


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("vocab.json", "{", "{ "),
        ("merges.txt", "th e\n", ""),
        ("tokenizer_config.json", "{", "{ "),
        ("chat_template.jinja", "messages", "messages[0]"),
    ],
)
def test_other_content_gets_another_folder(
    files: ModelFiles, tmp_path: Path, file: str, old: str, new: str
) -> None:
    before = converted_folder(files, tmp_path / "cache")
    path = files.path / file
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    assert converted_folder(files, tmp_path / "cache") != before


def test_what_cannot_be_converted_is_a_value_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be converted to a tokenizer"):
        converted_folder(ModelFiles("hf", tmp_path / "model", "bad"), tmp_path / "cache")
    assert list((tmp_path / "cache" / "tokenizers").iterdir()) == []


def test_a_tokenizer_that_loads_directly_needs_no_cache(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_tokenizer(tmp_path / "model")
    load_tokenizer(ModelFiles("hf", tmp_path / "model", "new"), tmp_path / "cache", None)
    assert not (tmp_path / "cache").exists()
    tokenizers.Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))


def test_code_in_a_folder_is_never_run_nor_offered_to_be_run(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*words: str) -> str:
        raise AssertionError(f"asked {words}")

    monkeypatch.setattr("builtins.input", asked)
    ran = tmp_path / "ran"
    program = f"open({str(ran)!r}, 'w')\nclass Config: ...\nclass Own: ...\n"
    (files.path / "planted.py").write_text(program)
    auto_map = {"AutoConfig": "planted.Config", "AutoTokenizer": ["planted.Own", "planted.Own"]}
    path = files.path / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "Own", "auto_map": auto_map}))
    (files.path / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    with pytest.raises(ValueError, match="cannot be converted to a tokenizer"):
        converted_folder(files, tmp_path / "cache")
    assert not ran.exists()


def test_a_cache_that_cannot_be_written_costs_only_the_keeping(
    files: ModelFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").touch()
    tokenizer = load_tokenizer(files, tmp_path / "cache", None)
    assert tokenizer.decode(tokenizer.encode("the")) == "the"
    assert "files.dir cannot be used" in caplog.text
