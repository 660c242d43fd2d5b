"""Incremental text equals the text of the whole, however the tokens are split."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.output.detokenizer import IncrementalDetokenizer
from server.text.tokens.tokenizer import Tokenizer

TEXTS = [
    "",
    "a",
    " the server  answers ",
    "naïve café",
    "日本語、中文、한국어",
    "😀👍🏽👩‍👩‍👧‍👦🇩🇪",
    "e\u0301 a\u0308\u0323 \u0301",  # combining marks, one without a letter in front
    "مرحبا بالعالم",
    "\n\t\r\n x\x00\x7f",
    "�",  # U+FFFD written on purpose
]
BROKEN = [
    b"\x80",
    b"\xff\xfe",
    b"\xe2\x82",  # cut off
    b"\xe2\x82a",
    b"\xf0\x9f\x98",
    b"\xf0\x9f\x98\xf0\x9f\x98\x80",
    b"\xc0\xaf",  # overlong
    b"\xed\xa0\x80",  # a surrogate
    b"\xf4\x90\x80\x80",  # beyond U+10FFFF
    b"ab\xe3\x81c\xe3\x81\x82",
]

NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}  # some vocabularies leave these bytes out


def byte_ids(tokenizer: Tokenizer, content: bytes) -> list[int]:
    """One token per byte."""
    single = {}
    for token_id in range(tokenizer.vocab_size):
        if token_id not in tokenizer.special_ids:
            single.setdefault(tokenizer.token_bytes(token_id), token_id)
    return [single[bytes([value])] for value in content]


def pieces(ids: list[int], cuts: tuple[int, ...]) -> Iterator[list[int]]:
    borders = [0, *cuts, len(ids)]
    return (ids[begin:end] for begin, end in itertools.pairwise(borders))


def incremental(
    tokenizer: Tokenizer, ids: list[int], cuts: tuple[int, ...], prompt: list[int] | None = None
) -> str:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt or [])
    return "".join(map(detokenizer.add, pieces(ids, cuts))) + detokenizer.flush()


def all_cuts(length: int) -> Iterator[tuple[int, ...]]:
    """All splits of a short sequence into calls; of a long one, each cut in two, and one by one."""
    if length <= 8:
        places = range(1, length)
        for count in range(max(length, 1)):
            yield from itertools.combinations(places, count)
    else:
        yield from ((place,) for place in range(length + 1))
        yield tuple(range(1, length))


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_every_split_gives_the_text_of_the_whole(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    for cuts in all_cuts(len(ids)):
        assert incremental(tokenizer, ids, cuts) == text


@pytest.mark.parametrize(
    ("name", "content"),
    [("tiny", content) for content in BROKEN]
    + [("bundled", content) for content in BROKEN if not NEVER_IN_UTF8.intersection(content)],
    ids=ascii,
)
def test_broken_utf8_shows_as_the_library_shows_it(
    request: pytest.FixtureRequest, name: str, content: bytes
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    ids = byte_ids(tokenizer, content)
    expected = tokenizer.decode(ids)
    assert expected == content.decode(errors="replace")
    for cuts in all_cuts(len(ids)):
        assert incremental(tokenizer, ids, cuts) == expected


@pytest.mark.parametrize("content", BROKEN, ids=ascii)
def test_sentencepiece_keeps_the_valid_characters_around_broken_bytes(
    sentencepiece: Tokenizer, content: bytes
) -> None:
    ids = byte_ids(sentencepiece, content)
    for cuts in all_cuts(len(ids)):
        assert incremental(sentencepiece, ids, cuts) == content.decode(errors="replace")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_split_of_any_tokens_gives_the_text_of_the_whole(
    tiny: Tokenizer, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, tiny.vocab_size - 1), max_size=30))
    places = st.sets(st.integers(0, len(ids)), max_size=8)
    cuts = tuple(sorted(data.draw(places)))
    assert incremental(tiny, ids, cuts) == tiny.decode(ids)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_prompt_and_output_cut_anywhere_give_the_text_of_the_whole(
    tiny: Tokenizer, data: st.DataObject
) -> None:
    """The output is the text after the complete characters of the prompt."""
    plain = st.integers(3, tiny.vocab_size - 1)
    ids = data.draw(st.lists(plain, max_size=20))
    border = data.draw(st.integers(0, len(ids)))
    added = incremental(tiny, ids[border:], (), prompt=ids[:border])
    whole = tiny.decode(ids)
    assert whole.endswith(added)
    complete = whole.removesuffix(added) if added else whole
    assert tiny.decode(ids[:border]) in (complete, complete + "�")


def test_a_character_is_emitted_with_its_last_byte(tiny: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tiny)
    ids = byte_ids(tiny, "x€😀".encode())
    assert [detokenizer.add([token_id]) for token_id in ids] == [
        *("x", "", "", "€", "", "", "", "😀")
    ]
    assert detokenizer.flush() == ""


def test_a_character_that_the_prompt_began_is_emitted_with_the_output(tiny: Tokenizer) -> None:
    ids = byte_ids(tiny, "ab😀!".encode())
    for border in range(2, 6):
        assert incremental(tiny, ids[border:], (), prompt=ids[:border]) == "😀!"
    assert incremental(tiny, ids[6:], (), prompt=ids[:6]) == "!"


def test_a_prompt_that_ends_in_special_tokens_keeps_the_character_it_began(tiny: Tokenizer) -> None:
    prompt = [*byte_ids(tiny, "😀".encode()[:3]), *[min(tiny.special_ids)] * 6]
    output = byte_ids(tiny, "😀".encode()[3:])
    assert tiny.decode(prompt + output) == "😀"
    assert incremental(tiny, output, (), prompt=prompt) == "😀"


def test_an_unfinished_character_shows_at_the_end(tiny: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tiny)
    assert detokenizer.add(byte_ids(tiny, "€".encode()[:2])) == ""
    assert detokenizer.flush() == "�"


def test_special_tokens_are_skipped_or_written(tokenizer: Tokenizer) -> None:
    special = tokenizer.eos_token_id
    assert special is not None
    ids = [*tokenizer.encode("a", add_special_tokens=False), special]
    name = tokenizer.special_tokens["eos_token"]
    for skip, expected in ((True, "a"), (False, "a" + name)):
        detokenizer = IncrementalDetokenizer(tokenizer, skipped=None if skip else ())
        assert detokenizer.add(ids) == tokenizer.decode(ids, skip_special_tokens=skip) == expected


def test_unused_ids_of_a_padded_vocabulary_are_no_text(tiny: Tokenizer) -> None:
    assert incremental(tiny, [tiny.vocab_size, tiny.vocab_size + 100], ()) == ""


@pytest.mark.parametrize(
    ("prompt", "output", "expected"),
    [
        ("", "the a", "the a"),  # the space in front of the first word belongs to the format
        ("a", " the", " the"),
    ],
)
def test_only_the_first_word_of_a_whole_text_loses_its_space(
    sentencepiece: Tokenizer, prompt: str, output: str, expected: str
) -> None:
    bos = sentencepiece.bos_token_id
    assert bos is not None
    before = [bos, *sentencepiece.encode(prompt, add_special_tokens=False)]
    whole = [bos, *sentencepiece.encode(prompt + output, add_special_tokens=False)]
    assert incremental(sentencepiece, whole[len(before) :], (), prompt=before) == expected
