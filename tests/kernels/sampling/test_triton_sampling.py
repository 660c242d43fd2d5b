"""Triton sampling against plain torch: noise, edits, draws, filters and scores."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.sampling import reference
from kernels.sampling.draw import reference as draw_reference
from kernels.sampling.score import reference as score_reference
from kernels.sampling.settings import DrawSettings, LogitEdits
from tests.kernels import triton_env
from tests.kernels.sampling.edit_cases import Case, moved, random_case

kernel = triton_env.load("kernels.sampling.triton_kernel")
drawing = triton_env.load("kernels.sampling.draw.triton_draw")
edit = triton_env.load("kernels.sampling.edit.triton_edit")
score = triton_env.load("kernels.sampling.score.triton_score")
sound = triton_env.load("kernels.sampling.triton_sound")
noise_probe = triton_env.load("tests.kernels.sampling.triton_noise_probe")
pytestmark = [*triton_env.MARKS, pytest.mark.usefixtures("poisoned_memory")]

DEVICE = triton_env.DEVICE
TILE = 128  # several tiles without a large vocabulary
VOCABS = (1, 31, 128, 300)
OFF: dict[str, float] = {"top_k": 10**6, "top_p": 1.0, "min_p": 0.0}


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def keys(count: int, seed: int = 0) -> Tensor:
    return integers(-(2**63), 2**63 - 1, count, seed=seed)


def coarse(logits: Tensor) -> Tensor:
    """Many ties, like logits that were bfloat16."""
    return (logits * 4).round() / 4


# Noise ------------------------------------------------------------------------------------------


def test_noise_integers_equal_the_reference() -> None:
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 12345], device=DEVICE)
    positions = torch.tensor([0, 1, 77, 131071, 10**7, 8191], device=DEVICE)
    tokens = torch.arange(256, device=DEVICE) * 789
    expected = reference.noise_bits(reference.noise_keys(seeds, positions), tokens)
    bits, _ = noise_probe.noise(seeds, positions, tokens)
    assert torch.equal(bits, expected)


def test_noise_floats_are_those_of_the_reference() -> None:
    """Equal to one step of float32 at their own size, or at 1: near 0 the noise is a difference.

    Both round two logarithms: Triton from float64, torch in float32, whose last bit depends on the
    library. 91.5 % of these numbers were equal in the interpreter and 86.2 % on an H200; far fewer
    would mean another formula."""
    random = integers(0, 2**32, 2**14 - 8)
    edges = torch.tensor([0, 1, 2, 2**24, 2**31, 2**32 - 2**9, 2**32 - 2, 2**32 - 1], device=DEVICE)
    noise, bound = noise_probe.gumbel_of(bits := torch.cat((random, edges)))
    expected = reference.gumbel(bits)
    step = 2.0**-23 * 2.0 ** expected.abs().clamp(min=1).log2().floor()
    assert ((noise - expected).abs() <= step).all()
    assert (noise == expected).float().mean() > 0.8
    assert (bound + 1e-4 >= noise).all()


@pytest.mark.parametrize("vocab", VOCABS)
def test_a_row_is_sound_if_its_highest_logit_is_finite(vocab: int) -> None:
    logits = triton_env.spaced(triton_env.numbers(6, vocab))
    logits[1:3, vocab // 2] = torch.tensor([torch.nan, torch.inf], device=DEVICE)
    logits[3] = -torch.inf
    logits[4, : vocab - 1] = -torch.inf
    logits[5, vocab - 1] = -torch.nan
    expected = reference.are_sound(logits)
    assert expected.tolist() == [True, False, False, False, True, False]
    assert torch.equal(sound.are_sound(logits, tile=TILE), expected)


# The draws and the arg-max ----------------------------------------------------------------


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 1e5])
def test_draws_equal_the_reference(vocab: int, scale: float) -> None:
    logits = triton_env.spaced(triton_env.numbers(3, vocab) * scale)
    got = kernel.gumbel_argmax(logits, keys(3), tile=TILE)
    assert got.tolist() == reference.gumbel_argmax(logits, keys(3)).tolist()


def test_equal_logits_and_forbidden_ones_are_drawn_as_in_the_reference() -> None:
    logits = torch.zeros(9, 300, device=DEVICE)
    logits[:, ::3] = -torch.inf
    logits[7, 5:] = -torch.inf
    got = kernel.gumbel_argmax(logits, keys(9), tile=TILE)
    assert got.tolist() == reference.gumbel_argmax(logits, keys(9)).tolist()


@pytest.mark.parametrize("vocab", VOCABS)
def test_argmax_is_the_lowest_id_among_equals(vocab: int) -> None:
    logits = triton_env.spaced(triton_env.numbers(5, vocab).round())
    logits[1] = -torch.inf
    logits[2] = 3.0
    logits[3] = -1.0
    expected = [int((row == row.max()).nonzero()[0]) for row in logits]
    assert kernel.argmax(logits, tile=TILE).tolist() == expected


# The kernels of `draw` equal its reference --------------------------------------------------------


def settings(temperature: list[float], **parts: Any) -> DrawSettings:
    R = len(temperature)
    defaults = {"seeds": keys(R, seed=1), "positions": integers(0, 10**5, R, seed=2)}
    tensors = {
        name: part.to(DEVICE) if isinstance(part, Tensor) else part
        for name, part in (defaults | parts).items()
    }
    return DrawSettings(temperature=torch.tensor(temperature, device=DEVICE), **tensors)


def check(logits: Tensor, chosen: DrawSettings) -> None:
    before = logits.clone()
    got = drawing.draw(logits, chosen, tile=TILE)
    assert torch.equal(logits, before)
    assert got.tolist() == draw_reference.draw(logits, chosen).tolist()


FILTERS: dict[str, dict[str, list[float]]] = {
    "none": {},
    "k": {"top_k": [1, 2, 7, 50, 299, 300, 10**6, 3]},
    "p": {"top_p": [0.01, 0.1, 0.5, 0.8, 0.9, 0.99, 1.0, 0.3]},
    "min": {"min_p": [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 1.0, 0.05]},
    "k-p": {
        "top_k": [50, 5, 10**6, 20, 100, 2, 299, 30],
        "top_p": [0.5, 0.9, 0.6, 1.0, 0.2, 0.7, 0.95, 0.01],
    },
    "k-p-min": {
        "top_k": [50, 5, 10**6, 20, 100, 10**6, 299, 30],
        "top_p": [0.9, 1.0, 0.9, 0.99, 1.0, 0.3, 0.95, 0.8],
        "min_p": [0.1, 0.0, 0.2, 0.05, 0.3, 0.0, 0.9, 0.02],
    },
}


def filters(name: str) -> dict[str, Tensor]:
    return {
        part: torch.tensor(values, dtype=torch.int64 if part == "top_k" else torch.float32)
        for part, values in FILTERS[name].items()
    }


TEMPERATURES = [1.0, 0.7, 0.0, 1.9, 1e-5, 0.3, 1.0, 5.0]
SHAPES = {"peaked": lambda x: x * 5, "flat": lambda x: x * 0.1, "ties": coarse}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("none", "peaked"),
        ("k", "ties"),
        ("p", "peaked"),
        ("min", "flat"),
        ("k-p", "peaked"),
        ("k-p-min", "flat"),
        ("k-p-min", "ties"),
    ],
)
def test_filtered_draws_equal_the_reference(name: str, shape: str) -> None:
    logits = triton_env.spaced(SHAPES[shape](triton_env.numbers(8, 300, seed=5)))
    check(logits, settings(TEMPERATURES, **filters(name)))


@pytest.mark.parametrize("vocab", [1, 33, 128])
def test_odd_vocabularies(vocab: int) -> None:
    logits = triton_env.numbers(8, vocab, seed=6)
    check(logits, settings([0.9] * 8, **filters("k-p-min")))


def test_every_token_kept_can_be_drawn_and_no_other() -> None:
    """Top-k cuts among equal logits: ties with the last kept one are kept, all others never."""
    row = torch.tensor([1.0, 2.5, 2.0, 2.0, 0.5, 2.0, 0.0, -1.0])
    logits = row.repeat(30, 1).to(DEVICE)
    chosen = settings([1.0] * 30, top_k=torch.full((30,), 2))
    drawn = drawing.draw(logits, chosen, tile=8)
    assert set(drawn.tolist()) == {1, 2, 3, 5}


def test_rows_whose_draws_are_often_rejected_are_finished() -> None:
    """Flat rows with one slightly higher token: the filters reject nearly every draw."""
    logits = triton_env.numbers(6, 300, seed=3) * 1e-3
    for parts in ({"top_p": torch.full((6,), 0.01)}, {"min_p": torch.full((6,), 0.9995)}):
        check(logits, settings([1.0] * 6, **parts))


def test_rows_without_a_choice() -> None:
    logits = triton_env.numbers(4, 300)
    logits[0] = -torch.inf
    logits[1] = 2.0
    logits[2, 1:] = -torch.inf
    parts = {"top_k": torch.full((4,), 5), "top_p": torch.full((4,), 0.9)}
    check(logits, settings([1.0] * 4, **parts))


def random_mask(num_rows: int, vocab: int) -> Tensor:
    """[R, words + 2]: rows are not contiguous; row 0 allows one token, row 1 all."""
    words = integers(-(2**31), 2**31, num_rows, (vocab + 31) // 32 + 2).int()
    words[0] = 0
    words[0, 8] = 1 << 30  # token 286
    words[1] = -1
    return words[:, : (vocab + 31) // 32]


@pytest.mark.parametrize("name", ["none", "k-p-min"])
def test_masked_draws_equal_the_reference(name: str) -> None:
    logits = triton_env.spaced(triton_env.numbers(8, 300, seed=8) * 3)
    check(logits, settings(TEMPERATURES, allowed=random_mask(8, 300), **filters(name)))


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = triton_env.numbers(8, 300, seed=5)
    chosen = settings(TEMPERATURES, **filters("k-p-min"))
    whole = drawing.draw(logits, chosen, tile=TILE).tolist()
    for row in (0, 5):
        alone = {
            f.name: getattr(chosen, f.name)[row : row + 1]
            for f in dataclasses.fields(chosen)
            if isinstance(getattr(chosen, f.name), Tensor)
        }
        drawn = drawing.draw(logits[row : row + 1], DrawSettings(**alone), tile=TILE)
        assert drawn.tolist() == [whole[row]]


# Edits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(1, 0, 1), (33, 1, 12), (300, 5, 200), (300, 0, 0), (257, 16, 3)], ids=str
)
@pytest.mark.parametrize("seed", range(2))
def test_edited_logits_are_those_of_the_texts_bit_by_bit(
    size: tuple[int, int, int], seed: int
) -> None:
    case = random_case(*size, seed=seed)
    logits = triton_env.spaced(case.logits)
    before = logits.clone()
    for edits, expected in case.parts():
        got = edit.edit_logits(logits, spread(moved(edits, DEVICE)), tile=TILE)
        assert torch.equal(got.cpu(), expected)
        assert torch.equal(logits, before)


def spread(edits: Any) -> Any:
    """Counts and paths in wider and longer tensors, like static buffers, with garbage around."""
    penalties = edits.penalties
    if penalties is None:
        return edits
    wide = {
        "counts": torch.full((9, penalties.counts.shape[1] + 7), 3, dtype=torch.int32),
        "paths": torch.zeros(len(penalties.paths), penalties.paths.shape[1] + 2, dtype=torch.int64),
    }
    for name, around in wide.items():
        own = getattr(penalties, name)
        wide[name] = around.to(DEVICE)[: len(own), : own.shape[1]]
        wide[name].copy_(own)
    return dataclasses.replace(edits, penalties=dataclasses.replace(penalties, **wide))


def test_rows_without_edits_keep_their_bits() -> None:
    """Rows whose penalties are off, beside rows with penalties; token 0 holds -0."""
    case: Case = random_case(300, 3, 0)
    logits = case.logits.to(DEVICE)
    logits[:, 0] = -0.0
    got = edit.edit_logits(logits, moved(case.edits, DEVICE), tile=TILE)
    off = torch.arange(len(logits)) % 5 == 1
    assert torch.equal(got[off].view(torch.int32), logits[off].view(torch.int32))
    assert not torch.equal(got, logits)


def test_edits_of_no_rows() -> None:
    case = random_case(33, 2, 3)
    assert case.edits.bias is not None
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    bias = dataclasses.replace(moved(case.edits, DEVICE).bias, lists=none)  # type: ignore[type-var]
    edits = LogitEdits(none, None, bias)
    assert edit.edit_logits(case.logits[:0].to(DEVICE), edits).shape == (0, 33)


# Scores ------------------------------------------------------------------------------------------


def check_scores(logits: Tensor, num_top: int) -> None:
    tokens = integers(0, logits.shape[1], len(logits))
    got = score.score(logits, tokens, num_top, tile=TILE)
    expected = score_reference.score(logits, tokens, num_top)
    assert got.top_ids.tolist() == expected.top_ids.tolist()
    triton_env.close(got.chosen, expected.chosen)
    triton_env.close(got.top, expected.top)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_scores_equal_the_reference(vocab: int, num_top: int) -> None:
    smooth = triton_env.spaced(triton_env.numbers(4, vocab, seed=vocab) * 10)
    smooth[1] += 300
    check_scores(smooth, min(num_top, vocab))
    check_scores(coarse(triton_env.numbers(5, vocab, seed=4)), min(num_top, vocab))


def test_forbidden_tokens_come_last_among_the_best() -> None:
    logits = triton_env.numbers(3, 300)
    logits[0, 2:] = -torch.inf
    logits[1] = 0.0
    logits[2, ::2] = -torch.inf
    tokens = torch.tensor([1, 5, 7], device=DEVICE)
    got = score.score(logits, tokens, 6, tile=TILE)
    expected = score_reference.score(logits, tokens, 6)
    assert got.top_ids.tolist() == expected.top_ids.tolist()
    triton_env.close(got.top, expected.top)
    triton_env.close(got.chosen, expected.chosen)


def test_a_row_of_nothing_but_forbidden_tokens_spoils_no_other() -> None:
    logits = triton_env.numbers(3, 300)
    alone = score.score(logits[2:], integers(0, 300, 1), 5, tile=TILE)
    logits[1] = -torch.inf
    tokens = integers(0, 300, 1).repeat(3)
    got = score.score(logits, tokens, 5, tile=TILE)
    assert torch.equal(got.chosen[2:], alone.chosen)
    assert torch.equal(got.top[2:], alone.top)
