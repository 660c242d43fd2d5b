"""Which kernel computes products of few rows on a CUDA device, and what is kept of the choice."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ops import LinearWeight
from tests.kernels import triton_env
from tests.kernels.triton_env import DEVICE, close, numbers

products = triton_env.load("kernels.linear.triton_products")
kept_plans = triton_env.load("kernels.linear.kept_plans")
pytestmark = [*triton_env.MARKS, pytest.mark.usefixtures("poisoned_memory")]

BF16 = torch.bfloat16
FEW = 16


@pytest.fixture(autouse=True)
def processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.linear.triton_skinny._processors", lambda _device: 2)


def weight_of(N: int, K: int, dtype: torch.dtype = BF16) -> LinearWeight:
    return LinearWeight(numbers(N, K, seed=1, dtype=dtype), None, N, K)


@pytest.fixture
def skinny_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every call of the kernel for few rows."""
    calls: list[int] = []
    for name in ("linear_few", "gated_linear_few"):
        run: Callable[..., Tensor] = getattr(products, name)

        def counted(x: Tensor, *more: Any, run: Callable[..., Tensor] = run) -> Tensor:
            calls.append(len(x))
            return run(x, *more)

        monkeypatch.setattr(products, name, counted)
    return calls


@pytest.mark.parametrize("rows", [FEW, FEW + 1])
@pytest.mark.parametrize("wanted", ["skinny", "cublas", "auto"])
def test_at_most_16_rows_go_to_the_kernel_for_few_rows(
    wanted: str, rows: int, skinny_calls: list[int]
) -> None:
    found = products.Products(wanted, DEVICE, None)
    x, weight = numbers(rows, 64, dtype=BF16), weight_of(64, 64)
    gate, up = (x.float() @ weight.data.float().T).chunk(2, dim=-1)
    close(found.linear(x, weight), torch.cat((gate, up), dim=-1), atol=1e-3)
    close(found.gated_linear(x, weight), F.silu(gate) * up, atol=5e-2, rtol=2e-2)
    # auto has measured nothing, so cuBLAS computes
    assert skinny_calls == ([rows, rows] if wanted == "skinny" and rows == FEW else [])


class Device:
    """A pretended CUDA device: microseconds by plan."""

    type = "cuda"

    def __init__(self, micros: dict[str, float | None]) -> None:
        self.micros = micros
        self.measured: list[str] = []

    def time(self, name: str, x: Tensor, *_more: Any, **_options: Any) -> float | None:
        self.measured.append(f"{name}, {len(x)} rows")
        return self.micros[name]


NAMES = [plan.name for plan in products.PLANS]


@contextmanager
def device(micros: dict[str, float | None]) -> Iterator[Device]:
    with pytest.MonkeyPatch.context() as patch:
        made = Device(micros)
        patch.setattr(products, "_identity", lambda _device, **_options: "a GPU")
        patch.setattr(products, "compile_plans", lambda _groups: None)
        patch.setattr(products, "attempt", made.time)
        yield made


def choices(found: Any) -> dict[str, str]:
    return {name: str(backend) for name, backend in found.backends().items()}


def times(**named: float | None) -> dict[str, float | None]:
    """cuBLAS, the second plan, and all others, which are slow."""
    return dict.fromkeys(NAMES, 90.0) | {"cublas": named["cublas"], NAMES[1]: named["second"]}


WEIGHTS = [(weight_of(96, 64), False), (weight_of(96, 64), False), (weight_of(96, 64), True)]


@pytest.mark.parametrize(
    ("wanted", "micros", "name"),
    [
        ("auto", times(cublas=9.0, second=7.0), "triton-skinny"),
        ("auto", times(cublas=7.0, second=9.0), "cublas"),
        ("auto", times(cublas=9.0, second=None), "cublas"),  # it cannot run, or is wrong
        ("skinny", times(cublas=7.0, second=9.0), "triton-skinny"),
        ("skinny", dict.fromkeys(NAMES) | {"cublas": 7.0}, "cublas"),
    ],
)
def test_the_fastest_is_chosen_for_every_shape_and_named(
    wanted: str, micros: dict[str, float | None], name: str
) -> None:
    with device(micros) as made:
        found = products.Products(wanted, made, None)
        found.choose(WEIGHTS)
    assert found.backends().keys() == {"linear 64 to 96", "gated_linear 64 to 48"}
    assert {backend.name for backend in found.backends().values()} == {name}


