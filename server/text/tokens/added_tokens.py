"""Tokens that only a tokenizer's configuration files name, added as transformers adds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer

NAMED = ("bos_token", "eos_token")
LISTS = ("additional_special_tokens", "extra_special_tokens")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class TokenFiles:
    """The JSON files next to tokenizer.json, empty where there is none."""

    config: dict[str, Any]  # tokenizer_config.json
    special_map: dict[str, Any]  # special_tokens_map.json
    added: dict[str, int]  # added_tokens.json, text -> id


def complete(backend: Tokenizer, files: TokenFiles) -> None:
    """Add the tokens that tokenizer.json lacks. ValueError for a token that would not get the id
    that the files give it."""
    declared = dict(_with_ids(files))
    before = backend.get_vocab_size(with_added_tokens=True)
    # The library leaves tokens alone that tokenizer.json adds already.
    backend.add_tokens([token for _, token in sorted(declared.items(), key=lambda item: item[0])])
    _check_ids(backend, declared, before)
    backend.add_special_tokens([AddedToken(text, special=True) for text in _special_texts(files)])


def _with_ids(files: TokenFiles) -> Iterator[tuple[int, AddedToken]]:
    """The tokens of `added_tokens_decoder`, else those of added_tokens.json."""
    table = files.config.get("added_tokens_decoder")
    if table is not None:
        for index, entry in table.items():
            flags = {name: entry[name] for name in FLAGS if name in entry}
            yield int(index), AddedToken(entry["content"], **flags)
        return
    special = set(_special_texts(files))
    for text, index in files.added.items():
        yield index, AddedToken(text, special=text in special, normalized=text not in special)


def _check_ids(backend: Tokenizer, declared: Mapping[int, AddedToken], before: int) -> None:
    for index, token in declared.items():
        found = backend.token_to_id(token.content)
        if found is not None and found >= before and found != index:
            raise ValueError(
                f"the tokenizer's files give {token.content!r} the id {index}, but "
                f"tokenizer.json lacks it and has {before} tokens, so it would get the id {found}"
            )


def _special_texts(files: TokenFiles) -> list[str]:
    """BOS, EOS and the listed special tokens. Others, such as a padding token, are not added: a
    prompt never needs them, and their ids are often outside the model's vocabulary."""
    table = files.special_map | files.config
    entries: list[Any] = [table.get(name) for name in NAMED]
    for name in LISTS:
        listed = table.get(name) or ()
        entries += listed.values() if isinstance(listed, Mapping) else listed
    return list(dict.fromkeys(_texts(entries)))


def _texts(entries: Iterable[Any]) -> Iterator[str]:
    for entry in entries:
        text = entry.get("content") if isinstance(entry, Mapping) else entry
        if isinstance(text, str):
            yield text
