"""A round's time is the sum of its parts; each part follows from bytes, operations and launches."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.planned import deployment_of
from configs.planning import load_calibration, shipped_models
from engine.step.shape import ROOT, DynamicShape, StaticShape, TreeShape, chain
from server.planning.costs import LIMITS, Cost, overlapped
from server.planning.formats import BF16, FP8
from server.planning.products import Product, layer_products
from server.planning.rounds import (
    Deployment,
    frontiers,
    prefill_cost,
    round_cost,
    round_parts,
    summed,
)
from server.planning.sizes import ModelSizes

MAVERICK = "meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8"
LLAMA_8B = "meta-llama/Llama-3.1-8B-Instruct"


def deployed(model: str, ranks: int = 1, head: str | None = None) -> Deployment:
    row = {"model": model, "gpu": "h100", "ranks": ranks, "head": head}
    return deployment_of(row, load_calibration())


@pytest.mark.parametrize(
    ("shape", "widths"),
    [
        (chain(3), [1, 1, 1]),
        (StaticShape("eight", (-1, 0, 0, 0, 1, 1, 2, 4)), [1, 2, 1]),
        (DynamicShape("dynamic16", 16, 4, 6), [1, 6, 6, 6]),
    ],
)
def test_levels_of_a_tree_are_passes_of_the_head(shape: TreeShape, widths: list[int]) -> None:
    assert frontiers(shape) == widths


@pytest.mark.parametrize(
    ("tokens", "touched"), [(1, 1.0), (2, 2 - 1 / 128), (128, 81.1), (10000, 128.0)]
)
def test_tokens_touch_the_expected_number_of_experts(tokens: int, touched: float) -> None:
    experts = Product("experts", 64, 64, FP8, copies=128, used=1)
    assert experts.touched(tokens) == pytest.approx(touched, rel=1e-3)
    assert replace(experts, copies=1).touched(tokens) == 1


@pytest.mark.parametrize("tokens", [1, 8, 64, 5000])
def test_gpus_with_whole_experts_wait_for_the_one_that_uses_most(tokens: int) -> None:
    experts = Product("experts", 64, 64, FP8, copies=16, used=1, holders=8)
    draws = torch.randint(128, (500, tokens), generator=torch.Generator().manual_seed(1))
    used = torch.zeros(500, 128).scatter_(1, draws, 1.0)
    by_gpu = used.view(500, 8, 16).sum(dim=2).max(dim=1).values.mean().item()
    assert experts.touched(tokens) == pytest.approx(by_gpu, rel=0.1)


def test_whole_experts_take_as_much_memory_and_more_time_for_few_tokens() -> None:
    cut = deployed(MAVERICK, 8)
    whole = replace(cut, target=cut.target.with_experts("expert"))
    sizes = [sum(p.num_bytes for p in layer_products(d.target, 8)) for d in (cut, whole)]
    assert sizes[0] == pytest.approx(sizes[1], rel=2e-3)  # scales of outputs are not cut
    for rows in (1, 8):
        times = [round_parts(d, rows, 8192, ROOT)["experts, products"] for d in (cut, whole)]
        assert times[0].memory < times[1].memory < 9 * times[0].memory


def test_reading_and_multiplying_overlap() -> None:
    assert overlapped(3.0, 0.0).memory == pytest.approx(3.0)
    assert overlapped(0.0, 0.0) == Cost()
    alike = overlapped(1.0, 1.0)
    assert (alike.memory, alike.total) == (
        pytest.approx(alike.compute),
        pytest.approx(2 ** (1 / 3)),
    )


def test_parts_add_up_and_one_gpu_has_no_network() -> None:
    deployment = deployed(LLAMA_8B, head="eagle3")
    parts = round_parts(deployment, 4, 1000, chain(3))
    whole = round_cost(deployment, 4, 1000, chain(3))
    assert whole.total == pytest.approx(sum(part.total for part in parts.values()))
    assert summed(parts).network == 0
    assert whole.limit in LIMITS
    assert min(whole.by_limit().values()) >= 0


def test_weights_are_read_at_the_share_of_the_data_sheet() -> None:
    """15.0 GB of an 8B model at 90 % of 3.35 TB/s."""
    parts = round_parts(deployed(LLAMA_8B), 1, 1, ROOT)
    products = [part.memory for name, part in parts.items() if "products" in name or "LM" in name]
    assert sum(products) == pytest.approx(15.0e9 / (0.9 * 3.35e12) * 1e6, rel=0.01)


@pytest.mark.parametrize(
    ("shape", "kernels"),
    [(ROOT, 368), (chain(3), 431), (DynamicShape("dynamic16", 16, 4, 6), 487 - 36)],
)
def test_kernels_are_counted_as_an_h200_ran_them(shape: TreeShape, kernels: int) -> None:
    """Those of attention that are launched twice, for 16 nodes, count as time of the first."""
    each_one = dict.fromkeys(("product_us", "attention_us", "kernel_us"), 1.0)
    none = dict.fromkeys(("attention_row_us", "attention_node_us"), 0.0)
    counting = load_calibration().model_copy(update=each_one | none)
    found = deployed(LLAMA_8B, head="eagle3")
    found = replace(found, machine=replace(found.machine, calibration=counting))
    assert round_cost(found, 1, 300, shape).launch == pytest.approx(kernels, abs=4)


def test_waiting_for_the_host_adds_its_time() -> None:
    ahead = deployed(LLAMA_8B)
    waiting = replace(ahead, run_ahead=False)
    parts = round_parts(waiting, 8, 1000, ROOT)
    added = round_cost(waiting, 8, 1000, ROOT).total - round_cost(ahead, 8, 1000, ROOT).total
    assert added == pytest.approx(parts["host"].host)
    assert added > load_calibration().host_us


def test_local_attention_reads_no_more_than_a_chunk() -> None:
    """36 of 48 layers read half a chunk on average once the context is longer."""
    deployment = deployed(MAVERICK, 8)

    def cache_us(context: int) -> float:
        return round_parts(deployment, 1, context, ROOT)["attention, cache"].memory

    assert cache_us(8192) == pytest.approx(2 * cache_us(4096), rel=1e-3)
    ratio = (12 * 8 + 36 / 2) / 48
    assert cache_us(65536) / cache_us(8192) == pytest.approx(ratio, rel=1e-3)


@pytest.mark.parametrize("ranks", [2, 8])
def test_more_gpus_take_less_time_and_add_sums(ranks: int) -> None:
    one, several = (round_cost(deployed(LLAMA_8B, n), 1, 1000, ROOT) for n in (1, ranks))
    assert several.total < one.total
    assert several.network > 60 * load_calibration().all_reduce_us
    assert several.memory < 1.1 * one.memory / ranks


def test_fp8_weights_halve_the_bytes_and_double_the_peak() -> None:
    machine = deployed(LLAMA_8B).machine
    plain, short = (
        machine.product(Product("x", 4096, 4096, kept, count=10), 4096) for kept in (BF16, FP8)
    )
    assert short.memory + short.compute < 0.6 * (plain.memory + plain.compute)
    assert short.launch > plain.launch  # rounding the activations is another kernel


def test_small_chunks_of_a_prompt_take_longer() -> None:
    deployment = deployed(LLAMA_8B)
    times = [prefill_cost(deployment, 8000, chunk).total for chunk in (256, 1024, 8192)]
    assert times == sorted(times, reverse=True)


def test_experts_count_by_the_tokens_that_use_them() -> None:
    config = json.loads(shipped_models()[MAVERICK].read_text(encoding="utf-8"))
    sizes = ModelSizes.from_config(config)
    deployment = replace(deployed(MAVERICK, 8), target=sizes)

    def expert_us(batch: int) -> float:
        return round_parts(deployment, batch, 1, ROOT)["experts, products"].memory

    assert expert_us(2) == pytest.approx(2 * expert_us(1), rel=0.01)
    assert expert_us(512) < 129 * expert_us(1)
