"""In which form weights are packed."""

from __future__ import annotations

import pytest
import torch

from configs.schema import WeightForm
from engine.checkpoints.arch import LlamaArch
from engine.models.loading import LayerLoader
from engine.models.place import Place
from engine.models.weights import WeightPacker, with_zero_rows
from kernels.linear.grouped import GroupedWeight, quantise
from kernels.linear.quantised import Part, dense
from kernels.ops import LinearWeight, Ops
from tests.support.tiny_llama import TinyLlama

CPU = torch.device("cpu")


def packer(ops: Ops, form: WeightForm) -> WeightPacker:
    return WeightPacker(ops, torch.float32, CPU, form)


def numbers(N: int, K: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def rows(ops: Ops, weight: LinearWeight) -> torch.Tensor:
    """The numbers of a packed weight without parts that follow."""
    return ops.embedding(torch.arange(weight.out_features), weight)


@pytest.mark.parametrize(("form", "bits"), [("stored", 4), ("plain", None), ("q8", 8), ("q4", 4)])
def test_quantised_weights_take_the_configured_form(
    native_ops: Ops, form: WeightForm, bits: int | None
) -> None:
    part = quantise(numbers(20, 64), 4)
    packed = packer(native_ops, form).pack([part], 20, None)
    assert (packed.layout and packed.layout.bits) == bits
    tolerance = 0.02 if form == "q8" else 0.2 if form == "q4" else 1e-6
    torch.testing.assert_close(rows(native_ops, packed), part.dequantised(), atol=tolerance, rtol=0)


def test_plain_weights_stay_plain_unless_they_are_to_be_quantised(native_ops: Ops) -> None:
    weight = numbers(20, 64)
    stored = packer(native_ops, "stored").pack([weight], 20, None)
    assert stored.layout is None
    assert torch.equal(rows(native_ops, stored), weight)
    assert packer(native_ops, "q8").pack([weight], 20, None).layout is not None
    ungrouped = packer(native_ops, "q8").pack([numbers(20, 40)], 20, None)
    assert ungrouped.layout is None


@pytest.mark.parametrize("form", ["stored", "plain"])
def test_kernels_that_read_no_groups_get_plain_numbers(
    reference_ops: Ops, form: WeightForm
) -> None:
    part = quantise(numbers(20, 64), 4)
    packed = packer(reference_ops, form).pack([part], 20, None)
    assert torch.equal(packed.data, part.dequantised())


def test_parts_of_several_layouts_are_one_product(native_ops: Ops) -> None:
    """As the q, k and v of a Q4_K_M file are."""
    parts: list[Part] = [
        quantise(numbers(20, 64, 1), 4),
        quantise(numbers(10, 64, 2), 4),
        quantise(numbers(10, 64, 3), 8),
    ]
    bias, x = numbers(1, 40, 4)[0], numbers(5, 64, 5)
    packed = packer(native_ops, "stored").pack(parts, 40, bias)
    assert (packed.out_features, packed.all_features) == (30, 40)
    got = native_ops.linear(x, packed)
    expected = x @ torch.cat([dense(part) for part in parts]).T + bias
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
    one = native_ops.linear(x, packer(native_ops, "stored").pack(parts[2:], 10, bias[30:]))
    assert torch.equal(got[:, 30:], one)


def test_a_plain_part_makes_the_whole_product_plain(native_ops: Ops) -> None:
    parts: list[Part] = [quantise(numbers(20, 64), 4), numbers(10, 64)]
    packed = packer(native_ops, "stored").pack(parts, 30, None)
    assert packed.layout is None
    expected = torch.cat([dense(part) for part in parts])
    assert torch.equal(rows(native_ops, packed), expected)


def test_columns_cut_within_a_group_are_plain_numbers() -> None:
    weight = quantise(numbers(8, 128), 4)
    whole, cut = weight[2:4, 32:96], weight[:, 16:48]
    assert isinstance(whole, GroupedWeight)
    assert torch.equal(whole.dequantised(), weight.dequantised()[2:4, 32:96])
    assert isinstance(cut, torch.Tensor)
    assert torch.equal(cut, weight.dequantised()[:, 16:48])


@pytest.mark.parametrize("bits", [4, 8])
def test_padding_rows_are_zeros(bits: int) -> None:
    weight = quantise(numbers(5, 32), bits)
    padded = dense(with_zero_rows(weight, 8))
    assert torch.equal(padded[:5], weight.dequantised())
    assert bool((padded[5:] == 0).all())
    assert with_zero_rows(numbers(5, 32), 8).shape == (8, 32)


@pytest.mark.parametrize(("form", "others"), [("q8", 8), ("plain", None)])
def test_feed_forwards_may_be_kept_in_fewer_bits_than_the_rest(
    native_ops: Ops, form: WeightForm, others: int | None
) -> None:
    spec = TinyLlama(hidden_size=128, intermediate_size=256)
    arch = LlamaArch.from_hf_config(spec.config().to_dict())
    tensors = {f"model.{name}": torch.randn(s) for name, s in arch.layer_tensors(0).items()}
    place = Place(native_ops, torch.float32, CPU, weights=form, mlp_weights="q4")
    layer = LayerLoader.of(arch, tensors.__getitem__, place, 32).decoder_layer(0, "model")
    weights = layer.weights
    bits = [each.layout and each.layout.bits for each in (weights.qkv, weights.output)]
    assert bits == [others, others]
    assert [each.layout and each.layout.bits for each in (weights.gate_up, weights.down)] == [4, 4]
