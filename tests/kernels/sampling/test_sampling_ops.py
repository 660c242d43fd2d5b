"""Edits, draws and scores in plain torch and the faster ones for CPUs, against oracles."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.ops import Ops
from kernels.sampling import reference
from kernels.sampling.draw.reference import draw, keep
from kernels.sampling.draw.torch_draw import TorchDraw, filter_logits
from kernels.sampling.edit import torch_edit
from kernels.sampling.edit.reference import edit_logits
from kernels.sampling.score.reference import score as scored
from kernels.sampling.settings import BiasEntries, DrawSettings, LogitEdits, Penalties
from tests.kernels.sampling.edit_cases import Case, moved, random_case
from tests.support.machine.pretend_device import DEVICE, PretendDevice, operations_of

EDITS = {"reference": edit_logits, "quick": torch_edit.edit_logits}
SIZES = [(1, 0, 1), (2, 1, 3), (33, 5, 12), (300, 3, 200), (300, 0, 0), (128, 16, 4)]

Edit = Callable[[Tensor, LogitEdits], Tensor]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(values: Tensor) -> list[list[int]]:
    return values.contiguous().view(torch.int32).tolist()


# Edits -------------------------------------------------------------------------------------------


@pytest.fixture(params=EDITS)
def edit(request: pytest.FixtureRequest) -> Edit:
    return EDITS[request.param]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_edited_logits_are_those_of_the_texts(
    edit: Edit, size: tuple[int, int, int], seed: int
) -> None:
    case = random_case(*size, seed=seed)
    for edits, expected in case.parts():
        before = case.logits.clone()
        got = edit(case.logits, edits)
        assert torch.equal(got, expected)
        assert torch.equal(case.logits, before)
        assert got.data_ptr() != case.logits.data_ptr()


def test_the_quick_edits_have_the_bits_of_the_reference() -> None:
    case = random_case(300, 5, 40)
    for edits, _ in case.parts():
        got = torch_edit.edit_logits(case.logits, edits)
        assert bits(got) == bits(edit_logits(case.logits, edits))


def test_rows_without_edits_keep_their_bits(edit: Edit) -> None:
    """Next to rows with edits; their line's counts are garbage, and token 0 holds -0."""
    case = random_case(64, 2, 6)
    empty = case.edits.bias
    assert empty is not None
    ids = torch.cat((empty.ids, torch.full((1, 6), -1)))
    values = torch.cat((empty.values, torch.full((1, 6), torch.nan)))
    until = torch.cat((empty.until, torch.full((1, 6), 10**9)))
    off = torch.arange(len(case.logits)) % 5 == 1  # rows of strengths (1, 0, 0)
    lists = torch.where(off, len(empty.ids), empty.lists)
    logits = case.logits.clone()
    logits[:, 0] = -0.0
    bias = BiasEntries(lists, ids, values, until)
    got = edit(logits, replace(case.edits, bias=bias))
    assert bits(got[off]) == bits(logits[off])
    assert bits(got[~off]) != bits(logits[~off])


def test_a_path_counts_as_output_and_a_prompt_is_only_repeated(edit: Edit) -> None:
    """Token 1 is in the prompt, 2 in the output, 3 and twice 4 on the path, 5 nowhere."""
    counts = torch.tensor([[0, 1, 2, 0, 3, 0]], dtype=torch.int32)
    one = torch.ones(1)
    penalties = Penalties(
        counts, torch.tensor([0]), torch.tensor([[4, -1, 3, 4]]), 2 * one, 10 * one, 100 * one
    )
    edits = LogitEdits(torch.tensor([0]), penalties)
    got = edit(torch.tensor([[8.0, 8.0, 8.0, -8.0, 8.0, 8.0]]), edits)
    assert got.tolist() == [[8.0, 4.0, 4.0 - 110, -16.0 - 110, 4.0 - 130, 8.0]]


