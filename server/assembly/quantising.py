"""`aerie quantize`: writes a model with its linear layers in FP8 or four bits."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.files import read_text
from configs.resolve import HostConfig
from drafter.heads.published import layers_json
from drafter.train.data.conversations import Conversation, read_conversations, sample_file
from engine.checkpoints.arch import ARCHITECTURE, LlamaArch
from engine.checkpoints.checkpoint import INDEX_FILE, Checkpoint, open_checkpoint, read_json
from engine.checkpoints.gguf_files.header import read_gguf
from engine.checkpoints.manifest import expected_tensors
from engine.checkpoints.source import ModelFiles, resolve_source
from engine.checkpoints.written import write_json
from engine.models.place import Place
from engine.quantising.calibrating import quantised_layers
from engine.quantising.files import (
    Form,
    ShardWriter,
    grid_for,
    quantization_config,
    stored_parts,
)
from engine.quantising.rounding import Grid, Rounded, round_for_inputs, round_to_nearest
from kernels.linear.quantised import dense
from server.assembly.operations import configured_ops
from server.text.chat_codec import ChatCodec, load_codec
from server.text.tokens.gguf_tokenizer import write_tokenizer

KEPT = torch.bfloat16  # type of scales, and of plain weights from a .gguf file
LM_HEAD = "lm_head"
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "USE_POLICY*")
WRITTEN = ("config.json", INDEX_FILE)
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Quantising:
    """What to make of a model."""

    form: Form
    output: Path
    text: Path | None  # None: the conversations that come with the package
    window: int  # tokens of a text
    max_windows: int
    nearest: bool = False  # round every number for itself, without any text


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be quantised."""

    files: ModelFiles
    checkpoint: Checkpoint
    grids: Mapping[str, Grid]  # of the linear weights of decoder layers, by name

    @classmethod
    def open(cls, config: HostConfig, form: Form) -> Model:
        """ValueError for one that is quantised or of another family, or does not fit `form`."""
        files = resolve_source(config.model.source, config.model.revision)
        if files.kind == "hf" and "quantization_config" in read_json(files.path / "config.json"):
            raise ValueError(f"{files.name} is quantised already; name the model it was made from")
        checkpoint = open_checkpoint(files)
        if type(checkpoint.arch) is not LlamaArch:
            raise ValueError(f"{files.name} is no {ARCHITECTURE}; only these can be quantised here")
        grids = {
            name: grid_for(form, shape[1], KEPT)
            for name, shape in expected_tensors(checkpoint.arch).items()
            if "_proj." in name and len(shape) == 2
        }
        return cls(files, checkpoint, grids)


def quantise(config: HostConfig, asked: Quantising, say: Say) -> None:
    """Write the quantised model to `asked.output`, complete or not at all.

    Raises:
        FileExistsError: there is something already.
        OSError, ValueError: the model, the text or the configuration cannot be used.
    """
    path = asked.output
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists already")
    model = Model.open(config, asked.form)
    layers = _to_nearest(model) if asked.nearest else _for_texts(config, model, asked, say)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        folder = Path(scratch) / "new"
        folder.mkdir()
        _write_weights(model, layers, folder, say)
        _write_others(model, asked.form, folder)
        folder.rename(path)


def _to_nearest(model: Model) -> Iterator[dict[str, Rounded]]:
    """Every weight for itself, layer by layer."""
    for index in range(model.checkpoint.arch.num_layers):
        names = [name for name in model.grids if name.startswith(f"model.layers.{index}.")]
        yield {
            name: round_to_nearest(
                _finite(model.checkpoint.tensor(name).float(), name), model.grids[name]
            )
            for name in names
        }


