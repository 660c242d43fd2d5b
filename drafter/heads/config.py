"""The shape of a draft head, read strictly from the config.json of the published layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from configs.schema import AuxLayers
from engine.checkpoints.arch import ARCHITECTURE, LlamaArch
from engine.step.taps import LAST_OUTPUT

Json = Mapping[str, Any]
Kind = Literal["eagle", "eagle3", "peagle", "dflash"]
T = TypeVar("T", int, bool)

# Names used by the reference, SGLang, SpecForge, NVIDIA, vLLM (old: EAGLEModel, with the layers'
# configuration in `model`) and speculators. Files of the
# reference call both kinds LlamaForCausalLM; only EAGLE-3 files have the keys below.
EAGLE_ARCHITECTURES = frozenset(
    {
        ARCHITECTURE,
        "LlamaForCausalLMEagle",
        "EagleLlamaForCausalLM",
        "EagleSpeculator",
        "EAGLEModel",
    }
)
EAGLE3_ARCHITECTURES = frozenset(
    {"LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel"}
)
EAGLE3_KEYS = ("draft_vocab_size", "eagle_config")
FC_BIAS_KEYS = ("fusion_bias", "eagle_fc_bias", "bias")
AUX_IDS = "eagle_aux_hidden_state_layer_ids"
DEFAULT_AUX = 3  # target layers that are read if the file names none

# Heads that draft several tokens at once. vLLM's layout of P-EAGLE is that of EAGLE-3 with these
# keys; DFlash heads of z-lab keep theirs in `dflash_config`.
MASK_IDS = ("mask_token_id", "ptd_token_id")
DFLASH_ARCHITECTURES = frozenset({"DFlashDraftModel", "DFlashSpeculator"})
DFLASH_KEYS = ("mask_token_id", "target_layer_ids", "block_size", "num_target_layers", "causal")
MOST_AT_ONCE = 61  # tokens: one mask of 64 bits names them, the root and what is before it
# Families of such heads that are not implemented: what their names or keys contain
OTHERS: dict[str, str] = {
    "dspark": "DSpark",
    "markov_rank": "DSpark",
    "dflash2": "DFlash 2",
    "selector_rank": "DFlash 2",
    "domino": "Domino",
    "projector_type": "Domino or DSpark",
}
# Options of some heads, with the only value that is implemented here.
ONLY = {
    "layernorms": False,
    "add_para_norm": False,
    "skip_prenorm": True,
    "skip_output_norm": True,
    "use_qk_norm": False,
    "use_mtp_layernorm": False,
    "parallel_draft_step": 1,
}


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """Everything about a head except its weights and its target.

    `arch` describes its decoder layers as a small Llama. Its `vocab_size` is the target's. Its
    `rope_theta` is the file's (10000 if the file has none, as in the reference) and may differ from
    the target's.
    """

    kind: Kind
    arch: LlamaArch
    draft_vocab_size: int  # rows of the LM head
    target_hidden_size: int
    fc_bias: bool | None = None  # None: there is one if the file holds `fc.bias`
    norm_before_residual: bool = False  # EAGLE-3: the residual starts after `hidden_norm`
    # EAGLE-3: target layers whose input is read; their number means the output of the last one
    aux_layers: tuple[int, ...] | None = None
    use_aux: bool = True  # False, EAGLE-3: reads the final norm's output instead, without `fc`
    norm_before_fc: bool = False  # EAGLE-3: one norm over all that `fc` reads
    fc_norm: bool = False  # EAGLE-3: a norm for each layer that `fc` reads
    norm_output: bool = False  # EAGLE-3: the next entry's feature is the output of the final norm
    # Heads that draft in parallel: the token that stands for those to be guessed
    mask_token_id: int | None = None
    block_size: int | None = None  # DFlash: the root, and the tokens that are drafted after it

    def __post_init__(self) -> None:
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.arch.vocab_size:
            raise ValueError(
                f"mask_token_id {self.mask_token_id} must be 0 to {self.arch.vocab_size - 1}"
            )
        if self.block_size is not None and self.block_size < 2:
            raise ValueError(f"block_size {self.block_size} must be at least 2")
        if not 1 <= self.draft_vocab_size <= self.arch.vocab_size:
            raise ValueError(
                f"draft_vocab_size {self.draft_vocab_size} must be 1 to vocab_size "
                f"{self.arch.vocab_size}"
            )
        if self.target_hidden_size < 1:
            raise ValueError(
                f"target_hidden_size must be at least 1, not {self.target_hidden_size}"
            )
        if self.aux_layers is not None and not self.aux_layers:
            raise ValueError(f"{AUX_IDS} must name at least one layer")
        if not self.use_aux and self.target_hidden_size != self.arch.hidden_size:
            raise ValueError(
                f"use_aux_hidden_state false needs a hidden_size {self.arch.hidden_size} equal to "
                f"target_hidden_size {self.target_hidden_size}"
            )

    @classmethod
    def from_json(cls, config: Json, aux: AuxLayers = "auto") -> HeadConfig:
        """Read a config.json; `aux`: what the ids of target layers mean, or these layers.
        ValueError for an option that is not implemented."""
        _refuse_others(config)
        kind = _kind(config)
        if kind == "dflash":
            return cls(**_dflash(config, aux))
        _refuse_unsupported(config)
        layers = _layers(config)
        _refuse_unsupported(layers)
        arch = LlamaArch.from_hf_config({**layers, "architectures": [ARCHITECTURE]})
        if kind == "eagle":
            _refuse_aux(aux, "an EAGLE head reads the final hidden state only")
            return cls(kind, arch, arch.vocab_size, arch.hidden_size, fc_bias=_fc_bias(config))
        return cls(
            kind,
            arch,
            draft_vocab_size=_typed(config, "draft_vocab_size", arch.vocab_size),
            target_hidden_size=_typed(config, "target_hidden_size", arch.hidden_size),
            norm_before_residual=_option(
                config, "norm_before_residual", kind == "eagle3" and _is_speculators(config)
            ),
            aux_layers=_aux_layers(config, aux),
            use_aux=_option(config, "use_aux_hidden_state", True),
            norm_before_fc=_option(config, "norm_before_fc", False),
            fc_norm=_option(config, "fc_norm", False),
            norm_output=_option(config, "norm_output", False),
            mask_token_id=_mask_token(config) if kind == "peagle" else None,
        )

    @property
    def like_eagle3(self) -> bool:
        """Whether it has the layers of an EAGLE-3 head."""
        return self.kind in ("eagle3", "peagle")

    @property
    def max_depth(self) -> int | None:
        """How many tokens it can draft after a root; None: any number, one after the other."""
        if self.kind == "dflash":
            assert self.block_size is not None
            return min(self.block_size - 1, MOST_AT_ONCE)
        return MOST_AT_ONCE if self.kind == "peagle" else None

    @property
    def feature_size(self) -> int:
        """Width of the target's features [C, feature_size] that `fc` reads."""
        return self.target_hidden_size * self.num_taps

    @property
    def num_taps(self) -> int:
        """How many hidden states of the target an entry is made from."""
        if self.kind == "eagle" or not self.use_aux:
            return 1
        return DEFAULT_AUX if self.aux_layers is None else len(self.aux_layers)

    @property
    def guesses_taps(self) -> bool:
        """Whether the configuration leaves open which target layers the head reads."""
        return self.like_eagle3 and self.use_aux and self.aux_layers is None

    def tap_layers(self, target: LlamaArch) -> tuple[int, ...]:
        """Places in the target that the head reads (see `engine.step.taps`)."""
        if self.kind == "eagle" or not self.use_aux:
            return (target.num_layers,)
        layers = self.aux_layers
        if layers is None:
            layers = (2, target.num_layers // 2, target.num_layers - 3)
        if self.kind == "dflash" and target.num_layers in layers:
            raise ValueError(
                f"the head reads the output of the target's last layer {target.num_layers - 1}; "
                "layouts of DFlash differ in whether that is before or after the final norm"
            )
        for layer in layers:
            if not 0 <= layer <= target.num_layers:
                raise ValueError(
                    f"the head reads the input of target layers {list(layers)}; "
                    f"this target has layers 0 to {target.num_layers - 1}"
                )
        return tuple(LAST_OUTPUT if k == target.num_layers else k for k in layers)


def _kind(config: Json) -> Kind:
    declared, names = config.get("speculators_model_type"), config.get("architectures") or []
    for kind in ("eagle", "peagle", "dflash"):
        if declared == kind:
            return kind
    if declared == "eagle3":
        return _eagle3_or_parallel(config)
    if declared is None and len(names) == 1:
        if names[0] in DFLASH_ARCHITECTURES:
            return "dflash"
        if names[0] in EAGLE3_ARCHITECTURES:
            return _eagle3_or_parallel(config)
        if names[0] in EAGLE_ARCHITECTURES:
            has_keys = any(config.get(key) is not None for key in EAGLE3_KEYS)
            has_keys = has_keys and names[0] == ARCHITECTURE
            return _eagle3_or_parallel(config) if has_keys else "eagle"
    known = EAGLE_ARCHITECTURES | EAGLE3_ARCHITECTURES | DFLASH_ARCHITECTURES
    raise ValueError(
        f"draft head {declared or list(names) or config.get('model_type')} is not supported; "
        f"{', '.join(sorted(known))} are"
    )


def _eagle3_or_parallel(config: Json) -> Kind:
    """vLLM's P-EAGLE heads differ from EAGLE-3 heads by what they say of masked tokens."""
    if config.get("dflash_config") is not None:
        raise ValueError("dflash_config belongs to DFlashDraftModel, not to an EAGLE-3 head")
    masked = any(config.get(key) is not None for key in MASK_IDS)
    return "peagle" if masked or config.get("parallel_drafting") is True else "eagle3"


def _refuse_others(config: Json) -> None:
    """Heads of families that would need other arithmetic."""
    names = [config.get("speculators_model_type"), *(config.get("architectures") or [])]
    tables = (config, _table(config, "eagle_config"), _table(config, "dflash_config"))
    said = [str(name).lower().replace("-", "").replace("_", "") for name in names]
    said += [key for table in tables for key, value in table.items() if value]
    for mark, family in OTHERS.items():
        if any(mark in each for each in said):
            raise ValueError(
                f"{family} heads are not supported; EAGLE, EAGLE-3, P-EAGLE and DFlash heads are"
            )


def _mask_token(config: Json) -> int:
    found = {key: config[key] for key in MASK_IDS if config.get(key) is not None}
    if not found:
        raise ValueError(
            "a P-EAGLE head needs mask_token_id (or ptd_token_id), the token that stands for those "
            "to be guessed"
        )
    if len(set(map(str, found.values()))) > 1:
        raise ValueError(f"{found} must be the same token")
    return _typed(found, next(iter(found)), 0)


def _dflash(config: Json, aux: AuxLayers) -> dict[str, Any]:
    """The fields of a DFlash head. z-lab lists layers whose output is read, speculators layers
    whose input is read."""
    own, layers = _table(config, "dflash_config"), _layers(config)
    unknown = sorted(set(own) - set(DFLASH_KEYS))
    if unknown:
        raise ValueError(f"dflash_config has {unknown}; {', '.join(DFLASH_KEYS)} are supported")
    for table, key in ((own, "causal"), (config, "sample_from_anchor")):
        if _typed(table, key, False):
            raise ValueError(f"{key} true is not supported for DFlash heads; false is")
    if layers.get("model_type", "qwen3") not in ("qwen3", "llama"):
        raise ValueError(f"model_type {layers['model_type']!r} is not supported; 'qwen3' is")
    if layers.get("quantization_config") is not None:
        raise ValueError("heads of quantised weights are not supported; F32, F16, BF16 are")
    arch = LlamaArch.from_hf_config({**layers, "architectures": [ARCHITECTURE]})
    width = _typed(config, "target_hidden_size", arch.hidden_size)
    if width != arch.hidden_size:
        raise ValueError(f"target_hidden_size {width} must be hidden_size {arch.hidden_size}")
    return {
        "kind": "dflash",
        "arch": arch,
        "draft_vocab_size": _typed(config, "draft_vocab_size", arch.vocab_size),
        "target_hidden_size": width,
        "fc_bias": False,
        "aux_layers": _dflash_layers(config, aux),
        "mask_token_id": _needed(config, own, "mask_token_id"),
        "block_size": _needed(config, own, "block_size"),
    }


def _dflash_layers(config: Json, aux: AuxLayers) -> tuple[int, ...]:
    if isinstance(aux, tuple):
        return aux
    _refuse_aux(aux, "DFlash heads say themselves what their ids mean")
    outputs = _ids(_table(config, "dflash_config").get("target_layer_ids"), "target_layer_ids")
    inputs = _ids(config.get("aux_hidden_state_layer_ids"), "aux_hidden_state_layer_ids")
    if (outputs is None) == (inputs is None):
        raise ValueError(
            "a DFlash head needs either dflash_config.target_layer_ids or "
            "aux_hidden_state_layer_ids, which name the target layers that it reads"
        )
    return inputs or tuple(layer + 1 for layer in outputs or ())


def _needed(config: Json, own: Json, key: str) -> int:
    """An integer at the top level or in `dflash_config`."""
    for table in (own, config):
        if table.get(key) is not None:
            return _typed(table, key, 0)
    raise ValueError(f"a DFlash head needs {key}")


def _is_speculators(config: Json) -> bool:
    """vLLM takes an absent `norm_before_residual` of this layout for true, of others for false."""
    return config.get("speculators_model_type") is not None


def _refuse_aux(aux: AuxLayers, reason: str) -> None:
    if aux != "auto":
        said = list(aux) if isinstance(aux, tuple) else aux
        raise ValueError(f"speculation.aux_layers is {said!r}, but {reason}; 'auto' is possible")


def _layers(config: Json) -> Json:
    """The part that describes decoder layers; speculators and old vLLM nest it in a key."""
    if config.get("speculators_model_type") is None:
        return config if config.get("model") is None else _table(config, "model")
    if config.get("transformer_layer_config") is None:
        raise ValueError("transformer_layer_config is missing")
    return _table(config, "transformer_layer_config")


def _refuse_unsupported(config: Json) -> None:
    if config.get("model_type", "llama") not in ("llama", "eagle", "eagle3", "speculator_model"):
        raise ValueError(f"model_type {config['model_type']!r} is not supported; 'llama' is")
    for key, value in ONLY.items():
        for table in (config, _table(config, "eagle_config")):
            if table.get(key, value) not in (None, value):
                raise ValueError(f"{key} {table[key]!r} is not supported; {value} is")
    if config.get("quantization_config") is not None:
        raise ValueError("heads of quantised weights are not supported; F32, F16, BF16 are")
    size = config.get("vocab_size", _table(config, "model").get("vocab_size"))
    if config.get("truncated_vocab_size", size) not in (None, size):
        found = config["truncated_vocab_size"]
        raise ValueError(f"truncated_vocab_size {found!r} is not supported; vocab_size {size} is")


def _fc_bias(config: Json) -> bool | None:
    for key in FC_BIAS_KEYS:
        if config.get(key) is not None:
            return _typed(config, key, False)
    return None


def _aux_layers(config: Json, aux: AuxLayers) -> tuple[int, ...] | None:
    """The layers whose inputs are read, if they are named, as many as the file says."""
    if not _option(config, "use_aux_hidden_state", True):
        _refuse_aux(aux, "this head reads the final hidden state only")
    layers, wanted = _chosen_layers(config, aux), _typed(config, "num_aux_hidden_states", 0)
    found = DEFAULT_AUX if layers is None else len(layers)
    if wanted not in (0, found):
        named = "names none" if layers is None else f"names {found}"
        raise ValueError(f"num_aux_hidden_states is {wanted}, but {AUX_IDS} {named}")
    return layers


def _chosen_layers(config: Json, aux: AuxLayers) -> tuple[int, ...] | None:
    if aux == "auto":
        return _named_layers(config)
    if isinstance(aux, tuple):
        return aux
    named = _ids(config.get(AUX_IDS)) or _ids(_table(config, "eagle_config").get(AUX_IDS))
    if named is None:
        raise ValueError(
            f"speculation.aux_layers is {aux!r}, but the head names no layers ({AUX_IDS}); 'auto' "
            "and a list are possible"
        )
    return tuple(layer + 1 for layer in named) if aux == "outputs" else named


def _named_layers(config: Json) -> tuple[int, ...] | None:
    """vLLM and speculators list layers whose input is read, at the top level; NVIDIA and SGLang
    list layers whose output is read, in `eagle_config`."""
    inputs = _ids(config.get(AUX_IDS))
    outputs = _ids(_table(config, "eagle_config").get(AUX_IDS))
    if outputs is None:
        return inputs
    after = tuple(layer + 1 for layer in outputs)
    if inputs not in (None, after):
        raise ValueError(
            f"{AUX_IDS} names inputs of layers {list(inputs or ())}, eagle_config names outputs of "
            f"{list(outputs)}; they must name the same tensors"
        )
    return after


def _ids(value: object, key: str = AUX_IDS) -> tuple[int, ...] | None:
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise ValueError(f"{key} must be a list of layer numbers, not {value!r}")
    return tuple(value)


def _table(config: Json, key: str) -> Json:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} must be a table, not {value!r}")
    return value


def _option(config: Json, key: str, default: bool) -> bool:
    """An option at the top level or, as NVIDIA writes some, in `eagle_config`."""
    return _typed(config, key, _typed(_table(config, "eagle_config"), key, default))


def _typed(config: Json, key: str, default: T) -> T:
    value = config.get(key)
    if value is None:
        return default
    if type(value) is not type(default):
        raise ValueError(f"{key} must be {type(default).__name__}, not {value!r}")
    return value