def test_rows_may_be_few_or_none(edit: Edit) -> None:
    case = random_case(33, 2, 5)
    penalties, bias = case.edits.penalties, case.edits.bias
    assert penalties is not None
    assert bias is not None
    whole = edit(case.logits, case.edits)
    for rows in (slice(0, 0), slice(3, 4)):
        own = {f.name: getattr(penalties, f.name)[rows] for f in fields(penalties)}
        some = LogitEdits(
            case.edits.positions[rows],
            Penalties(**(own | {"counts": penalties.counts})),
            replace(bias, lists=bias.lists[rows]),
        )
        assert torch.equal(edit(case.logits[rows], some), whole[rows])


# Draws -------------------------------------------------------------------------------------------


TEMPERATURES = [1.0, 0.7, 0.0, 1.9, 1e-5, 0.3, 0.0, 5.0]
FILTERS: list[dict[str, list[float]]] = [
    {},
    {"top_k": [1, 2, 7, 50, 299, 300, 300, 3]},
    {"top_p": [0.01, 0.1, 0.5, 0.8, 0.9, 0.99, 1.0, 0.3]},
    {"min_p": [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 1.0, 0.05]},
    {
        "top_k": [50, 5, 300, 20, 100, 300, 299, 30],
        "top_p": [0.9, 1.0, 0.9, 0.99, 1.0, 0.3, 0.95, 0.8],
        "min_p": [0.1, 0.0, 0.2, 0.05, 0.3, 0.0, 0.9, 0.02],
    },
]


def settings(which: int, temperatures: list[float], masked: bool, seed: int = 0) -> DrawSettings:
    R, generator = len(temperatures), torch.Generator().manual_seed(seed)
    types = {"top_k": torch.int64}
    filters = {
        name: torch.tensor(values, dtype=types.get(name, torch.float32))
        for name, values in FILTERS[which].items()
    }
    words = torch.randint(-(2**31), 2**31, (R, 10), generator=generator).int()
    return DrawSettings(
        torch.tensor(temperatures),
        torch.randint(-(2**63), 2**63 - 1, (R,), generator=generator),
        torch.randint(0, 10**5, (R,), generator=generator),
        **filters,  # type: ignore[arg-type]
        allowed=words if masked else None,
    )


@pytest.mark.parametrize("which", range(len(FILTERS)))
@pytest.mark.parametrize("masked", [False, True], ids=["free", "masked"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("table", ["torch", "native_ops"])
def test_the_quick_draw_equals_the_reference(
    request: pytest.FixtureRequest, which: int, masked: bool, ties: bool, table: str
) -> None:
    quick: Callable[[Tensor, DrawSettings], Tensor]
    quick = TorchDraw(reference.argmax, reference.gumbel_argmax)
    if table == "native_ops":
        quick = request.getfixturevalue(table).draw
    logits = numbers(8, 300, seed=which) * 3
    logits = (logits * 2).round() / 2 if ties else logits
    chosen = settings(which, TEMPERATURES, masked)
    assert quick(logits, chosen).tolist() == draw(logits, chosen).tolist()
    for temperature, told in ((0.0, {"any_sampled": False}), (0.8, {"any_greedy": False})):
        same = settings(which, [temperature] * 8, masked)
        expected = draw(logits, same).tolist()
        assert quick(logits, replace(same, **told)).tolist() == expected


def test_both_filters_keep_the_same_tokens() -> None:
    for which in range(1, len(FILTERS)):
        scaled, chosen = numbers(8, 300, seed=which) * 3, settings(which, TEMPERATURES, False)
        off = {"top_k": torch.full((8,), 300), "top_p": torch.ones(8), "min_p": torch.zeros(8)}
        given = [getattr(chosen, name) for name in off]
        parts = [
            own if part is None else part for own, part in zip(off.values(), given, strict=True)
        ]
        assert torch.equal(filter_logits(scaled, *parts), keep(scaled, chosen))


# Scores ------------------------------------------------------------------------------------------


def expected_scores(row: list[float], token: int, num_top: int) -> tuple[float, list[int]]:
    total = math.log(math.fsum(math.exp(value - max(row)) for value in row)) + max(row)
    best = sorted(range(len(row)), key=lambda at: (-row[at], at))[:num_top]
    return row[token] - total, best


@pytest.mark.parametrize(("V", "num_top"), [(1, 0), (1, 1), (33, 5), (300, 20), (300, 0), (7, 7)])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("table", ["reference_ops", "native_ops", "device"])
def test_scores_are_log_probabilities_with_the_best_tokens(
    request: pytest.FixtureRequest, table: str, V: int, num_top: int, ties: bool
) -> None:
    score = scored if table == "device" else request.getfixturevalue(table).score
    logits = numbers(6, V, seed=V) * 5
    logits = logits.round() * 0.0 if ties and V == 300 else logits.round() if ties else logits
    logits[0, ::2] = -torch.inf if V > 1 else 2.0
    tokens = torch.arange(6) * 5 % V
    found = score(logits, tokens, num_top)
    assert found.top.shape == found.top_ids.shape == (6, num_top)
    for row, token in enumerate(tokens.tolist()):
        values = logits[row].tolist()
        chosen, best = expected_scores(values, token, num_top)
        assert found.chosen[row].item() == pytest.approx(chosen, abs=2e-5)
        assert found.top_ids[row].tolist() == best
        tops = [expected_scores(values, at, 0)[0] for at in best]
        assert found.top[row].tolist() == pytest.approx(tops, abs=2e-5)


@pytest.mark.parametrize("num_top", [0, 4])
def test_no_rows_have_no_scores(reference_ops: Ops, num_top: int) -> None:
    none = torch.empty(0, dtype=torch.int64)
    found = reference_ops.score(torch.empty(0, 9), none, num_top)
    assert (found.chosen.shape, found.top.shape) == ((0,), (0, num_top))


def test_zeros_of_either_sign_are_equals(reference_ops: Ops) -> None:
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0]])
    for score in (reference_ops.score, scored):
        assert score(logits, torch.tensor([0]), 3).top_ids.tolist() == [[1, 2, 3]]


