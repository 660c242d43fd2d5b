"""The configuration of `aerie train-draft`: frozen, every key checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from configs.resolve import HostCacheDirConfig, HostKernelsConfig
from configs.schema import (
    CacheDirConfig,
    Integer,
    KernelsConfig,
    ModelConfig,
    Number,
    Positive,
    Section,
)

TRAIN = "train"  # folder of configs/ with the files for `aerie train-draft`
SAMPLE = "sample"  # written instead of a file: the conversations that ship with Aerie
CLOCK_KEYS = ("rows", "answering")  # of data; for runs with run.minutes
FEATURE_KINDS = ("eagle", "dense")  # learn the target's features, as in EAGLE-1 and 2508.08192
FEATURE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "head": {"init": "random"},
    "loss": {"tokens": 0.1, "features": 1.0, "feature_noise": 0.1},
}


class DataConfig(Section):
    """What the head learns from."""

    conversations: tuple[Path, ...] = Field(
        (),
        description="JSONL files of conversations with answers, or of captured token ids; "
        f"{SAMPLE}: the conversations that ship with Aerie",
    )
    prompts: tuple[Path, ...] = Field(
        (), description="JSONL files of prompts; the target answers them before training"
    )
    limit: Positive | None = Field(None, description="prompts to answer; default: all")
    max_new_tokens: Positive = Field(256, description="limit of a generated answer")
    max_tokens: Positive = Field(1024, description="limit of one example; the rest is cut off")
    rows: Positive | None = Field(
        None, description="run.minutes: answers that are written at the same time; default: 1024"
    )
    answering: Number | None = Field(
        None, gt=0, lt=1, description="run.minutes: share of the time for answers; default: 0.5"
    )
    held_out: Positive = Field(64, description="examples kept from training, to measure the head")
    measure_on: tuple[Path, ...] = Field(
        (), description="files like data.conversations to measure the head on; replaces held_out"
    )
    cache_dir: Path | None = Field(
        None, description="keep the target's features here after the first epoch; null: recompute"
    )
    cache_bytes: Positive = Field(
        8_000_000_000, description="limit of the feature cache; what does not fit is recomputed"
    )


class HeadSettings(Section):
    """Shape of the head."""

    kind: Literal["eagle3", "peagle", "eagle", "dense"] = Field(
        "eagle3",
        description="peagle: P-EAGLE, which drafts all tokens at once; eagle: EAGLE-1/2; dense: "
        "several ordinary layers, arXiv:2508.08192",
    )
    num_layers: Positive = 1
    draft_vocab_size: Positive | None = Field(
        None, description="eagle3: the target's most used tokens; default: its whole vocabulary"
    )
    intermediate_size: Positive | None = Field(None, description="default: the target's")
    aux_layers: tuple[Integer, ...] | None = Field(
        None, description="eagle3: target layers whose input is read; default: low, middle, high"
    )
    mask_token_id: Integer | None = Field(
        None,
        ge=0,
        description="peagle: stands for tokens to be guessed, and is none that texts hold; "
        "default: the last of the vocabulary",
    )
    init: str = Field(
        "target",
        description="first weights: target, that is from its last layers (eagle3); random (default "
        "of the other kinds); or a published head to train further, a directory or the name of "
        "one that ships, which may have fewer layers (eagle3); a peagle head can begin from an "
        "EAGLE-3 head",
    )


class LossConfig(Section):
    """The training loss."""

    unroll_steps: Positive = Field(5, description="tokens drafted ahead, on the head's own states")
    decay: Number = Field(0.8, gt=0, le=1, description="factor of the weight from step to step")
    kind: Literal["cross_entropy", "acceptance", "lk", "top_k"] = Field(
        "cross_entropy",
        description="how the head's distribution q is held to the target's p. cross_entropy; "
        "acceptance: -log of the sum of min(p, q), the share of drafts that sampling accepts; lk: "
        "cross-entropy that passes into that share (arXiv:2602.23881); top_k: cross-entropy with "
        "the target's likeliest tokens alone",
    )
    eta: Number = Field(3.0, gt=0, description="lk: how early it turns to the accepted share")
    top_k: Positive = Field(16, description="top_k: how many of the target's tokens count")
    tokens: Number = Field(
        1.0, ge=0, description="weight of that loss for each token; eagle, dense: 0.1"
    )
    features: Number = Field(0.0, ge=0, description="smooth L1 to its features; eagle, dense: 1.0")
    feature_noise: Number = Field(
        0.0, ge=0, description="uniform noise +-x on input features; eagle, dense: 0.1"
    )


class OptimizerConfig(Section):
    """AdamW, or Muon for matrices, with linear warm-up and cosine decay."""

    matrices: Literal["adamw", "muon"] = Field(
        "adamw", description="optimizer of the matrices of `fc` and layers; AdamW has the rest"
    )
    muon_factor: Number = Field(2.0, gt=0, description="Muon's learning rate divided by AdamW's")
    learning_rate: Number = Field(1e-3, gt=0)
    final_share: Number = Field(0.05, ge=0, le=1, description="of the rate, at the end")
    warmup_steps: Integer = Field(100, ge=0)
    weight_decay: Number = Field(0.01, ge=0)
    beta1: Number = Field(0.9, ge=0, lt=1)
    beta2: Number = Field(0.95, ge=0, lt=1)
    max_norm: Number = Field(0.5, gt=0, description="gradients are clipped to this norm")


class RunConfig(Section):
    """Length, batch size and output of a run."""

    output: Path = Field(Path("draft-head"), description="folder of the run")
    steps: Positive = Field(1000, description="optimizer steps")
    batch_tokens: Positive = Field(4096, description="tokens of one batch, with padding")
    accumulation: Positive = Field(1, description="batches per optimizer step and process")
    precision: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="type of matrix products; weights and sums are float32"
    )
    fused: Literal["auto", "off"] = Field(
        "auto",
        description="auto: on a GPU, Triton kernels compute the head's attention and loss, over "
        "texts without padding; off: plain torch",
    )
    seed: Integer = Field(0, ge=0)
    log_every: Positive = 10
    evaluate_every: Positive = 200
    checkpoint_every: Positive = 100
    keep_checkpoints: Positive = 2
    max_seconds: Positive | None = Field(
        None, description="stop after this time, resumable; the schedule still follows `steps`"
    )
    minutes: Number | None = Field(
        None,
        gt=0,
        description="the whole run, answers to data.prompts included, ends within this time; the "
        "schedule follows the clock instead of `steps`, and the run cannot be resumed",
    )


class SourceConfig(Section):
    """Where training text comes from."""

    name: str
    url: str
    licence: str
    use: str = Field(description="what was used of it, and how much")


class CardConfig(Section):
    """Content of the published head's model card."""

    name: str = Field("draft head", description="name of the head")
    target: str | None = Field(None, description="hub id of the target; default: model.source")
    summary: str = "An EAGLE draft head for speculative decoding, trained with `aerie train-draft`."
    licence: str = Field("unknown", description="SPDX name of the weights' licence")
    sources: tuple[SourceConfig, ...] = ()


