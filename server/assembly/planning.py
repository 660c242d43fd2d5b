"""Predicts what a configuration needs and does on GPUs, from configuration files alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast, get_args

import torch

from configs.load import ConfigError
from configs.planning import (
    Gpu,
    load_calibration,
    load_gpu,
    shipped_gpus,
    shipped_heads,
    shipped_models,
)
from configs.resolve import HostConfig, ModelFacts, context_length, resolve_model
from drafter.checkpoint import read_head_config
from drafter.heads.config import HeadConfig
from drafter.source import resolve_draft
from drafter.train.history import write_whole
from drafter.train.results.chart import LineChart
from engine.checkpoints.checkpoint import read_arch, read_json
from engine.checkpoints.source import BUNDLED_ALIAS, config_folder
from engine.kv.storage import SCRATCH_BLOCKS, bytes_per_block
from engine.models.footprint import step_bytes
from engine.parallel.shard import Shard, check_degree, kv_copies
from kernels.linear.scaled import FP8
from server.assembly.drafting import AUTO, tree_shape
from server.assembly.operations import torch_dtype
from server.planning.acceptance import Acceptance
from server.planning.costs import Machine
from server.planning.formats import Format, PartFormats, format_named
from server.planning.memory import MemoryPlan, check_fit, head_bytes, target_bytes
from server.planning.prediction import Prediction, Question, predict
from server.planning.products import HeadSizes
from server.planning.rounds import Deployment
from server.planning.sizes import ModelSizes

AssumedHead = Literal["eagle", "eagle3", "dense3"]
STORED = "stored"
DRAFT_VOCAB = 32000  # of published EAGLE-3 heads for Llama 3
ROUNDED_HERE = 0.5 + 4 / 32  # bytes of a weight in groups of 32 with a float16 scale and minimum
PLAIN = {"bfloat16": "bf16", "float32": "float32"}
LABELS = {"plain": "plain_ms", "with drafts": "ms_per_token"}


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What a deployment is asked."""

    gpu: str = "h100"
    gpu_bytes: int | None = None  # default: all memory of the GPU
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    context: int = 8192
    acceptance: float = 2.8
    weights: str = STORED
    head: AssumedHead | None = None  # instead of speculation.draft


@dataclass(frozen=True, slots=True)
class Shapes:
    """The sizes of a configuration's model and draft head."""

    target: ModelSizes
    head: HeadSizes | None


def plan(config: HostConfig, options: PlanOptions) -> Prediction:
    """Memory and time of `config`. Reads config.json of the model and its head, no weights.

    Raises:
        FileNotFoundError: the model or its draft head has no config.json.
        ValueError: an unknown GPU or format, a model that does not fit or cannot be cut.
    """
    _check_can_be_timed(config)
    gpu = load_gpu(options.gpu)
    shapes = read_shapes(config, options)
    if options.context > shapes.target.max_positions:
        raise ValueError(
            f"--context {options.context}: the model was made for {shapes.target.max_positions} "
            "tokens"
        )
    memory = plan_memory(config, shapes, options.gpu_bytes or gpu.memory_bytes)
    asked = Question(
        options.batches,
        options.context,
        Acceptance.of_chain(options.acceptance),
        tuple(tree_shape(name) for name in _trees(config)),
    )
    return predict(_title(config, options), _deployment(config, gpu, shapes), memory, asked)


def _check_can_be_timed(config: HostConfig) -> None:
    if config.model.dtype != "bfloat16":
        raise ConfigError(f"model.dtype = {config.model.dtype} cannot be planned; bfloat16 can")
    if config.kernels.graphs == "off":
        raise ConfigError("kernels.graphs = off cannot be planned; auto can")
    if config.parallel.roles is not None:
        raise ConfigError(f"parallel.roles = {config.parallel.roles} cannot be planned; null can")


def _trees(config: HostConfig) -> tuple[str, ...]:
    chosen = config.speculation.tree
    return config.speculation.candidates if chosen == AUTO else (chosen,)


def _title(config: HostConfig, options: PlanOptions) -> str:
    ranks = config.parallel.tensor
    gpu = options.gpu.upper() if options.gpu in shipped_gpus() else Path(options.gpu).stem
    gpus = gpu if ranks == 1 else f"{ranks} x {gpu}"
    weights = "" if options.weights == STORED else f", {options.weights} weights"
    weights += ", fp8 cache" if config.cache.dtype == "fp8" else ""
    return f"{config.model.source} on {gpus}{weights}, context {options.context}"


def _deployment(config: HostConfig, gpu: Gpu, shapes: Shapes) -> Deployment:
    return Deployment(
        machine=Machine(gpu, load_calibration(), config.parallel.tensor),
        target=shapes.target,
        head=shapes.head,
        cache_bytes=_target_cache(config).itemsize,
        run_ahead=config.scheduler.run_ahead is not False,
    )


