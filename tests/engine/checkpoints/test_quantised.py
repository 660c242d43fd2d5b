"""Published layouts of quantised weights are read number for number, whole or in part, or refused
by name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.checkpoints.checkpoint import Checkpoint, open_checkpoint, read_arch
from engine.checkpoints.quantised.config import read_quantisation
from engine.checkpoints.source import ModelFiles
from kernels.linear.grouped import GroupedWeight
from kernels.linear.quantised import dense
from kernels.linear.scaled import FP8, ScaledWeight
from tests.support.files.quantised_files import (
    AWQ_CONFIG,
    FORMATS,
    GPTQ_CONFIG,
    change_config,
    change_tensors,
    compressed,
    int4,
    rewrite,
)
from tests.support.models.tiny_llama import TinyLlama, write_tiny_llama

SPEC = TinyLlama(num_layers=1, hidden_size=128, intermediate_size=192)
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
# Inputs in another order cannot stay in groups.
PLAIN = ("packed-in-order", "gptq-in-order")


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(ModelFiles("hf", folder, folder.name))


def written(folder: Path, name: str = "fp8-channel") -> Path:
    rewrite(folder, write_tiny_llama(folder, SPEC), FORMATS[name])
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_the_numbers_that_the_layout_means(tmp_path: Path, name: str) -> None:
    model = write_tiny_llama(tmp_path, SPEC)
    rewrite(tmp_path, model, FORMATS[name])
    checkpoint = opened(tmp_path)
    for key, wanted in model.state_dict().items():
        assert torch.equal(checkpoint.tensor(key), wanted), key
    for stem in (Q, DOWN):
        stored, wanted = checkpoint.stored(f"{stem}.weight"), checkpoint.tensor(f"{stem}.weight")
        kinds = torch.Tensor if name in PLAIN else GroupedWeight | ScaledWeight
        assert isinstance(stored[:], kinds)
        for rows, columns in ((3, 21), (0, 128)), ((8, 16), (64, 128)), ((0, 64), (5, 40)):
            part = dense(stored[slice(*rows), slice(*columns)])
            assert torch.equal(part, wanted[slice(*rows), slice(*columns)])


def test_an_architecture_is_read_without_weights(tmp_path: Path) -> None:
    assert read_arch(str(written(tmp_path))) == opened(tmp_path).arch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{Q}.weight_scale": None}, f"missing tensor {Q}.weight_scale"),
        ({f"{Q}.weight_scale": torch.ones(7, 1)}, r"F32 of shape \[7, 1\]; channel scales of"),
        ({f"{Q}.weight": torch.zeros(256, 64).to(torch.float8_e4m3fn)}, r"asks for \[256, 128\]"),
        ({f"{Q}.surprise": torch.zeros(1)}, f"unexpected tensor {Q}.surprise"),
        (
            {"lm_head.weight": torch.zeros(384, 128).to(torch.float8_e4m3fn)},
            "lm_head is stored quan",
        ),
        ({f"{Q}.weight_scale": torch.ones(256, 1).int()}, "is I32 of shape"),
    ],
)
def test_wrong_tensors_are_errors_that_name_them(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    change_tensors(written(tmp_path), **change)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("name", "end", "tensor", "message"),
    [
        ("packed-zeros", "weight_packed", torch.zeros(256, 16), "is F32; it must be I32"),
        ("packed-zeros", "weight_packed", torch.zeros(256, 16).long(), "is I64; it must be I32"),
        (
            "packed-zeros",
            "weight_packed",
            torch.zeros(256).int(),
            r"has shape \[256\]; it needs two",
        ),
        ("packed-zeros", "weight_scale", torch.ones(256, 2).int(), "is I32; it must be F32 or F16"),
        ("packed-zeros", "weight_shape", torch.tensor([256.0, 128.0]), "is F32; it must be I32 or"),
        ("packed-zeros", "weight_shape", torch.tensor([1, 2, 3]), r"is \[1, 2, 3\]; it needs two"),
        (
            "packed-zeros",
            "weight_shape",
            torch.tensor([0, 128]),
            r"is \[0, 128\]; it needs two pos",
        ),
        ("awq", "qweight", torch.zeros(32).int(), r"has shape \[32\]; it needs two axes"),
        ("gptq", "g_idx", torch.zeros(128), "is F32; it must be I32 or I64"),
        ("gptq", "g_idx", torch.full((128,), 4).int(), "names groups 4 to 4; there are 0 to 3"),
        ("gptq", "g_idx", torch.full((128,), -1).int(), "names groups -1 to -1; there are 0 to 3"),
        ("gptq", "qzeros", torch.zeros(4, 32).short(), "is I16; it must be I32"),
        ("fp8-channel", "weight", torch.zeros(9).to(FP8), r"has shape \[9\]; it needs two axes"),
    ],
)
def test_parts_of_another_kind_are_refused_by_name(
    tmp_path: Path, name: str, end: str, tensor: torch.Tensor, message: str
) -> None:
    """Their bits would give other numbers, without an error."""
    change_tensors(written(tmp_path, name), **{f"{Q}.{end}": tensor})
    with pytest.raises(ValueError, match=rf"tensor {Q}.{end} {message}"):
        opened(tmp_path)


def test_groups_that_do_not_fit_the_weight_are_refused(tmp_path: Path) -> None:
    change_tensors(written(tmp_path, "awq"), **{f"{Q}.qzeros": torch.zeros(3, 32).int()})
    with pytest.raises(ValueError, match=r"q_proj.qzeros has shape \[3, 32\].*it is \[4, 32\]"):
        opened(tmp_path)


def test_quantised_tensors_without_a_word_in_the_configuration_are_refused(tmp_path: Path) -> None:
    change_config(written(tmp_path), quantization_config=None)
    with pytest.raises(ValueError, match="is F8_E4M3; supported are F32, F16, BF16"):
        opened(tmp_path)


def test_scales_without_use_are_named_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path, "fp8-tensor-static")
    with caplog.at_level(logging.WARNING):
        opened(tmp_path)
    assert "mlp.down_proj.input_scale" in caplog.text
    assert "and 2 more are not used: where activations are rounded" in caplog.text


FLOAT = {"num_bits": 8, "type": "float", "strategy": "channel"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "modelopt"},
            "'modelopt'.*compressed-tensors, fbgemm_fp8, fp8, awq, gptq",
        ),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'"),
        (compressed("int-quantized", FLOAT | {"type": "int"}, None), "8 bits .int. in the format"),
        (compressed("nvfp4-pack-quantized", FLOAT | {"num_bits": 4}, None), "4 bits .float."),
        (compressed("float-quantized", FLOAT, {"num_bits": 4}), "input_activations of 4 bits"),
        (compressed("float-quantized", FLOAT | {"strategy": "row"}, None), "'tensor', 'channel'"),
        (int4(group_size=48), "group_size 48 is not supported; -1 and multiples of 32 are"),
        (int4(group_size=32) | {"transform_config": {"u": 1}}, "rotated weights"),
        (int4(group_size=32) | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24"),
        (AWQ_CONFIG | {"version": "gemv"}, "version 'gemv' is not supported; 'gemm' is"),
        (AWQ_CONFIG | {"bits": 8}, "weights of 8 bits are not supported; 4 are"),
        (GPTQ_CONFIG | {"checkpoint_format": "marlin"}, "'gptq', 'gptq_v2' are"),
        (GPTQ_CONFIG | {"dynamic": {"-:.*": {}}}, "dynamic .other settings"),
        (int4(group_size=32) | {"config_groups": {"all": [1]}}, r"all must be a table, not \[1\]"),
        (int4(group_size=32) | {"sparsity_config": "2:4"}, "sparsity_config must be a table, not"),
        (int4(group_size=32) | {"ignore": "lm_head"}, "ignore must be a list of names, not 'lm_he"),
        (int4(group_size=32) | {"ignore": ["re:["]}, r"ignore 're:\[' is no regular expression"),
        (
            compressed("float-quantized", FLOAT, None)
            | {"config_groups": {"a": {"targets": "Linear"}}},
            "targets must be a list of names, not 'Linear'",
        ),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2' is not supported; 'e4m3' is"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_quantisation({"quantization_config": config})


def test_layers_are_left_out_by_name_part_or_expression() -> None:
    first = {"targets": ["re:.*mlp.*"], "weights": FLOAT, "format": "float-quantized"}
    both = int4(group_size=32)
    both["config_groups"] = {"all": both["config_groups"]["group_0"], "mlp": first}
    found = read_quantisation(
        {"quantization_config": both | {"ignore": ["lm_head", "re:.*k_proj"]}}
    )
    assert found is not None

    def layout(name: str) -> str | None:
        scheme = found.scheme([name, f"language_model.{name}"])
        return scheme and scheme.layout

    assert layout("model.layers.3.mlp.up_proj") == "fp8"
    assert layout("model.layers.3.self_attn.q_proj") == "packed"
    assert layout("model.layers.3.self_attn.k_proj") is None
    assert layout("lm_head") is None


def test_tensors_of_one_file_are_all_used(tmp_path: Path) -> None:
    """Nothing is left over that no layer reads."""
    written(tmp_path, "packed-zeros")
    ends = {name.rpartition(".")[2] for name in load_file(tmp_path / "model.safetensors")}
    assert {"weight_packed", "weight_zero_point", "weight_shape", "weight_scale"} < ends
    opened(tmp_path)