def _for_texts(
    config: HostConfig, model: Model, asked: Quantising, say: Say
) -> Iterator[dict[str, Rounded]]:
    """Every weight for what it reads while the model runs over texts."""
    limit = model.checkpoint.arch.max_position_embeddings
    if asked.window > limit:
        raise ValueError(f"--window {asked.window}: the model was made for {limit} tokens")
    texts = read_windows(load_codec(config), asked)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ops = configured_ops(config, device, torch.float32, config.kernels.threads)
    torch.set_num_threads(config.kernels.threads)
    say(f"{len(texts)} texts of {asked.window} tokens, on {device}")
    checkpoint = model.checkpoint
    return quantised_layers(
        checkpoint.arch,
        checkpoint.stored,
        Place(ops, torch.float32, device),
        texts,
        lambda name, weight, inputs: round_for_inputs(
            _finite(weight, name), _finite(inputs, f"what {name} reads"), model.grids[name]
        ),
    )


def _finite(numbers: Tensor, what: str) -> Tensor:
    if not numbers.isfinite().all():
        raise ValueError(f"{what} has numbers that are infinite or not a number")
    return numbers


def read_windows(codec: ChatCodec, asked: Quantising) -> list[list[int]]:
    """The text in token ids, cut into windows. ValueError if it is shorter than one window."""
    path = asked.text or sample_file("conversations.jsonl")
    if asked.text is None:
        ids = [token for each in _conversations(codec, path) for token in each]
    else:
        ids = codec.tokenizer.encode(read_text(path), False)
    starts = range(0, len(ids) - asked.window + 1, asked.window)
    if not starts:
        raise ValueError(f"{path} has {len(ids)} tokens; a window takes {asked.window}")
    return [ids[start : start + asked.window] for start in starts[: asked.max_windows]]


def _conversations(codec: ChatCodec, path: Path) -> Iterator[list[int]]:
    """Each as the chat endpoint would write it; of a model without a template, its texts."""
    for each in read_conversations(path):
        assert isinstance(each, Conversation)
        if codec.tokenizer.chat_template is not None:
            yield codec.encode(each.messages, False)
        else:
            texts = [message["content"] for message in each.messages]
            yield codec.tokenizer.encode("\n\n".join(texts), True)


def _write_weights(
    model: Model, layers: Iterator[dict[str, Rounded]], folder: Path, say: Say
) -> None:
    checkpoint, writer = model.checkpoint, ShardWriter(folder)
    for name in expected_tensors(checkpoint.arch):
        if name not in model.grids:
            tensor = dense(checkpoint.stored(name)[:])
            writer.put({name: tensor.to(KEPT) if model.files.kind == "gguf" else tensor})
    for index, layer in enumerate(layers):
        for name, rounded in layer.items():
            stem = name.removesuffix(".weight")
            parts = stored_parts(rounded, model.grids[name])
            writer.put({f"{stem}.{end}": tensor for end, tensor in parts.items()})
        say(f"layer {index + 1} of {checkpoint.arch.num_layers}")
    writer.close()


def _write_others(model: Model, form: Form, folder: Path) -> None:
    """config.json, and the files that the model has besides weights."""
    source = model.files.path
    if model.files.kind == "gguf":
        config = _gguf_config(model.checkpoint)
        write_tokenizer(read_gguf(source).metadata, folder)
    else:
        config = read_json(source / "config.json")
        for file in {file for pattern in COPIED for file in source.glob(pattern)}:
            if file.is_file() and file.name not in WRITTEN:
                shutil.copyfile(file, folder / file.name)
    grids = {name.removesuffix(".weight"): grid for name, grid in model.grids.items()}
    config["quantization_config"] = quantization_config(form, grids, [LM_HEAD])
    write_json(folder / "config.json", config)


def _gguf_config(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        **layers_json(checkpoint.arch),
        "tie_word_embeddings": checkpoint.arch.tie_word_embeddings,
        "torch_dtype": str(KEPT).removeprefix("torch."),
        "bos_token_id": checkpoint.bos_token_id,
        "eos_token_id": sorted(checkpoint.eos_token_ids),
    }