def read_shapes(config: HostConfig, options: PlanOptions) -> Shapes:
    """The sizes of the model and its head, cut over so many ranks."""
    ranks, plain = config.parallel.tensor, PLAIN[config.model.dtype]
    target = _target(config, plain).with_experts(config.parallel.experts)
    target = replace(target, formats=_target_formats(config, target.formats, plain))
    if options.weights != STORED:
        target = replace(target, formats=target.formats.with_linears(options.weights))
    target.check_ranks(ranks)
    found = _head_config(config, options, target)
    if found is None:
        return Shapes(target, None)
    head = head_sizes(found, target, replicated=config.speculation.draft_parallel == "replicated")
    if not head.replicated:
        check_degree(found.arch, ranks, "speculation.draft_parallel = sharded, parallel.tensor")
    formats = _head_formats(config, plain)
    return Shapes(target, replace(head, layers=replace(head.layers, formats=formats)))


def _target_formats(config: HostConfig, stored: PartFormats, plain: str) -> PartFormats:
    """As `model.weights` asks. ValueError for a form that GPUs do not read."""
    kept, form = format_named(plain), config.model.weights
    if form == "q8":
        raise ConfigError("model.weights = q8 is for CPUs; stored, plain and q4 can be planned")
    if form == "stored":
        return stored
    return PartFormats.all_in(kept if form == "plain" else _rounded_here(), kept)


def _rounded_here() -> Format:
    return replace(format_named("int4"), bytes_per_weight=ROUNDED_HERE)


def _head_formats(config: HostConfig, plain: str) -> PartFormats:
    """On a GPU: plain, but for what `speculation.draft_weights` puts into 4 bits. ValueError for a
    form that GPUs do not read."""
    kept, form = format_named(plain), config.speculation.draft_weights
    if form == "q8":
        raise ValueError("speculation.draft_weights = q8 is for CPUs; plain, q4 and q4_mlp can be")
    if form == "q4":
        return PartFormats.all_in(_rounded_here(), kept)
    formats = PartFormats.all_in(kept, kept)
    return replace(formats, dense=_rounded_here()) if form == "q4_mlp" else formats


def _target(config: HostConfig, plain: str) -> ModelSizes:
    """From a directory, from what ships for a hub id, or from the hub."""
    source, revision = config.model.source, config.model.revision
    if source == BUNDLED_ALIAS or source.endswith(".gguf"):
        return ModelSizes.of_arch(read_arch(source, revision))
    known = shipped_models()
    if source in known and revision is None and not Path(source).exists():
        path = known[source]
    else:
        path = config_folder(source, revision) / "config.json"
    content = read_json(path)
    try:
        return ModelSizes.from_config(content, plain)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _head_config(config: HostConfig, options: PlanOptions, target: ModelSizes) -> HeadConfig | None:
    if options.head is not None:
        return assumed_head(options.head, target)
    speculation = config.speculation
    known = shipped_heads().get(str(speculation.draft))
    if known is not None and not Path(str(speculation.draft)).exists():
        return read_head_config(known, target.arch, speculation.aux_layers)
    try:
        path = resolve_draft(speculation.draft, config.model.source, config_only=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}. To plan without its config.json, name its kind: --head eagle3"
        ) from error
    return None if path is None else read_head_config(path, target.arch, speculation.aux_layers)


def head_kind(name: str | None) -> AssumedHead | None:
    """A kind of head by its name. ValueError for an unknown one."""
    if name is not None and name not in get_args(AssumedHead):
        raise ValueError(f"--head {name!r}: known kinds are {', '.join(get_args(AssumedHead))}")
    return cast(AssumedHead | None, name)


def assumed_head(kind: AssumedHead, target: ModelSizes) -> HeadConfig:
    """A dense head with the target's widths: `eagle` and `eagle3` have one layer, `dense3` has the
    three of arXiv:2508.08192."""
    num_layers = 3 if kind == "dense3" else 1
    arch = replace(
        target.arch,
        num_layers=num_layers,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
    )
    if kind == "eagle3":
        draft_vocab = min(DRAFT_VOCAB, arch.vocab_size)
        return HeadConfig("eagle3", arch, draft_vocab, arch.hidden_size)
    return HeadConfig("eagle", arch, arch.vocab_size, arch.hidden_size)