def test_what_was_chosen_computes_and_is_logged(
    skinny_calls: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with device(times(cublas=9.0, second=7.0)) as made, caplog.at_level(logging.INFO):
        found = products.Products("auto", made, None)
        found.choose(WEIGHTS)
    x = numbers(2, 64, dtype=BF16)
    found.linear(x, WEIGHTS[0][0])
    found.linear(x, weight_of(32, 64))  # a shape that was not measured
    assert skinny_calls == [2]
    assert f"linear 64 to 96: {NAMES[1]}: 7.0 us, cublas: 9.0 us" in caplog.text


def test_weights_that_the_kernel_cannot_read_well_are_not_measured() -> None:
    with device(times(cublas=9.0, second=7.0)) as made:
        found = products.Products("auto", made, None)
        found.choose([(weight_of(32, 40), False), (weight_of(32, 64, torch.float32), False)])
    assert (found.backends(), made.measured) == ({}, [])


def test_choices_are_kept_for_the_next_start(tmp_path: Path) -> None:
    with device(times(cublas=9.0, second=7.0)) as made:
        first = products.Products("auto", made, tmp_path)
        first.choose(WEIGHTS)
        asked = len(made.measured)
        second = products.Products("auto", made, tmp_path)
        second.choose(WEIGHTS)
        assert len(made.measured) == asked
        assert choices(second) == choices(first)
        second.choose([(weight_of(32, 64), False)])
        third = products.Products("auto", made, tmp_path)
        third.choose([*WEIGHTS, (weight_of(32, 64), False)])
        assert choices(third) == choices(second)
        assert len(choices(third)) == 3


BAD = {
    "no JSON": "{",
    "not a list": '{"a": 1}',
    "an unknown plan": '[{"shape": [64, 96, false, "bfloat16", false], "plan": "x", '
    '"micros": {"x": 1.0, "cublas": 1.0}}]',
    "no number": '[{"shape": [64, 96, false, "bfloat16", false], "plan": "cublas", '
    '"micros": {"cublas": NaN}}]',
    "no shape": '[{"shape": 5, "plan": "cublas", "micros": {"cublas": 1.0}}]',
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_a_damaged_file_is_named_and_measured_again(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with device(times(cublas=9.0, second=7.0)) as made:
        products.Products("auto", made, tmp_path).choose(WEIGHTS)
        (path,) = (tmp_path / "products").iterdir()
        path.write_text(text)
        found = products.Products("auto", made, tmp_path)
        found.choose(WEIGHTS)
    assert len(found.backends()) == 2
    assert f"the times of products in {tmp_path} cannot be used" in caplog.text


def test_a_folder_that_cannot_be_written_costs_only_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "products").write_text("a file, not a folder")
    with device(times(cublas=9.0, second=7.0)) as made:
        found = products.Products("auto", made, tmp_path)
        found.choose(WEIGHTS)
    assert len(found.backends()) == 2
    assert "cannot be kept" in caplog.text


@pytest.mark.skipif(DEVICE.type != "cuda", reason="measures on a CUDA device")
def test_products_of_this_device_are_chosen_and_right(tmp_path: Path) -> None:
    found = products.Products("skinny", DEVICE, tmp_path)
    weight = weight_of(4096, 4096)
    found.choose([(weight, False), (weight, True)])
    assert {each.name for each in found.backends().values()} == {"triton-skinny"}
    x = numbers(FEW, 4096, dtype=BF16)
    together = found.linear(x, weight)
    close(together, x.double() @ weight.data.double().T, atol=1e-2)
    for first in (0, 7):
        assert torch.equal(found.linear(x[first : first + 1], weight), together[first : first + 1])
