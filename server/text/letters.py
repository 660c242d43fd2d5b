"""Special tokens that a client writes into a message are letters, not tokens.

Before a template is rendered, every letter of the client's strings that could begin or end a
special token is replaced by one character of Unicode's private use area, a stand-in. No string
changes its length, and only such strings change, so templates trim, slice and compare them as
before. In the rendered prompt the template's own special tokens are then the only ones; they are
found first, and only after that do the stand-ins become letters again.

This holds for templates that copy strings, or parts of them. A template that deletes or replaces
letters inside a string could still join a special token out of the rest.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import tokenizers
from tokenizers import AddedToken

STAND_INS = range(0xE000, 0xF900)  # private use area
CASES = re.compile(r"\b(lower|upper|capitalize|title|swapcase|casefold)\b")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt as a template wrote it; each key of `letters` stands for the letter at it."""

    text: str
    letters: Mapping[str, str] = field(default_factory=dict)

    def plain(self) -> str:
        """The text as the client would read it."""
        return self.text.translate({ord(mark): letter for mark, letter in self.letters.items()})


class SpecialLetters:
    """Finds in strings the letters of special tokens. Threads may share it."""

    def __init__(self, specials: Iterable[str], template: str) -> None:
        """`template` is the source that the strings are for."""
        self._template = template
        self._any_case = bool(CASES.search(template))
        found = {self._folded(text) for text in specials if text}
        self._pattern = re.compile(_alternatives(found)) if found else None
        self._rest = self._pattern.sub("", template) if self._pattern else ""
        self._openings: dict[str, set[str]] = {}  # begin of a special token -> how it goes on
        self._endings: dict[str, set[str]] = {}  # end of a special token -> what is before it
        for text in found:
            for cut in range(1, len(text)):
                self._openings.setdefault(text[:cut], set()).add(text[cut : cut + 2])
                self._endings.setdefault(text[cut:], set()).add(text[:cut][-2:])
        self._longest = max(map(len, found), default=0)
        self._first = {text[0] for text in found}
        self._last = {text[-1] for text in found}

    def hide(self, value: Any) -> tuple[Any, dict[str, str]]:
        """`value`, a tree of lists and dicts, with stand-ins; and the letters they stand for.

        Raises:
            ValueError: the strings hold all characters that could be stand-ins.
        """
        if self._pattern is None:
            return value, {}
        texts = set(_strings(value))
        borders = _Borders({self._folded(text).strip() for text in texts} - {""}, self._rest)
        places = {text: sorted(set(self._places(text, borders))) for text in texts}
        letters = sorted({text[place] for text, found in places.items() for place in found})
        if not letters:
            return value, {}
        unused = self._unused(places)
        try:
            stand_ins = {letter: next(unused) for letter in letters}
        except StopIteration:
            raise ValueError("the messages hold every private-use character") from None
        changed = {
            text: _with_stand_ins(text, found, stand_ins) for text, found in places.items() if found
        }
        return _mapped(value, changed), {mark: letter for letter, mark in stand_ins.items()}

    def _folded(self, text: str) -> str:
        if not self._any_case:
            return text
        lower = text.lower()
        return lower if len(lower) == len(text) else text

    def _places(self, text: str, borders: _Borders) -> Iterator[int]:
        """Where special tokens begin; also where one ends that may begin before the string, or
        begins one that may end after it."""
        assert self._pattern is not None
        text = self._folded(text)
        begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
        most = min(self._longest, end - begin + 1)
        if not self._first.isdisjoint(text[max(end - most, 0) : end]):
            for cut in range(end - most + 1, end):
                if borders.after(self._openings.get(text[cut:end], ())):
                    yield cut
        if not self._last.isdisjoint(text[begin : begin + most]):
            for cut in range(begin + 1, begin + most):
                if borders.before(self._endings.get(text[begin:cut], ())):
                    yield cut - 1
        for found in self._pattern.finditer(text):
            yield found.start()

    def _unused(self, texts: Iterable[str]) -> Iterator[str]:
        known = set(self._template).union(*texts)
        for number in STAND_INS:
            if chr(number) not in known:
                yield chr(number)


class _Borders:
    """What may stand next to a string in a prompt: other strings, and the template's own text."""

    def __init__(self, texts: Iterable[str], template: str) -> None:
        texts = list(texts)
        self._starts = _Parts(text[:2] for text in texts)
        self._ends = _Parts(text[-2:] for text in texts)
        self._template = template

    def after(self, parts: Iterable[str]) -> bool:
        """Whether one of `parts`, of one or two letters, may follow."""
        return any(self._known(part, part[:1], self._starts) for part in parts)

    def before(self, parts: Iterable[str]) -> bool:
        """Whether one of `parts` may precede."""
        return any(self._known(part, part[-1:], self._ends) for part in parts)

    def _known(self, part: str, near: str, borders: _Parts) -> bool:
        if part in borders.texts or near in borders.texts or part in borders.letters:
            return True
        return part in self._template


class _Parts:
    """Texts of one or two letters, and their letters: there may be very many."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = set(texts)
        self.letters = {letter for text in self.texts for letter in text}


class LetterEncoder:
    """Encodes texts with stand-ins: a copy of a tokenizer that takes special tokens for letters,
    and an alias for each special token."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = tokenizers.Tokenizer.from_str(backend.to_str())
        mark = secrets.token_hex(16)  # so that no client can write an alias
        aliases = {
            index: _alias(f"\U000f0000{mark}{index}\U000f0001", token)
            for index, token in backend.get_added_tokens_decoder().items()
            if token.special
        }
        self._backend.add_tokens(list(aliases.values()))
        self._ids = {self._backend.token_to_id(a.content): index for index, a in aliases.items()}
        texts = {str(backend.id_to_token(index)): alias.content for index, alias in aliases.items()}
        self._aliases = texts
        self._pattern = re.compile(_alternatives(texts)) if texts else None
        self._backend.encode_special_tokens = True

    def encode(self, rendered: Rendered, add_special_tokens: bool) -> list[int]:
        """Ids of the text. UnicodeError, TypeError for lone surrogates."""
        text = rendered.text
        if self._pattern is not None:
            text = self._pattern.sub(lambda found: self._aliases[found.group()], text)
        text = Rendered(text, rendered.letters).plain()
        batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return [self._ids.get(index, index) for index in batch[0].ids]


def _alias(text: str, token: AddedToken) -> AddedToken:
    return AddedToken(
        text,
        special=False,
        normalized=False,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
    )


def _alternatives(texts: Iterable[str]) -> str:
    """A pattern for the longest of `texts`; those with a common start share it, which is faster."""
    groups: dict[str, list[str]] = {}
    for text in sorted(texts, key=lambda text: (-len(text), text)):
        groups.setdefault(text[:2], []).append(re.escape(text[2:]))
    return "|".join(f"{re.escape(start)}(?:{'|'.join(rest)})" for start, rest in groups.items())


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, member in value.items():
            yield key
            yield from _strings(member)
    elif isinstance(value, list | tuple):
        for member in value:
            yield from _strings(member)


def _with_stand_ins(text: str, places: list[int], stand_ins: Mapping[str, str]) -> str:
    pieces, done = [], 0
    for place in places:
        pieces += [text[done:place], stand_ins[text[place]]]
        done = place + 1
    return "".join([*pieces, text[done:]])


def _mapped(value: Any, changed: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return changed.get(value, value)
    if isinstance(value, dict):
        return {changed.get(k, k): _mapped(member, changed) for k, member in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(member, changed) for member in value]
    return value
