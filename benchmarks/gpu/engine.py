"""The whole engine on a CUDA device: the same tokens in every mode, and the time of steps."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import copy_bandwidth, triton_ops
from benchmarks.measuring import bars
from benchmarks.measuring.bars import Verdict
from benchmarks.measuring.step_times import Load, time_steps
from benchmarks.peers.aerie import AerieTarget
from configs.host import host_config
from configs.resolve import ResolvedConfig, with_sizes
from drafter.checkpoint import save_eagle3
from drafter.heads.untrained import eagle3_config, random_eagle3
from drafter.static_levels import StaticLevels
from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.manifest import expected_tensors
from engine.models.llama import LlamaLoader
from engine.models.place import Place
from engine.request import Request, SamplingParams
from engine.speculation.planner import FixedPlanner
from engine.speculation.proposer import Drafted, DraftLimits, RootProposer, Roots
from engine.step.shape import ROOT, StaticShape, TreeShape, chain
from engine.step.tree import DraftTree
from kernels.ops import Ops
from server.assembly.compose import assemble
from server.assembly.drafting import Drafting, HeadLoader, LoadedDraft, Target, drafting_with
from server.assembly.offline import OfflineEngine
from server.measuring.timing import measure

LLAMA_8B = LlamaArch(
    vocab_size=128256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=None,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    max_position_embeddings=8192,
)
DRAFT_VOCAB = 32000
PROMPT = 128
PROMPTS = [[(11 * i + 37 * row) % 40000 + 5 for i in range(20 + 9 * row)] for row in range(6)]
KINDS: dict[str, list[dict[str, Any]]] = {
    "plain": [{"temperature": heat} for heat in (0.0, 1.0, 0.7)],
    "edited": [
        {"temperature": 0.7, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
        {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 1},
        {"temperature": 1.0, "logit_bias": {11: 2.0, 12: -100.0}, "min_tokens": 9},
    ],
}
EIGHT = StaticShape("eight", (-1, 0, 0, 0, 1, 1, 2, 4))


def _requests(name: str, kinds: Sequence[Mapping[str, Any]]) -> list[Request]:
    shared = {"max_tokens": 48, "ignore_eos": True}
    return [
        Request(
            request_id=f"{name} {row}",
            prompt_ids=prompt,
            params=SamplingParams(**{**shared, "seed": row, **kinds[row % len(kinds)]}),
        )
        for row, prompt in enumerate(PROMPTS)
    ]


def _texts(*settings: str) -> dict[str, list[int]]:
    """Token ids of the requests of all `KINDS`."""
    engine = OfflineEngine.from_config(host_config(None, ["cache.num_blocks=1024", *settings]))
    found: dict[str, list[int]] = {}
    for name, kinds in KINDS.items():
        heard = engine.generate(_requests(name, kinds))
        found |= {request: record.token_ids for request, record in heard.items()}
    return found


def same_tokens() -> dict[str, Any]:
    """Compares graphs with eager steps in bfloat16: same kernels, same shapes. Compares the head
    with plain decoding in float32, where the order of sums does not change tokens."""
    pairs: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
        "graphs = eager, plain": (
            ("speculation.draft=null",),
            ("speculation.draft=null", "kernels.graphs=off"),
        ),
        "graphs = eager, tree8": (
            ("speculation.tree=tree8",),
            ("speculation.tree=tree8", "kernels.graphs=off"),
        ),
        "run-ahead = one by one, tree8": (
            ("speculation.tree=tree8",),
            ("speculation.tree=tree8", "scheduler.run_ahead=false"),
        ),
        "chain3 = plain": (
            ("model.dtype=float32", "speculation.tree=chain3"),
            ("model.dtype=float32", "speculation.draft=null"),
        ),
        "tree8 = plain": (
            ("model.dtype=float32", "speculation.tree=tree8"),
            ("model.dtype=float32", "speculation.draft=null"),
        ),
    }
    counts: dict[str, str] = {}
    failed: list[str] = []
    for name, (one, other) in pairs.items():
        first, second = _texts(*one), _texts(*other)
        same = sum(first[request] == second[request] for request in first)
        counts[name] = f"{same} of {len(first)} texts"
        failed += [] if same == len(first) else [f"{name}: {counts[name]}"]
    print(counts)
    return {"same": counts, "failed": failed}


def speeds() -> dict[str, Any]:
    """Greedy tokens per second of SmolLM2 with and without its head, by batch size."""
    found: dict[str, dict[str, float]] = {}
    for name, draft in (("plain", "null"), ("auto", "auto")):
        settings = [f"speculation.draft={draft}", "cache.num_blocks=4096"]
        target = AerieTarget(OfflineEngine.from_config(host_config(None, settings)))
        for batch in (1, 8, 64):
            prompts = [[(7 * i + row) % 40000 + 5 for i in range(PROMPT)] for row in range(batch)]
            target.run(prompts, 16)
            runs = [measure(target.run(prompts, 128)).tokens_per_second for _ in range(3)]
            found.setdefault(f"batch {batch}", {})[name] = round(statistics.median(runs), 1)
    print(found)
    verdicts = [
        Verdict(
            f"plain / with the head, tokens per second, {batch}", 1.03, of["plain"] / of["auto"]
        )
        for batch, of in found.items()
    ]
    return {"tokens_per_second": found, "bars": bars.as_json(verdicts)}


class RepeatingProposer(RootProposer):
    """Fills every node with the root's token, so that drafting costs nothing."""

    def __init__(self, device: torch.device) -> None:
        self._levels = StaticLevels(device)

    def draft(self, roots: Roots, shape: TreeShape, limits: DraftLimits) -> Drafted:  # noqa: ARG002
        assert isinstance(shape, StaticShape)
        plan = self._levels.of(shape)
        tokens = roots.tokens[:, None].repeat(1, shape.num_nodes)
        tree = DraftTree(
            tokens=tokens,
            parents=plan.parents.expand_as(tokens),
            depths=plan.depths.expand_as(tokens),
            ancestors=plan.masks.expand_as(tokens),
            sizes=roots.max_nodes,
            max_depth=shape.max_depth,
        )
        return Drafted(tree.cut(roots.max_nodes), torch.zeros_like(roots.tokens, dtype=torch.bool))


