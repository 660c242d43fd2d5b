"""Build a byte-level BPE tokenizer from the metadata of a GGUF file.

transformers can do this too, but takes 12 to 20 seconds and knows only one way to split text
before merging: runs of spaces before digits then get other tokens than in training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# Applied one after another where `tokenizer.ggml.pre` is `default` or absent.
DEFAULT_SPLITS = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Splitting:
    """The meaning of a name in `tokenizer.ggml.pre`."""

    pre_tokenizer: Any
    whole_words_first: bool = False  # words in the vocabulary are used without merging
    adds_bos: bool = False  # unless the file says otherwise


def _splittings() -> dict[str | None, _Splitting]:
    """By name, as in llama.cpp."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    llama3 = _Splitting(_splits(LLAMA3_SPLIT), whole_words_first=True, adds_bos=True)
    default = _Splitting(_splits(*DEFAULT_SPLITS))
    return {
        None: default,
        "default": default,
        "gpt-2": _Splitting(byte_level),
        "smollm": _Splitting(digits),
        "llama-bpe": llama3,
        "llama3": llama3,
        "llama-v3": llama3,
        "falcon3": llama3,
        "smaug-bpe": _Splitting(_splits(LLAMA3_SPLIT)),
    }


def _splits(*patterns: str) -> Any:
    pieces = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*pieces, byte_level])


def is_byte_level(metadata: Mapping[str, Any]) -> bool:
    """Whether the file holds a byte-level BPE tokenizer, as `build_tokenizer` needs."""
    return metadata.get("tokenizer.ggml.model") == "gpt2"


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a `gpt2` type GGUF. ValueError for an unknown `tokenizer.ggml.pre`."""
    known = _splittings()
    name = metadata.get("tokenizer.ggml.pre")
    if name not in known:
        raise ValueError(
            f"tokenizer.ggml.pre {name!r} is not supported ({', '.join(filter(None, known))} are); "
            "serve the model's Hugging Face directory instead"
        )
    splitting = known[name]
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=splitting.whole_words_first))
    tokenizer.pre_tokenizer = splitting.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    _add_marked_tokens(tokenizer, tokens, metadata.get("tokenizer.ggml.token_type", []))
    tokenizer.post_processor = _frame(metadata, splitting, tokens)
    return tokenizer


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Texts of bos_token, eos_token, ..., by name; only of those that the file defines."""
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in NAMED.items()}
    return {name: tokens[index] for name, index in ids.items() if index is not None}


def write_tokenizer(metadata: Mapping[str, Any], folder: Path) -> None:
    """The files of the tokenizer as Hugging Face directories have them. ValueError if it is not
    byte-level."""
    if not is_byte_level(metadata):
        raise ValueError("a tokenizer of SentencePiece in a .gguf file cannot be written")
    build_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    described = special_tokens(metadata) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if template := metadata.get("tokenizer.chat_template"):
        described["chat_template"] = template
    text = json.dumps(described, indent=1) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _add_marked_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    def marked(kind: int) -> list[AddedToken]:
        texts = (text for text, found in zip(tokens, types, strict=True) if found == kind)
        return [AddedToken(text, special=kind == CONTROL, normalized=False) for text in texts]

    if types:
        tokenizer.add_special_tokens(marked(CONTROL))
        tokenizer.add_tokens(marked(USER_DEFINED))


def _frame(metadata: Mapping[str, Any], splitting: _Splitting, tokens: list[str]) -> Any:
    """Post-processor that adds BOS and EOS to a text where the file asks for them."""
    parts, frame = ["$A"], []
    if metadata.get("tokenizer.ggml.add_bos_token", splitting.adds_bos):
        frame.append(metadata["tokenizer.ggml.bos_token_id"])
        parts.insert(0, tokens[frame[-1]])
    if metadata.get("tokenizer.ggml.add_eos_token", False):
        frame.append(metadata["tokenizer.ggml.eos_token_id"])
        parts.append(tokens[frame[-1]])
    specials = [(tokens[index], index) for index in frame]
    return processors.TemplateProcessing(single=parts, special_tokens=specials)
