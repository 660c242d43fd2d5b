"""GGUF files of every supported type, written by the `gguf` package and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.checkpoint import Checkpoint, open_checkpoint
from engine.checkpoints.gguf_files.checkpoint import LAYER_NAMES, TOP_NAMES
from engine.checkpoints.gguf_files.header import read_gguf
from engine.checkpoints.gguf_files.rope import frequency_divisors
from engine.checkpoints.rope_scaling import LinearRopeScaling, Llama3RopeScaling, read_rope
from engine.checkpoints.source import ModelFiles, resolve_source
from engine.models.rope import scale_llama3
from tests.support.models.tiny_llama import TinyLlama, random_model

SUPPORTED = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]
# The package only reads these; a block is its scales (at these bytes, float16) and random bits.
SCALES = {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2)}
SCALES[Kind.Q6_K] = (208,)
SPEC = TinyLlama(vocab_size=320)
WIDE = TinyLlama(vocab_size=320, hidden_size=256, intermediate_size=256)  # rows of whole blocks
GGUF_NAMES = {hf: name for name, hf in (TOP_NAMES | LAYER_NAMES).items()}


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in GGUF_NAMES:
        return f"{GGUF_NAMES[stem]}.{kind}"
    _, _, index, part = stem.split(".", 3)
    return f"blk.{index}.{GGUF_NAMES[part]}.{kind}"


def permuted(name: str, values: np.ndarray, spec: TinyLlama) -> np.ndarray:
    """q and k in the layout of llama.cpp's converter: rows i and i + D/2 become neighbours."""
    heads = {"q": spec.num_heads, "k": spec.num_kv_heads}.get(name.rpartition("_proj")[0][-1:])
    if heads is None:
        return values
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def quantised(values: np.ndarray, kind: Kind) -> np.ndarray:
    """Rows of blocks [rows, bytes]: the values, or anything for types that are only read."""
    if kind not in SCALES:
        return gguf.quantize(values, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(len(values))
    blocks = rng.integers(0, 256, (values.size // block, size), dtype=np.uint8)
    for at in SCALES[kind]:
        scales = rng.uniform(0.001, 0.01, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(len(values), -1)


def write(
    path: Path,
    kind: Kind = Kind.F32,
    spec: TinyLlama = SPEC,
    extra: dict[str, np.ndarray] | None = None,
    skip: str = "",
    arch: str = "llama",
    split: int = 0,  # most tensors of a file; 0: all in one
    **fields: Any,
) -> dict[str, torch.Tensor]:
    """Write a whole tiny model; returns the tensors that must be read, by Hugging Face name."""
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(spec.max_position_embeddings)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(7)
    for key, value in fields.items():
        writer.add_key_value(key.replace("__", "."), value, _value_type(value))
    expected = {}
    for name, tensor in random_model(spec).state_dict().items():
        if name == skip or (spec.tied and name == "lm_head.weight"):
            continue
        values = permuted(name, tensor.numpy(), spec)
        stored = kind if values.ndim > 1 else Kind.F32
        raw = quantised(values, stored)
        writer.add_tensor(gguf_name(name), raw, raw_dtype=stored)
        rounded = gguf.dequantize(raw, stored).reshape(values.shape)
        expected[name] = torch.from_numpy(unpermuted(name, rounded, spec))
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def unpermuted(name: str, values: np.ndarray, spec: TinyLlama) -> np.ndarray:
    rows = np.arange(len(values), dtype=np.int64)
    back = np.empty_like(values)
    back[permuted(name, rows, spec)] = values
    return back


def _value_type(value: object) -> gguf.GGUFValueType:
    kinds = {str: "STRING", int: "UINT32", float: "FLOAT32"}
    return gguf.GGUFValueType[kinds[type(value)]]


def open_gguf(path: Path) -> Checkpoint:
    return open_checkpoint(ModelFiles("gguf", path, "tiny"))


@pytest.mark.parametrize("kind", [*SUPPORTED, *SCALES], ids=lambda kind: kind.name)
def test_every_supported_type_reads_as_the_gguf_package_dequantises_it(
    tmp_path: Path, kind: Kind
) -> None:
    expected = write(tmp_path / "m.gguf", kind, WIDE if kind in SCALES else SPEC)
    checkpoint = open_gguf(tmp_path / "m.gguf")
    read = dict(checkpoint.tensors())
    assert read.keys() == expected.keys()
    for name, tensor in read.items():
        assert torch.equal(tensor.float(), expected[name]), name


def test_rows_of_q_and_k_come_back_in_the_order_of_hugging_face(tmp_path: Path) -> None:
    spec = TinyLlama(num_heads=4, num_kv_heads=1, attention_bias=True, tied=True)
    write(tmp_path / "m.gguf", Kind.F32, spec)
    original = random_model(spec).state_dict()
    checkpoint = open_gguf(tmp_path / "m.gguf")
    for name, tensor in checkpoint.tensors():
        assert torch.equal(tensor, original[name]), name


@pytest.mark.parametrize(
    "spec", [SPEC, TinyLlama(tied=True, attention_bias=True, mlp_bias=True, head_dim=128)]
)
def test_architecture_equals_that_of_the_hugging_face_config(
    tmp_path: Path, spec: TinyLlama
) -> None:
    write(tmp_path / "m.gguf", Kind.F32, spec)
    checkpoint = open_gguf(tmp_path / "m.gguf")
    wanted = LlamaArch.from_hf_config(spec.config().to_dict())
    assert checkpoint.arch.rms_norm_eps == pytest.approx(wanted.rms_norm_eps, rel=1e-6)
    for name in LlamaArch.__slots__:
        if name != "rms_norm_eps":
            assert getattr(checkpoint.arch, name) == getattr(wanted, name), name
    assert checkpoint.eos_token_ids == (2, 7)


def test_header_equals_what_the_gguf_reader_sees(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", Kind.Q4_1, note="ü", answer=-1.5)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    file = read_gguf(tmp_path / "m.gguf")
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert file.metadata == fields
    seen = {
        t.name: (int(t.tensor_type), tuple(t.shape)[::-1], t.data_offset) for t in reader.tensors
    }
    assert {t.name: (t.type_id, t.shape, t.offset) for t in file.tensors.values()} == seen


def test_unsupported_quantisation_names_tensor_type_and_what_is_supported(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", Kind.TQ2_0, WIDE)
    with pytest.raises(
        ValueError, match=r"token_embd\.weight is TQ2_0; supported are F32, F16, BF16"
    ):
        open_gguf(tmp_path / "m.gguf")


def part(folder: Path, number: int, count: int = 3) -> Path:
    return folder / f"m-{number:05}-of-{count:05}.gguf"


@pytest.mark.parametrize("named", [1, 3])
def test_a_model_in_several_files_is_read_from_all_of_them(tmp_path: Path, named: int) -> None:
    expected = write(tmp_path / "m.gguf", Kind.Q8_0, split=8)
    assert sorted(tmp_path.iterdir()) == [part(tmp_path, number) for number in (1, 2, 3)]
    files = resolve_source(str(part(tmp_path, named)))
    read = dict(open_checkpoint(files).tensors())
    assert all(torch.equal(read[name].float(), tensor) for name, tensor in expected.items())
    assert read.keys() == expected.keys()
    version = files.version()
    assert all(str(part(tmp_path, number)) in version for number in (1, 2, 3))


def test_a_part_that_is_missing_or_in_the_place_of_another_is_named(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", split=8)
    parts = [part(tmp_path, number) for number in (1, 2, 3)]
    parts[1].rename(tmp_path / "kept")
    with pytest.raises(FileNotFoundError, match=r"one of 3 parts; missing: m-00002-of-00003\.gguf"):
        resolve_source(str(parts[0]))
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(ValueError, match=r"m-00002-of-00003\.gguf has split.no 2; its name says 1"):
        open_gguf(parts[0])
    (tmp_path / "kept").rename(parts[1])
    parts[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(ValueError, match=r"one of 3 parts, which must have names like"):
        open_gguf(tmp_path / "alone.gguf")


@pytest.mark.parametrize("keep", [0, 3, 20, 200, 2000, -1, -100_000])
def test_truncated_file_is_refused_by_name(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.gguf"
    write(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut\.gguf"):
        open_gguf(path)


def test_lengths_beyond_the_file_are_refused_without_reading_on(tmp_path: Path) -> None:
    path = tmp_path / "huge.gguf"
    header = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little")
    key = (1).to_bytes(8, "little") + b"k" + (9).to_bytes(4, "little") + (8).to_bytes(4, "little")
    path.write_bytes(header + (1).to_bytes(8, "little") + key + b"\xff" * 8)
    with pytest.raises(ValueError, match=r"huge\.gguf is truncated"):
        read_gguf(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "qwen2"}, "architecture 'qwen2'"),
        ({"llama__expert_count": 8}, "llama.expert_count 8 is not supported; 0 is"),
        ({"llama__attention__scale": 0.5}, "llama.attention.scale 0.5"),
        ({"llama__attention__sliding_window": 128}, "sliding_window 128"),
        ({"split__count": 2}, "one of 2 parts"),
        ({"llama__rope__scaling__type": "longrope"}, "rope scaling 'longrope' by 1.0"),
        (
            {
                "llama__rope__scaling__type": "linear",
                "llama__rope__scaling__factor": 2.0,
                "extra": {"rope_freqs.weight": np.ones(32, np.float32)},
            },
            "'linear' by 2.0 with rope_freqs.weight",
        ),
        ({"llama__rope__dimension_count": 32}, "32 of 64 dimensions"),
        ({"skip": "model.norm.weight"}, "missing tensor model.norm.weight"),
        ({"skip": "model.embed_tokens.weight"}, "missing tensor token_embd.weight"),
        ({"extra": {"strange": np.zeros(32, np.float32)}}, "unexpected tensor strange"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write(tmp_path / "m.gguf", **changes)
    with pytest.raises(ValueError, match=message):
        open_gguf(tmp_path / "m.gguf")


def test_llama3_rope_divisors_become_the_parameters_they_came_from(tmp_path: Path) -> None:
    scaling = Llama3RopeScaling(32.0, 1.0, 4.0, 8192)
    divisors = np.array(frequency_divisors(scaling, 10000.0, 32), np.float32)
    write(tmp_path / "m.gguf", extra={"rope_freqs.weight": divisors})
    assert open_gguf(tmp_path / "m.gguf").arch.rope_scaling == scaling
    plain = 1 / 10000.0 ** (torch.arange(32) / 32)
    torch.testing.assert_close(plain / scale_llama3(plain, scaling), torch.from_numpy(divisors))


def test_linear_and_yarn_scaling_are_read_from_their_keys(tmp_path: Path) -> None:
    prefix = "llama__rope__scaling__"
    linear = {f"{prefix}type": "linear", f"{prefix}factor": 4.0}
    for name, keys in {"new": linear, "old": {"llama__rope__scale_linear": 4.0}}.items():
        write(tmp_path / f"{name}.gguf", **keys)
        arch = open_gguf(tmp_path / f"{name}.gguf").arch
        assert arch.rope_scaling == LinearRopeScaling(4.0, SPEC.max_position_embeddings)
    yarn = {f"{prefix}type": "yarn", f"{prefix}factor": 8.0}
    write(tmp_path / "y.gguf", **yarn, **{f"{prefix}original_context_length": 64})
    rope = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    content = SPEC.config().to_dict() | {"rope_parameters": rope | {"rope_theta": 10000.0}}
    assert open_gguf(tmp_path / "y.gguf").arch.rope_scaling == read_rope(content).scaling


def test_rope_divisors_of_another_kind_are_refused(tmp_path: Path) -> None:
    divisors = np.linspace(1, 8, 32, dtype=np.float32)
    write(tmp_path / "m.gguf", extra={"rope_freqs.weight": divisors})
    with pytest.raises(ValueError, match="not the Llama 3 scaling"):
        open_gguf(tmp_path / "m.gguf")
