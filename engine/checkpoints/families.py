"""Which architectures are known, and what each configuration says of its text model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.checkpoints.arch import ARCHITECTURE, LlamaArch
from engine.checkpoints.config_values import Json
from engine.checkpoints.llama4_arch import Llama4Arch

MODEL_TYPES = {"llama": ARCHITECTURE, "llama4_text": "Llama4ForCausalLM"}
MODEL_TYPES["llama4"] = "Llama4ForConditionalGeneration"
OUTER_KEYS = ("bos_token_id", "eos_token_id", "quantization_config")


@dataclass(frozen=True, slots=True)
class TextModel:
    """The part of a model that is served."""

    arch: LlamaArch
    config: Json  # its keys
    prefix: str = ""  # of its tensors' names
    skipped: tuple[str, ...] = ()  # prefixes of tensors of other parts


def read_text_model(config: Json) -> TextModel:
    """Read a config.json. ValueError for unknown architectures, and for what would need other
    arithmetic."""
    name = _architecture(config)
    if name not in FAMILIES:
        known = ", ".join(map(str, FAMILIES))
        raise ValueError(f"architecture {name} is not supported; {known} are")
    return FAMILIES[name](config)


def _architecture(config: Json) -> object:
    """transformers leaves the name out of models that were never saved."""
    names = config.get("architectures")
    if names is None:
        kind = config.get("model_type")
        return MODEL_TYPES.get(str(kind), kind)
    return names[0] if len(names) == 1 else list(names) or config.get("model_type")


def _llama(config: Json) -> TextModel:
    return TextModel(LlamaArch.from_hf_config(config), config)


def _llama4(config: Json) -> TextModel:
    return TextModel(Llama4Arch.from_hf_config(config), config)


def _llama4_with_images(config: Json) -> TextModel:
    """Of a model for text and images, only what computes text."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise ValueError("text_config is missing: a model for images only cannot be served")
    outer = {key: config[key] for key in OUTER_KEYS if config.get(key) is not None}
    return TextModel(
        Llama4Arch.from_hf_config({**text, **outer}),
        {**text, **outer},
        prefix="language_model.",
        skipped=("vision_model.", "multi_modal_projector."),
    )


FAMILIES: dict[object, Callable[[Json], TextModel]] = {
    ARCHITECTURE: _llama,
    "Llama4ForCausalLM": _llama4,
    "Llama4ForConditionalGeneration": _llama4_with_images,
}
