"""Triton sampling against plain torch: noise, draws, filters, edits and log-probabilities."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.request import Request, SamplingParams
from engine.sampling.batch import draw_settings
from engine.sampling.rows import RowState
from engine.sampling.sampler import Sampler
from kernels.ops import Ops
from kernels.sampling import pipeline_reference, reference
from kernels.sampling.pipeline_reference import ABSENT, DrawSettings, LogitEdits
from kernels.sampling.torch_draw import edit_logits, filter_logits
from tests.kernels import triton_env
from tests.support.trees import roots

kernel = triton_env.load("kernels.sampling.triton_kernel")
pipeline = triton_env.load("kernels.sampling.triton_pipeline")
noise_probe = triton_env.load("tests.kernels.triton_noise_probe")
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
    """Many ties, as logits that were bfloat16 have."""
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
    """To one step of float32 at their own size, or at 1: near 0 the noise is a difference."""
    random = integers(0, 2**32, 2**14 - 8)
    edges = torch.tensor([0, 1, 2, 2**24, 2**31, 2**32 - 2**9, 2**32 - 2, 2**32 - 1], device=DEVICE)
    noise, bound = noise_probe.gumbel_of(bits := torch.cat((random, edges)))
    expected = reference.gumbel(bits)
    step = 2.0**-23 * 2.0 ** expected.abs().clamp(min=1).log2().floor()
    assert ((noise - expected).abs() <= step).all()
    assert (noise == expected).float().mean() > 0.9
    assert (bound + 1e-4 >= noise).all()


# The three operations of the table ----------------------------------------------------------------


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


@pytest.mark.parametrize("vocab", VOCABS)
def test_logsumexp_equals_the_reference(vocab: int) -> None:
    logits = triton_env.spaced(triton_env.numbers(4, vocab) * 10)
    logits[1] += 300
    logits[2] = -torch.inf
    triton_env.close(kernel.logsumexp(logits, tile=TILE), reference.logsumexp(logits))


# The pipeline's reference is today's sampler ------------------------------------------------------


SAMPLING = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "min_p": 0.1},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"temperature": 0.0, "presence_penalty": 0.7, "frequency_penalty": -0.4},
    {"temperature": 0.8, "logit_bias": {3: 5.0, 290: -7.5}, "top_p": 0.7},
    {"temperature": 0.0, "repetition_penalty": 0.8, "logit_bias": {1: 4.0}, "min_tokens": 9},
]


def rows_of_engine(seed: int) -> list[RowState]:
    rows = []
    for at, change in enumerate(SAMPLING):
        prompt = integers(0, 300, 20, seed=seed + at).tolist()
        params = SamplingParams(max_tokens=99, seed=seed * 1000 + at, **change)  # type: ignore[arg-type]
        request = Request(request_id=f"r{at}", prompt_ids=prompt, params=params)
        rows.append(RowState.admit(request, integers(0, 300, 6, seed=at).tolist()))
    return rows


def edits(entries: list[dict[int, list[float]]], strengths: Tensor) -> LogitEdits:
    """With room behind the entries, as a static buffer has."""
    flat = [(token, *values) for row in entries for token, values in row.items()]
    flat += [(10**6, 5.0, float("nan"))] * 3
    ends = torch.tensor([0, *(len(row) for row in entries)]).cumsum(0)
    ids, counts, bias = zip(*flat, strict=True)
    repetition, frequency, presence = strengths.float().to(DEVICE).unbind(dim=1)
    return LogitEdits(
        offsets=ends.int().to(DEVICE),
        ids=torch.tensor(ids, dtype=torch.int32, device=DEVICE),
        counts=torch.tensor(counts, device=DEVICE).int(),
        bias=torch.tensor(bias, dtype=torch.float32, device=DEVICE),
        repetition=repetition.contiguous(),
        frequency=frequency.contiguous(),
        presence=presence.contiguous(),
    )


def settings(temperature: list[float], **parts: Any) -> DrawSettings:
    R = len(temperature)
    defaults = {"seeds": keys(R, seed=1), "positions": integers(0, 10**5, R, seed=2)}
    tensors = {
        name: part.to(DEVICE) if isinstance(part, Tensor) else part
        for name, part in (defaults | parts).items()
    }
    return DrawSettings(temperature=torch.tensor(temperature, device=DEVICE), **tensors)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [lambda x: x * 3, coarse], ids=["smooth", "ties"])
def test_the_reference_equals_the_engines_sampler(
    seed: int, shape: Any, reference_ops: Ops
) -> None:
    rows = rows_of_engine(seed)
    logits = shape(triton_env.numbers(len(rows), 300, seed=seed)).cpu()
    chosen = draw_settings(rows, roots(len(rows)), (7, 8), 300)
    edited = edit_logits(logits, chosen)
    assert torch.equal(pipeline_reference.edit(logits, chosen), edited)
    scaled = edited / torch.where(chosen.temperature > 0, chosen.temperature, 1.0)[:, None]
    kept = filter_logits(scaled, chosen.top_k, chosen.top_p, chosen.min_p)
    assert torch.equal(pipeline_reference.keep(scaled, chosen), kept)
    drawn = pipeline_reference.draw(logits, chosen, num_top=20)
    sampler = Sampler(reference_ops)
    assert drawn.tokens.tolist() == sampler.draw(logits, chosen).tolist()
    assert drawn.logprobs is not None
    expected = sampler.logprobs(logits, drawn.tokens, 0)
    torch.testing.assert_close(
        drawn.logprobs, torch.tensor([entry.logprob for entry in expected]), **SUMS
    )


SUMS = {"atol": 2e-5, "rtol": 1e-5}


def to_cpu(part: Any) -> Any:
    if isinstance(part, LogitEdits):
        return LogitEdits(*(getattr(part, f.name).cpu() for f in dataclasses.fields(part)))
    return part.cpu() if isinstance(part, Tensor) else part


# The pipeline's kernels equal its reference -------------------------------------------------------


def check(logits: Tensor, chosen: DrawSettings, num_top: int | None = None) -> None:
    before = logits.clone()
    got = pipeline.draw(logits, chosen, num_top, tile=TILE)
    assert torch.equal(logits, before)
    expected = pipeline_reference.draw(logits, chosen, num_top)
    assert got.tokens.tolist() == expected.tokens.tolist()
    if num_top is None:
        assert got.logprobs is None
        return
    triton_env.close(got.logprobs, expected.logprobs)
    if num_top:
        assert got.top_ids.tolist() == expected.top_ids.tolist()
        triton_env.close(got.top_logprobs, expected.top_logprobs)


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
    check(logits, settings([0.9] * 8, **filters("k-p-min")), num_top=1)


def test_every_token_kept_can_be_drawn_and_no_other() -> None:
    """Equal logits, top-k cut inside: ties with the last one kept are kept, the rest never."""
    row = torch.tensor([1.0, 2.5, 2.0, 2.0, 0.5, 2.0, 0.0, -1.0])
    logits = row.repeat(30, 1).to(DEVICE)
    chosen = settings([1.0] * 30, top_k=torch.full((30,), 2))
    drawn = pipeline.draw(logits, chosen, tile=8).tokens
    assert set(drawn.tolist()) == {1, 2, 3, 5}


def test_rows_that_are_turned_down_often_are_finished() -> None:
    """Flat rows with one token slightly ahead: nearly every draw is outside the filters."""
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


def random_edits(num_rows: int, vocab: int) -> LogitEdits:
    """A long history, a short one, none, ..., with biases here and there."""
    entries: list[dict[int, list[float]]] = []
    for row in range(num_rows):
        ids = torch.randperm(vocab, generator=torch.Generator().manual_seed(row)).tolist()
        ids = ids[: (vocab, 7, 0, 1, 60)[row % 5]]
        kinds = integers(ABSENT, 4, len(ids), seed=row).tolist()
        bias = (triton_env.numbers(len(ids), seed=row) * 3).tolist()
        bias = [(value, 0.0, -torch.inf)[at % 3] for at, value in enumerate(bias)]
        entries.append(
            {token: [kind, value] for token, kind, value in zip(ids, kinds, bias, strict=True)}
        )
    strengths = [[1.3, 0.4, 0.7], [0.8, 0.0, 0.0], [1.0, -0.3, 0.1]]
    return edits(entries, torch.tensor([strengths[row % 3] for row in range(num_rows)]))


def random_mask(num_rows: int, vocab: int) -> Tensor:
    """[R, words + 2]: rows are not contiguous; row 0 allows one token, row 1 all."""
    words = integers(-(2**31), 2**31, num_rows, (vocab + 31) // 32 + 2).int()
    words[0] = 0
    words[0, 8] = 1 << 30  # token 286
    words[1] = -1
    return words[:, : (vocab + 31) // 32]


@pytest.mark.parametrize("name", ["none", "k-p-min"])
def test_edits_and_masks_equal_the_reference(name: str) -> None:
    logits = triton_env.spaced(triton_env.numbers(8, 300, seed=8) * 3)
    parts = {"edits": random_edits(8, 300), "allowed": random_mask(8, 300)}
    check(logits, settings(TEMPERATURES, **parts, **filters(name)), num_top=20)


def test_edited_logits_are_those_of_the_reference_bit_by_bit() -> None:
    """The scatter alone, before anything is drawn."""
    logits = triton_env.spaced(triton_env.numbers(8, 300, seed=8) * 3)
    chosen = settings(TEMPERATURES, edits=random_edits(8, 300))
    expected = pipeline_reference.edit(logits, chosen)
    raw = triton_env.poison(len(chosen.edits.ids))
    before = logits.clone()
    pipeline._edit_launch(logits, chosen.edits, raw, restore=False).run()
    assert torch.equal(logits, expected)
    pipeline._edit_launch(logits, chosen.edits, raw, restore=True).run()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_top_logprobs_are_of_the_raw_logits_lower_ids_first(num_top: int) -> None:
    logits = coarse(triton_env.numbers(5, 300, seed=4))
    parts = {"edits": random_edits(5, 300)}
    check(logits, settings([0.0, 1.0, 0.5, 0.0, 2.0], **parts), num_top)


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = triton_env.numbers(8, 300, seed=5)
    chosen = settings(TEMPERATURES, **filters("k-p-min"))
    whole = pipeline.draw(logits, chosen, tile=TILE).tokens.tolist()
    for row in (0, 5):
        alone = {
            f.name: getattr(chosen, f.name)[row : row + 1]
            for f in dataclasses.fields(chosen)
            if isinstance(getattr(chosen, f.name), Tensor)
        }
        drawn = pipeline.draw(logits[row : row + 1], DrawSettings(**alone), tile=TILE)
        assert drawn.tokens.tolist() == [whole[row]]