def test_an_equal_of_the_last_alternative_is_left_out_if_its_id_is_higher(
    reference_ops: Ops,
) -> None:
    """Beside a row without equals, with a vocabulary larger than `topk` scans one by one."""
    logits = numbers(2, 5000)
    logits[0, 4000::7] = logits[0, 123] = 9.0
    found = reference_ops.score(logits, torch.tensor([0, 0]), 2)
    assert found.top_ids.tolist() == [[123, 4000], logits[1].topk(2).indices.tolist()]


# Devices -----------------------------------------------------------------------------------------


def on_device(value: Any) -> Any:
    """Settings with their tensors on the fake device."""
    parts = {f.name: getattr(value, f.name) for f in fields(value)}
    return replace(
        value,
        **{name: part.to(DEVICE) for name, part in parts.items() if isinstance(part, Tensor)},
    )


def lists_of(value: Any) -> list[Any]:
    """The values of a result's tensors, on any device."""
    parts = (
        [value] if isinstance(value, Tensor) else [getattr(value, f.name) for f in fields(value)]
    )
    return [getattr(part, "near", part).tolist() for part in parts]


@pytest.mark.parametrize("through_the_table", [False, True])
def test_operations_stay_on_their_device_and_never_wait(
    reference_ops: Ops, through_the_table: bool
) -> None:
    """The reference functions for devices, and a table whose tensors lie on a device."""
    case: Case = random_case(300, 4, 20)
    chosen, tokens = settings(4, TEMPERATURES, True), torch.arange(8)
    drawable = case.logits[:8].clone()
    wanted = (
        edit_logits(case.logits, case.edits),
        draw(drawable, chosen),
        scored(drawable, tokens, 5),
    )
    own = operations_of(reference_ops)
    edited, drawn, scores = (
        (own.edit_logits, own.draw, own.score) if through_the_table else (edit_logits, draw, scored)
    )
    with PretendDevice() as device:
        logits, few = case.logits.to(DEVICE), drawable.to(DEVICE)
        edits, how, ids = moved(case.edits, DEVICE), on_device(chosen), tokens.to(DEVICE)
        uploads = device.uploads
        got = edited(logits, edits), drawn(few, how), scores(few, ids, 5)
        assert (device.waits, device.downloads, device.uploads) == ([], 0, uploads)
    for one, other in zip(got, wanted, strict=True):
        assert lists_of(one) == lists_of(other)
