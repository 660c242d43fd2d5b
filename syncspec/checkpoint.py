"""Trained models in safetensors files, one for each category."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from syncspec.network import Design, build
from syncspec.shapes import Category
from syncspec.training import Model

FORM = "syncspec-2"


def save(model: Model, path: Path) -> None:
    """Weights as tensors; design, category and task as JSON in the metadata."""
    told = {
        "category": asdict(model.category),
        "design": asdict(model.design),
        "task": model.task,
    }
    state = model.network.state_dict()
    weights = {f"network.{name}": value.cpu() for name, value in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {**weights, "mean": model.mean.cpu(), "deviation": model.deviation.cpu()},
        path,
        metadata={"form": FORM, "model": json.dumps(told)},
    )


def load(path: Path) -> Model:
    """The model of a file.

    Raises:
        ValueError: no such file, or one that `save` did not write.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; `syncspec train` writes CATEGORY.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    if metadata.get("form") != FORM:
        raise ValueError(
            f"{path} has form {metadata.get('form')!r}; it must be {FORM!r}: train it again"
        )
    told = json.loads(metadata["model"])
    kind = told["category"]
    category = Category(kind["name"], tuple(kind["parts"]), tuple(kind["keypoints"]))
    sizes = told["design"]
    design = Design(**{**sizes, "dilations": tuple(sizes["dilations"])})
    names = category.parts if told["task"] == "parts" else category.keypoints
    network = build(len(names), design)
    prefix = "network."
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    network.load_state_dict(weights)
    network.eval()
    return Model(category, design, told["task"], network, tensors["mean"], tensors["deviation"])
