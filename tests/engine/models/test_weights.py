"""In which form weights are packed."""

from __future__ import annotations

import pytest
import torch

from configs.schema import WeightForm
from engine.checkpoints.arch import LlamaArch
from engine.models.loading import LayerLoader
from engine.models.place import Place
from engine.models.weights import WeightPacker, with_zero_rows
from kernels.linear.grouped import GroupedWeight, GroupLayout, quantise
from kernels.linear.quantised import Part, dense
from kernels.ops import LinearWeight, Ops
from kernels.registry import triton_ops
from tests.support.models.tiny_llama import TinyLlama

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


def stacked(E: int, form: WeightForm, *experts: Part) -> LinearWeight:
    """Experts of one part each, packed for kernels that read all of them as one tensor."""
    (weight,) = packer(triton_ops(torch.float32), form).pack_experts([[e] for e in experts], E)
    return weight


def numbers_of(weight: LinearWeight) -> torch.Tensor:
    """[E, out, in] of stacked experts."""
    assert weight.scales is not None
    pairs, least = weight.data, weight.minimums
    codes = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)
    every = range(len(pairs))
    wide = [
        GroupedWeight(codes[e], weight.scales[e], None if least is None else least[e], 4)
        for e in every
    ]
    return torch.stack([each.dequantised() for each in wide])


def test_experts_of_four_bits_stay_so_whatever_their_scales_and_minimums() -> None:
    with_minimums = quantise(numbers(24, 64, 1), 4)
    halves = GroupedWeight(with_minimums.codes, with_minimums.scales, None, 4)
    wide = GroupedWeight(with_minimums.codes, with_minimums.scales.float() / 3, None, 4)
    for experts in ([halves, halves], [halves, wide], [with_minimums, halves, wide]):
        weight = stacked(len(experts), "stored", *experts)
        assert weight.data.dtype == torch.uint8
        wanted = torch.stack([each.dequantised() for each in experts])
        torch.testing.assert_close(numbers_of(weight), wanted, atol=1e-5, rtol=0)
        layouts = [each.layout for each in experts]
        assert isinstance(weight.layout, GroupLayout)
        assert weight.layout.wide_scales == any(each.wide_scales for each in layouts)
        assert weight.layout.has_minimums == any(each.has_minimums for each in layouts)


def test_plain_experts_are_rounded_to_four_bits_if_that_is_asked() -> None:
    experts = numbers(24, 64, 1), numbers(24, 64, 2)
    wanted = torch.stack([quantise(each, 4).dequantised() for each in experts])
    assert torch.equal(numbers_of(stacked(2, "q4", *experts)), wanted)
    assert stacked(2, "stored", *experts).layout is None
    assert stacked(1, "plain", quantise(experts[0], 4)).layout is None


def test_an_expert_that_is_stored_in_another_way_is_refused() -> None:
    first, other = quantise(numbers(24, 64), 4), numbers(24, 64)
    with pytest.raises(ValueError, match="those of expert 1 are not stored as those of the expert"):
        stacked(2, "stored", first, other)