def head_sizes(head: HeadConfig, target: ModelSizes, *, replicated: bool) -> HeadSizes:
    """Tensors that a head may share with the target count as shared."""
    arch, hidden, third = head.arch, head.arch.hidden_size, head.kind != "eagle"
    narrow = head.draft_vocab_size != arch.vocab_size
    norms = (2 * arch.num_layers - 1) * hidden  # layer 0 has none before attention
    if third:
        norms += 3 * hidden  # of the embedding, of the feature, and the last one
        norms += head.feature_size if head.norm_before_fc else 0
        norms += head.num_taps * target.hidden_size if head.fc_norm else 0
        norms += head.feature_size if head.kind == "peagle" else 0  # `mask_hidden`
        norms += 2 * arch.num_layers * arch.head_dim if head.kind == "dflash" else 0
    other_width = hidden != target.hidden_size
    fc_inputs = head.feature_size + (0 if third else hidden)
    return HeadSizes(
        layers=ModelSizes.of_arch(arch),
        first_inputs=2 if head.like_eagle3 else 1,
        feature_inputs=fc_inputs if head.use_aux else 0,
        draft_vocab_size=head.draft_vocab_size,
        owns_lm_head=third and (narrow or other_width),
        owns_embedding=third and other_width,
        norm_values=norms,
        token_table=third and narrow,
        fc_bias=bool(head.fc_bias),
        replicated=replicated,
    )


def plan_memory(config: HostConfig, shapes: Shapes, gpu_bytes: int) -> MemoryPlan:
    """What `config` puts on GPUs of `gpu_bytes` each.

    Raises:
        ValueError: it does not fit.
    """
    target, ranks = shapes.target, config.parallel.tensor
    max_len = context_length(config, target.max_positions)
    target_weights = target_bytes(target, ranks, max_len)
    draft_weights, draft_block = 0, 0
    if shapes.head is not None:
        draft_weights = head_bytes(shapes.head, ranks, max_len)
        cut = 1 if shapes.head.replicated else ranks
        own = torch_dtype(config.model.dtype)
        draft_block = _block_bytes(config, shapes.head.layers, cut, own)
    step = _step_bytes(config, target)
    free = check_fit(target_weights + draft_weights, step, gpu_bytes, ranks)
    target_block = _block_bytes(config, target, ranks, _target_cache(config))
    num_blocks = _num_blocks(config, target, target_block + draft_block, (free, gpu_bytes))
    return MemoryPlan(
        num_gpus=ranks,
        gpu=gpu_bytes,
        target_weights=target_weights,
        draft_weights=draft_weights,
        target_kv=(num_blocks + SCRATCH_BLOCKS) * target_block,
        draft_kv=(num_blocks + SCRATCH_BLOCKS) * draft_block,
        step=step,
        kv_copies=kv_copies(target.num_kv_heads, ranks),
        block_size=config.cache.block_size,
        num_blocks=num_blocks,
    )


def _num_blocks(config: HostConfig, target: ModelSizes, block: int, memory: tuple[int, int]) -> int:
    """As many as fit; `memory`: the free bytes of a GPU, and all of them."""
    free, gpu = memory
    facts = ModelFacts(target.max_positions, block, free)
    found = resolve_model(config, facts).cache.num_blocks
    gib = 1024**3
    if found * block > free:
        raise ValueError(
            f"cache.num_blocks = {found}: its {found * block / gib:.1f} GiB do not fit into the "
            f"{free / gib:.1f} GiB that weights leave of {gpu / gib:.1f} GiB"
        )
    return found


def _target_cache(config: HostConfig) -> torch.dtype:
    """Of the target's keys and values."""
    return FP8 if config.cache.dtype == "fp8" else torch_dtype(config.model.dtype)


def _block_bytes(config: HostConfig, sizes: ModelSizes, ranks: int, dtype: torch.dtype) -> int:
    heads = Shard(0, ranks).num_kv_heads(sizes.num_kv_heads)
    block_size = config.cache.block_size
    return bytes_per_block(sizes.num_layers, block_size, heads, sizes.head_dim, dtype)


def _step_bytes(config: HostConfig, sizes: ModelSizes) -> int:
    scheduler = config.scheduler
    return step_bytes(
        sizes.arch,
        config.parallel.tensor,
        torch_dtype(config.model.dtype),
        scheduler.max_num_seqs,
        scheduler.max_num_batched_tokens,
    )


def write_json(found: Prediction, path: Path) -> None:
    write_whole(path, (json.dumps(found.as_json(), indent=1) + "\n").encode())


def write_svg(found: Prediction, path: Path) -> None:
    """Milliseconds per token over batch sizes, with and without drafts."""
    lines = {name: [getattr(batch, key) for batch in found.batches] for name, key in LABELS.items()}
    places = [float(place) for place in range(len(found.batches))]
    names = [str(batch.batch) for batch in found.batches]
    title = f"ms per token: {found.title}"
    write_whole(path, LineChart(title, "batch", places, lines, names).svg())
