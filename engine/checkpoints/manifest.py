"""Which tensors a Llama checkpoint must hold, under their Hugging Face names."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from engine.checkpoints.arch import LlamaArch, Shape

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
MAX_NAMED = 5  # tensors listed in one message

logger = logging.getLogger(__name__)


def expected_tensors(arch: LlamaArch) -> dict[str, Shape]:
    """Name -> shape, in the order in which a forward pass uses them. Linear weights are
    [out, in]; a tied model has no lm_head."""
    tensors: dict[str, Shape] = {EMBEDDING: (arch.vocab_size, arch.hidden_size)}
    for index in range(arch.num_layers):
        for name, shape in arch.layer_tensors(index).items():
            tensors[f"model.layers.{index}.{name}"] = shape
    tensors["model.norm.weight"] = (arch.hidden_size,)
    if not arch.tie_word_embeddings:
        tensors[LM_HEAD] = (arch.vocab_size, arch.hidden_size)
    return tensors


def check_manifest(arch: LlamaArch, found: Mapping[str, Shape], origin: object) -> None:
    """Raise ValueError unless `found` holds exactly the tensors of `arch`; extra tensors that the
    model computes itself are allowed. `origin` is the file or folder to name."""
    expected = expected_tensors(arch)
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(f"{origin}: missing tensor {listed(missing)}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(
                f"{origin}: tensor {name} has shape {list(found[name])}, "
                f"the configuration asks for {list(shape)}"
            )
    extra = [name for name in found if name not in expected]
    unknown = [name for name in extra if not _is_harmless(name, arch)]
    if unknown:
        raise ValueError(f"{origin}: unexpected tensor {listed(unknown)}")
    if extra:
        logger.info("%s: ignoring %s, which the model computes itself", origin, listed(extra))


def _is_harmless(name: str, arch: LlamaArch) -> bool:
    """Rotary tables are recomputed; a tied head repeats the embedding."""
    tied_head = arch.tie_word_embeddings and name == LM_HEAD
    return tied_head or name.endswith("rotary_emb.inv_freq")


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