@dataclass
class Large:
    """A model of the size of Llama-3.1-8B with random weights."""

    ops: Ops
    device: torch.device
    folder: Path  # must exist; every head gets its own folder in it
    rows: int = 16

    @cached_property
    def config(self) -> ResolvedConfig:
        settings = [f"scheduler.max_num_seqs={self.rows}"]
        return with_sizes(host_config(None, settings), max_model_len=4096, num_blocks=1024)

    @property
    def place(self) -> Place:
        return Place(self.ops, torch.bfloat16, self.device)

    def target(self) -> Target:
        shapes = expected_tensors(LLAMA_8B)

        def read(name: str) -> Tensor:
            made = torch.randn(shapes[name], device=self.device, dtype=torch.bfloat16) * 0.02
            return torch.ones_like(made) if "norm" in name else made

        loader = LlamaLoader(LLAMA_8B, read, self.place, 4096)
        return Target(loader.load(), LLAMA_8B, frozenset({2}))

    def head(self, target: Target) -> LoadedDraft:
        """An untrained EAGLE-3 head."""
        config = eagle3_config(LLAMA_8B, DRAFT_VOCAB)
        tensors = random_eagle3(config, LLAMA_8B, seed=0)
        folder = Path(tempfile.mkdtemp(dir=self.folder)) / "head"
        save_eagle3(folder, config, LLAMA_8B, tensors, torch.arange(DRAFT_VOCAB))
        return HeadLoader(target, self.place, 4096).load(folder)

    def drafting(self, head: LoadedDraft, shape: TreeShape) -> Drafting:
        """Every step drafts a tree of this shape with the head."""
        drafting = drafting_with(self.config, head, self.place)
        return replace(drafting, planner=FixedPlanner(shape))

    def steps(self, target: Target, drafting: Drafting, load: Load) -> dict[str, float]:
        config = load.settings(self.config)
        return time_steps(assemble(config, target, self.place, drafting), load)


ONE = Load()
AHEAD = Load(run_ahead=True)
SAME_TOKEN = {"logit_bias": {7: 100.0}}  # one token over and over, so that every lookup is right
LOADS = {
    "penalties": Load(params={"repetition_penalty": 1.1, "frequency_penalty": 0.2}),
    "logprobs": Load(params={"logprobs": 5}),
    "bias": Load(params=SAME_TOKEN),
    "bias, lookup": Load(params=SAME_TOKEN, lookup=True),
    "8 rows": Load(rows=8),
    "8 rows, a chunk of 512": Load(rows=8, chunk=512),
}


def large_step() -> dict[str, Any]:
    """Compares a step with reading all weights once, and verifying 8 nodes with 1. Measures
    drafting a chain of 3, the host's overhead, and steps with other features."""
    device = torch.device("cuda")
    bandwidth = copy_bandwidth()
    with tempfile.TemporaryDirectory() as folder:
        large = Large(triton_ops(device), device, Path(folder))
        target = large.target()

        def free(shape: TreeShape, load: Load) -> dict[str, float]:
            drafting = Drafting(RepeatingProposer(large.device), FixedPlanner(shape))
            return large.steps(target, drafting, load)

        head = large.head(target)

        def drafted(load: Load) -> dict[str, float]:
            return large.steps(target, large.drafting(head, chain(3)), load)

        found = {shape.name: free(shape, ONE) for shape in (ROOT, EIGHT, chain(3))}
        found["eagle3 chain3"] = drafted(ONE)
        found["root, run-ahead"] = free(ROOT, AHEAD)
        found["eagle3 chain3, run-ahead"] = drafted(AHEAD)
        found |= {f"root, {name}": free(ROOT, load) for name, load in LOADS.items()}
    for name, times in found.items():
        print(
            f"{name}: {times['step_ms']:.2f} ms a step, {times['device_ms']:.2f} ms of them on the "
            f"device, idle {times['idle_us']:.0f} us"
        )
    floor = floor_ms(bandwidth)
    verdicts = _verdicts(found, floor)
    return {"floor_ms": floor, "steps": found, "bars": bars.as_json(verdicts)}


def floor_ms(bandwidth: float) -> float:
    """Milliseconds to read the weights of the 8B shape, without the embedding's rows."""
    read = sum(torch.Size(shape).numel() for shape in expected_tensors(LLAMA_8B).values())
    return 2 * (read - LLAMA_8B.vocab_size * LLAMA_8B.hidden_size) / bandwidth * 1000


def _verdicts(found: Mapping[str, dict[str, float]], floor_ms: float) -> list[Verdict]:
    device = {name: times["device_ms"] for name, times in found.items()}
    drafted = device["eagle3 chain3"]
    return [
        Verdict("step of the 8B shape / reading its weights", 1.15, device["root"] / floor_ms),
        Verdict("verifying 8 nodes / 1 node", 1.10, device["eight"] / device["root"]),
        Verdict(
            "drafting a chain of 3, share of the step", 0.15, (drafted - device["chain3"]) / drafted
        ),
        Verdict("what the host adds to a step, us", 50.0, found["root"]["gap_us"]),
        Verdict("the same, running ahead, us", 50.0, found["root, run-ahead"]["gap_us"]),
    ]
