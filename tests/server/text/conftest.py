"""One tokenizer of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from engine.checkpoints.source import BUNDLED_ALIAS, ModelFiles, resolve_source
from server.text.tokens.tokenizer import SPACE_MARK, Tokenizer
from server.text.tokens.tokenizer_files import load_tokenizer
from tests.support.models.tiny_llama import write_tokenizer


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a model directory that the text layer reads."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    files = ModelFiles("hf", tiny_folder, "tiny")
    return load_tokenizer(files, tmp_path_factory.mktemp("cache"), None)


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(resolve_source(BUNDLED_ALIAS), tmp_path_factory.mktemp("cache"), None)


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    """As for Llama 2: marks for spaces, pieces for bytes, a space in front of the first word."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    letters = [SPACE_MARK, *"abcdefghijklmnopqrstuvwxyz,.é日本"]
    pairs = [(SPACE_MARK, "a"), ("t", "h"), ("th", "e"), (SPACE_MARK, "the"), ("日", "本")]
    pieces += letters + ["".join(pair) for pair in pairs]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE_MARK), normalizers.Replace(" ", SPACE_MARK)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE_MARK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken(text, special=True) for text in pieces[:3]])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}, None)


@pytest.fixture(params=["tiny", "bundled", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each kind in turn."""
    found: Tokenizer = request.getfixturevalue(request.param)
    return found
