"""The text of one choice: detokenising, stop strings and stop tokens together."""

from __future__ import annotations

import itertools

import pytest

from server.text.output.stream import StreamOptions, TextStream
from server.text.tokens.tokenizer import Tokenizer


def run(
    stream: TextStream, ids: list[int], cuts: tuple[int, ...] = ()
) -> tuple[str, int, list[int]]:
    """Text, number of tokens taken, and their offsets."""
    text, num_tokens, offsets = "", 0, []
    for begin, end in itertools.pairwise([0, *cuts, len(ids)]):
        delta = stream.push(ids[begin:end])
        text += delta.text
        num_tokens += delta.num_tokens
        offsets += delta.offsets
        assert len(delta.offsets) == delta.num_tokens
        assert delta.stop == stream.stop
        if delta.stop is not None:
            break
    return text + stream.finish(), num_tokens, offsets


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token per ASCII letter, or per byte of other characters."""
    backwards = {}
    for token_id in range(tokenizer.vocab_size):
        backwards.setdefault(tokenizer.token_bytes(token_id), token_id)
    return [backwards[bytes([value])] for value in text.encode()]


def test_without_stops_the_text_is_the_text_of_the_whole(tokenizer: Tokenizer) -> None:
    text = "the 日本 server 😀 é"
    ids = tokenizer.encode(text, add_special_tokens=False)
    for cut in range(len(ids) + 1):
        stream = TextStream(tokenizer)
        assert run(stream, ids, (cut,))[:2] == (text, len(ids))
        assert stream.stop is None


def test_offsets_say_where_the_text_of_each_token_begins(tiny: Tokenizer) -> None:
    text, num_tokens, offsets = run(TextStream(tiny), letters(tiny, "a€b"))
    assert (text, num_tokens) == ("a€b", 5)
    assert offsets == [0, 1, 1, 1, 2]


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_takes_the_tokens_up_to_the_one_that_completes_it(
    tiny: Tokenizer, include: bool
) -> None:
    ids = letters(tiny, "go on STOP never")
    for cuts in [(), *((cut,) for cut in range(len(ids))), tuple(range(1, len(ids)))]:
        stream = TextStream(tiny, (), StreamOptions(stop=("STOP",), include_stop=include))
        text, num_tokens, _ = run(stream, ids, cuts)
        assert text == ("go on STOP" if include else "go on ")
        assert num_tokens == len("go on STOP")
        assert stream.stop == "STOP"


def test_tokens_after_a_stop_are_ignored(tiny: Tokenizer) -> None:
    stream = TextStream(tiny, (), StreamOptions(stop=("b",)))
    stream.push(letters(tiny, "ab"))
    later = stream.push(letters(tiny, "cd"))
    assert (later.text, later.num_tokens, later.stop) == ("", 0, "b")
    assert stream.finish() == ""


def test_a_stop_string_is_not_looked_for_in_the_prompt(tiny: Tokenizer) -> None:
    stream = TextStream(tiny, letters(tiny, "ST"), StreamOptions(stop=("STOP",)))
    assert run(stream, letters(tiny, "OP on"))[0] == "OP on"


@pytest.mark.parametrize(
    ("min_tokens", "expected"),
    [(0, "a"), (1, "a"), (2, "a.b"), (3, "a.b"), (4, "a.b.c"), (5, "a.b.c")],
)
@pytest.mark.parametrize("token", [True, False])
def test_stop_strings_and_tokens_count_only_after_min_tokens(
    tiny: Tokenizer, min_tokens: int, expected: str, token: bool
) -> None:
    ids = letters(tiny, "a.b.c")
    stops = {"stop_token_ids": frozenset({ids[1]})} if token else {"stop": (".",)}
    options = StreamOptions(min_tokens=min_tokens, **stops)
    text, num_tokens, _ = run(TextStream(tiny, (), options), ids)
    assert text == expected
    assert num_tokens == min(len(expected) + 1, len(ids))


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_may_begin_before_min_tokens(tiny: Tokenizer, include: bool) -> None:
    options = StreamOptions(stop=("end",), min_tokens=4, include_stop=include)
    stream = TextStream(tiny, (), options)
    text, num_tokens, _ = run(stream, letters(tiny, "a end end"), (4,))
    assert (text, num_tokens) == ("a end" if include else "a ", 5)


def test_the_end_of_a_cut_off_character_is_no_stop_before_min_tokens(tiny: Tokenizer) -> None:
    options = StreamOptions(stop=("\ufffd",), min_tokens=3)
    stream = TextStream(tiny, (), options)
    assert run(stream, letters(tiny, "a€")[:-1])[0] == "a\ufffd"
    assert stream.stop is None


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("include", [True, False])
def test_the_text_of_a_stop_token_is_left_out_unless_asked_for(
    tiny: Tokenizer, include: bool, skip: bool
) -> None:
    eos = tiny.eos_token_id
    assert eos is not None
    options = StreamOptions(
        stop_token_ids=frozenset({eos}), include_stop=include, skip_special_tokens=skip
    )
    stream = TextStream(tiny, (), options)
    text, num_tokens, _ = run(stream, [*letters(tiny, "ab"), eos, *letters(tiny, "c")])
    assert text == "ab" + (tiny.special_tokens["eos_token"] if include and not skip else "")
    assert (num_tokens, stream.stop) == (3, eos)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("include", [True, False])
def test_a_special_token_is_a_stop_string_whether_or_not_the_text_shows_it(
    tiny: Tokenizer, include: bool, skip: bool
) -> None:
    eos, text = tiny.eos_token_id, tiny.special_tokens["eos_token"]
    assert eos is not None
    options = StreamOptions(
        stop=(text, "XYZ"),
        stop_token_ids=frozenset({eos}),
        include_stop=include,
        skip_special_tokens=skip,
        min_tokens=2,
    )
    stream = TextStream(tiny, (), options)
    ids = [*letters(tiny, "a"), eos, *letters(tiny, "ben"), eos, *letters(tiny, "c")]
    shown, num_tokens, _ = run(stream, ids)
    first = "" if skip else text
    assert shown == f"a{first}ben" + (text if include else "")
    assert num_tokens == 6
    if skip:  # else the stop token comes first
        assert stream.stop == text


@pytest.mark.parametrize("offset", range(4))
def test_a_stop_token_that_is_text_ends_at_any_offset_of_a_block(
    tiny: Tokenizer, offset: int
) -> None:
    ids = letters(tiny, "abcd")
    stream = TextStream(tiny, (), StreamOptions(stop_token_ids=frozenset({ids[offset]})))
    delta = stream.push(ids)
    assert (delta.text, delta.num_tokens) == ("abcd"[:offset], offset + 1)
    assert delta.stop == ids[offset]


def test_a_stop_token_releases_what_was_held_back_for_a_stop_string(tiny: Tokenizer) -> None:
    eos = tiny.eos_token_id
    assert eos is not None
    options = StreamOptions(stop=("end",), stop_token_ids=frozenset({eos}))
    stream = TextStream(tiny, (), options)
    assert stream.push(letters(tiny, "the en")).text == "the "
    assert stream.push([eos]).text == "en"
    assert stream.finish() == ""


def test_finish_releases_what_was_held_back(tiny: Tokenizer) -> None:
    stream = TextStream(tiny, (), StreamOptions(stop=("end",)))
    assert stream.push(letters(tiny, "the en")).text == "the "
    assert stream.finish() == "en"
    assert stream.stop is None


def test_a_character_cut_off_by_the_end_shows_as_a_replacement(tiny: Tokenizer) -> None:
    eos = tiny.eos_token_id
    assert eos is not None
    half = letters(tiny, "a€")[:-1]
    assert run(TextStream(tiny), half)[0] == "a�"
    stopping = TextStream(tiny, (), StreamOptions(stop_token_ids=frozenset({eos})))
    assert run(stopping, [*half, eos])[0] == "a�"


def test_the_replacement_of_a_cut_off_character_may_itself_be_a_stop(tiny: Tokenizer) -> None:
    stream = TextStream(tiny, (), StreamOptions(stop=("�",)))
    assert run(stream, letters(tiny, "a€")[:-1])[0] == "a"
    assert stream.stop == "�"


def test_a_stop_string_may_contain_characters_of_many_tokens(tiny: Tokenizer) -> None:
    for cut in range(9):
        stream = TextStream(tiny, (), StreamOptions(stop=("日本",)))
        assert run(stream, letters(tiny, "x日本y"), (cut,))[0] == "x"
