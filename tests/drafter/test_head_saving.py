"""EAGLE heads are written in the published layout, and large heads in files of bounded size."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from drafter.checkpoint import save_eagle, save_eagle3
from drafter.head_shards import write_tensors
from drafter.heads.config import HeadConfig
from drafter.heads.eagle import EagleHead
from drafter.heads.untrained import eagle3_config, random_eagle3
from kernels.ops import Ops
from tests.drafter.published_heads import DRAFT_VOCAB, LAYOUTS, TARGET
from tests.drafter.test_head_checkpoint import load

EAGLES = [name for name in LAYOUTS if LAYOUTS[name].kind != "eagle3"]


@pytest.mark.parametrize("name", EAGLES)
def test_saved_eagle_head_is_read_back_bit_by_bit(
    name: str, reference_ops: Ops, tmp_path: Path
) -> None:
    layout = LAYOUTS[name]
    save_eagle(tmp_path / "head", HeadConfig.from_json(layout.config), TARGET, layout.tensors())
    first = load(layout.write(tmp_path / "first"), reference_ops)
    again = load(tmp_path / "head", reference_ops)
    assert isinstance(again, EagleHead)
    assert (again.arch, again.tap_layers) == (first.arch, first.tap_layers)
    assert (again.norm is None) == (layout.kind == "eagle")
    stored = load_file(tmp_path / "head" / "model.safetensors")
    assert stored.keys() == layout.tensors().keys()  # the published names are the common ones
    assert all(torch.equal(stored[key], tensor) for key, tensor in layout.tensors().items())
    content = json.loads((tmp_path / "head" / "config.json").read_text())
    assert (content["architectures"], content["bias"]) == (["LlamaForCausalLM"], layout.fc_bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "eagle3"}, "kind 'eagle3' cannot be written as 'eagle'"),
        ({"draft_vocab_size": 37}, "target's draft_vocab_size 131, not 37"),
    ],
)
def test_other_heads_are_not_saved_as_eagle(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    layout = LAYOUTS["reference-eagle"]
    config = dataclasses.replace(HeadConfig.from_json(layout.config), **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        save_eagle(tmp_path / "head", config, TARGET, layout.tensors())
    assert list(tmp_path.iterdir()) == []


def test_large_heads_are_cut_into_numbered_files_with_an_index(
    reference_ops: Ops, tmp_path: Path
) -> None:
    config, limit = eagle3_config(TARGET, DRAFT_VOCAB), 80_000
    tensors = random_eagle3(config, TARGET, seed=1)
    ids = LAYOUTS["reference-eagle3"].target_ids()
    save_eagle3(tmp_path / "one", config, TARGET, tensors, ids)
    save_eagle3(tmp_path / "cut", config, TARGET, tensors, ids, max_shard_bytes=limit)
    files = sorted((tmp_path / "cut").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert len(files) > 2
    assert max(file.stat().st_size for file in files) <= limit
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    cut = {name: each for file in files for name, each in load_file(file).items()}
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
    assert load(tmp_path / "cut", reference_ops).arch == load(tmp_path / "one", reference_ops).arch


def test_a_head_of_one_file_has_no_index_and_others_may_read_it(tmp_path: Path) -> None:
    config = eagle3_config(TARGET)
    tensors = random_eagle3(config, TARGET, seed=1)
    save_eagle3(tmp_path / "head", config, TARGET, tensors, None, max_shard_bytes=10**9)
    files = sorted((tmp_path / "head").iterdir())
    assert [file.name for file in files] == ["config.json", "model.safetensors"]
    assert files[0].stat().st_mode == files[1].stat().st_mode


def test_a_tensor_that_fits_into_no_file_is_named(tmp_path: Path) -> None:
    config = eagle3_config(TARGET)
    tensors = random_eagle3(config, TARGET, seed=1)
    with pytest.raises(ValueError, match=r"tensor fc\.weight has 62208 bytes.*of max_shard_bytes"):
        save_eagle3(tmp_path / "head", config, TARGET, tensors, None, max_shard_bytes=60_000)
    assert list(tmp_path.iterdir()) == []


def test_headers_of_files_count_too(tmp_path: Path) -> None:
    write_tensors(tmp_path, {f"part{n}": torch.zeros(250) for n in range(8)}, 4000)  # 1000 bytes
    sizes = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert len(sizes) > 1
    assert max(sizes) <= 4000


def test_weights_that_cannot_be_written_are_an_error_of_the_system(tmp_path: Path) -> None:
    """Such as on a full disk: commands say it in one line."""
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(OSError, match=r"model.safetensors cannot be written: "):
        write_tensors(tmp_path, {"a": torch.zeros(2)})