class TrainingConfig(Section):
    """All settings of `aerie train-draft`."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    head: HeadSettings = HeadSettings()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunConfig = RunConfig()
    card: CardConfig = CardConfig()
    kernels: KernelsConfig = KernelsConfig()
    files: CacheDirConfig = CacheDirConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_by_kind(cls, tree: Any) -> Any:
        head = tree.get("head") if isinstance(tree, Mapping) else None
        kind = head.get("kind") if isinstance(head, Mapping) else getattr(head, "kind", None)
        if kind not in FEATURE_KINDS:
            return tree
        filled = dict(tree)
        for section, defaults in FEATURE_DEFAULTS.items():
            given = filled.get(section, {})
            if isinstance(given, Mapping):
                filled[section] = {**defaults, **given}
        return filled

    @model_validator(mode="after")
    def _fits(self) -> TrainingConfig:
        if not self.data.conversations and not self.data.prompts:
            raise ValueError("data.conversations or data.prompts must name at least one file")
        if self.data.limit is not None and not self.data.prompts:
            raise ValueError(
                f"data.limit {self.data.limit} is for data.prompts, of which there are none; "
                "data.conversations are read whole"
            )
        if self.run.minutes is not None:
            self._check_clock()
        for key in CLOCK_KEYS:
            if self.run.minutes is None and getattr(self.data, key) is not None:
                raise ValueError(f"data.{key} is for runs with run.minutes, which is not set")
        if not self.loss.tokens and not self.loss.features:
            raise ValueError("loss.tokens and loss.features are both 0: nothing would be learnt")
        if self.head.kind not in ("eagle3", "peagle"):
            self._check_no_eagle3_keys()
        if self.head.kind != "peagle" and self.head.mask_token_id is not None:
            raise ValueError(
                f"head.mask_token_id is for peagle heads; head.kind is {self.head.kind!r}"
            )
        return self

    def _check_clock(self) -> None:
        data = self.data
        for key, value in (
            ("data.conversations", data.conversations),
            ("data.measure_on", data.measure_on),
            ("data.cache_dir", data.cache_dir),
            ("run.max_seconds", self.run.max_seconds),
        ):
            if value:
                raise ValueError(
                    f"run.minutes trains on answers to data.prompts alone: unset {key}"
                )
        if data.max_new_tokens >= data.max_tokens:
            raise ValueError(
                f"data.max_new_tokens {data.max_new_tokens} must be below data.max_tokens "
                f"{data.max_tokens}, so that prompts have room"
            )

    def _check_no_eagle3_keys(self) -> None:
        kind = self.head.kind
        for key in ("draft_vocab_size", "aux_layers"):
            if getattr(self.head, key) is not None:
                raise ValueError(
                    f"head.{key} is for eagle3 and peagle heads; head.kind is {kind!r}"
                )
        if self.head.init == "target":
            raise ValueError(
                f"head.init 'target' is for eagle3 and peagle heads; head.kind is {kind!r}"
            )


class HostTrainingConfig(TrainingConfig):
    """What this machine decides is known."""

    kernels: HostKernelsConfig
    files: HostCacheDirConfig
