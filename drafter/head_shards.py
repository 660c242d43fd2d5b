"""Write the weights of a draft head to disk, in files of bounded size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from engine.checkpoints.written import write_json, write_tensors_file

INDEX = "model.safetensors.index.json"
HEADER_PER_FILE, HEADER_PER_TENSOR = 256, 128  # bytes without the names; upper bounds


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int | None = None
) -> None:
    """Write model.safetensors or, if that would exceed `max_shard_bytes`, numbered files and their
    index in Hugging Face's layout. Tensors must be contiguous and on the CPU.

    ValueError for a tensor that does not fit into one file, since the layout cannot cut it.
    """
    tensors = dict(tensors)
    total = sum(tensor.nbytes for tensor in tensors.values())
    room = total if max_shard_bytes is None else max_shard_bytes - _header_bytes(tensors)
    for name, tensor in tensors.items():
        if tensor.nbytes > room:
            raise ValueError(
                f"tensor {name} has {tensor.nbytes} bytes and would not fit into a file of "
                f"max_shard_bytes {max_shard_bytes}"
            )
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=room)
    for file, names in split.filename_to_tensors.items():
        write_tensors_file(folder / file, {name: tensors[name] for name in names})
    if split.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX, index)


def _header_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The largest header of a file with some of the tensors."""
    return HEADER_PER_FILE + sum(HEADER_PER_TENSOR + len(name) for name in tensors)
