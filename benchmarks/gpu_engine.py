"""The whole engine on a CUDA device: same tokens every way, and how long a round takes."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.kernels import copy_bandwidth
from benchmarks.peers.aerie import AerieTarget
from benchmarks.timing import measure
from configs.host import host_config
from configs.resolve import ResolvedConfig, with_sizes
from drafter.checkpoint import save_eagle3
from drafter.heads.untrained import eagle3_config, random_eagle3
from drafter.static_levels import levels_of
from engine.checkpoints.arch import LlamaArch
from engine.checkpoints.manifest import expected_tensors
from engine.core import EngineCore
from engine.kv.slots import Scratch
from engine.messages import Submit
from engine.models.llama import LlamaLoader
from engine.models.place import Place
from engine.request import Request, SamplingParams
from engine.runner.graphs import GraphedRound
from engine.speculation.planner import FixedPlanner
from engine.speculation.proposer import Ints, RootProposer, Roots
from engine.step.shape import ROOT, StaticShape, TreeShape, chain
from engine.step.tree import DraftTree
from kernels.ops import Ops
from kernels.registry import build_ops
from server.assembly.compose import assemble
from server.assembly.drafting import Drafting, HeadLoader, Target, drafting_with
from server.assembly.offline import OfflineEngine

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
PROMPT, STEPS = 128, 60
PROMPTS = [[(11 * i + 37 * row) % 40000 + 5 for i in range(20 + 9 * row)] for row in range(6)]
EIGHT = StaticShape("eight", (-1, 0, 0, 0, 1, 1, 2, 4))


def _requests() -> list[Request]:
    heats = (0.0, 1.0, 0.7)
    return [
        Request(
            request_id=str(row),
            prompt_ids=prompt,
            params=SamplingParams(
                max_tokens=48, temperature=heats[row % 3], seed=row, ignore_eos=True
            ),
        )
        for row, prompt in enumerate(PROMPTS)
    ]


def _texts(*settings: str) -> dict[str, list[int]]:
    engine = OfflineEngine.from_config(host_config(None, ["cache.num_blocks=1024", *settings]))
    return {name: heard.token_ids for name, heard in engine.generate(_requests()).items()}


def same_tokens() -> dict[str, Any]:
    """Graphs against eager rounds, in bfloat16: the same kernels on the same shapes. The head
    against plain decoding, in float32, where sums in another order decide nothing."""
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
    """SmolLM2 with and without its head, by batch; greedy."""
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
    return {"tokens_per_second": found}


class RepeatingProposer(RootProposer):
    """Fills every node with the root's token: trees that cost nothing to draft."""

    lookahead = 0

    def knows(self, lines: Ints, positions: Ints) -> NDArray[np.bool_]:  # noqa: ARG002
        return np.ones(len(lines), dtype=np.bool_)

    def draft(
        self,
        roots: Roots,
        shape: TreeShape,
        max_context: int,  # noqa: ARG002
        any_sampled: bool,  # noqa: ARG002
        scratch: Scratch,  # noqa: ARG002
    ) -> tuple[DraftTree, Tensor]:
        assert isinstance(shape, StaticShape)
        plan = levels_of(shape, roots.tokens.device)
        tokens = roots.tokens[:, None].repeat(1, shape.num_nodes)
        tree = DraftTree(
            tokens=tokens,
            parents=plan.parents.expand_as(tokens),
            depths=plan.depths.expand_as(tokens),
            ancestors=plan.masks.expand_as(tokens),
            sizes=roots.max_nodes,
            max_depth=shape.max_depth,
        )
        return tree, torch.ones_like(roots.tokens, dtype=torch.bool)


@dataclass
class _Large:
    """A model of the shape of Llama-3.1-8B with random weights."""

    ops: Ops
    device: torch.device
    folder: Path
    config: ResolvedConfig = field(
        default_factory=lambda: with_sizes(
            host_config(None, ["scheduler.max_num_seqs=8"]), max_model_len=4096, num_blocks=1024
        )
    )

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

    def drafting(self, target: Target, shape: TreeShape) -> Drafting:
        """An untrained EAGLE-3 head."""
        config = eagle3_config(LLAMA_8B, DRAFT_VOCAB)
        tensors = random_eagle3(config, LLAMA_8B, seed=0)
        save_eagle3(self.folder, config, LLAMA_8B, tensors, torch.arange(DRAFT_VOCAB))
        head = HeadLoader(target, self.place, 4096).load(self.folder)
        drafting = drafting_with(self.config, head, self.place)
        return replace(drafting, planner=FixedPlanner(shape))

    def steps(
        self, target: Target, drafting: Drafting, *, run_ahead: bool = False
    ) -> dict[str, float]:
        scheduler = self.config.scheduler.model_copy(update={"run_ahead": run_ahead})
        config = self.config.model_copy(update={"scheduler": scheduler})
        core = assemble(config, target, self.place, drafting)
        return _time_steps(core)


def _time_steps(core: EngineCore) -> dict[str, float]:
    """Median milliseconds of a decode step, and of what the device does in it. `idle_us`: from the
    end of one round to the begin of the next, by the device's clock; copies of inputs and outputs
    lie in between. `gap_us` is what the host adds to a step."""
    params = SamplingParams(max_tokens=2000, temperature=0.0, ignore_eos=True)
    core.add(Submit(Request(request_id="r", prompt_ids=list(range(5, 5 + PROMPT)), params=params)))
    walls = []
    with _device_times() as spans:
        for _ in range(STEPS + 10):
            started = time.perf_counter()
            core.step()
            walls.append((time.perf_counter() - started) * 1000)
    wall = statistics.median(walls[10:])
    device = statistics.median(start.elapsed_time(end) for start, end in spans[5:])
    idle = [1000 * end.elapsed_time(start) for (_, end), (start, _) in pairwise(spans[5:])]
    return {
        "step_ms": wall,
        "device_ms": device,
        "gap_us": (wall - device) * 1000,
        "idle_us": statistics.median(idle),
        "idle_us_p95": float(np.quantile(idle, 0.95)),
    }


@contextmanager
def _device_times() -> Iterator[list[tuple[Any, Any]]]:
    """CUDA events around every replay of a round."""
    spans: list[tuple[Any, Any]] = []
    launch = GraphedRound._launch

    def timed(self: GraphedRound) -> Tensor:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        joined = launch(self)
        end.record()
        spans.append((start, end))
        return joined

    GraphedRound._launch = timed  # type: ignore[method-assign]
    try:
        yield spans
    finally:
        GraphedRound._launch = launch  # type: ignore[method-assign]


def large_round() -> dict[str, Any]:
    """Batch 1: the round against reading all weights once, verifying 8 nodes against 1, drafting a
    chain of 3, and what the host adds."""
    device = torch.device("cuda")
    bandwidth = copy_bandwidth()
    with tempfile.TemporaryDirectory() as folder:
        ops = build_ops("triton", device, torch.bfloat16, 1, Path(folder))
        large = _Large(ops, device, Path(folder) / "head")
        target = large.target()
        free = {
            shape.name: large.steps(target, Drafting(RepeatingProposer(), FixedPlanner(shape)))
            for shape in (ROOT, EIGHT, chain(3))
        }
        drafted = large.steps(target, large.drafting(target, chain(3)))
        roots = Drafting(RepeatingProposer(), FixedPlanner(ROOT))
        ahead = {
            "root, run-ahead": large.steps(target, roots, run_ahead=True),
            "eagle3 chain3, run-ahead": large.steps(
                target, large.drafting(target, chain(3)), run_ahead=True
            ),
        }
    read = sum(torch.Size(shape).numel() for shape in expected_tensors(LLAMA_8B).values())
    floor = 2 * (read - LLAMA_8B.vocab_size * LLAMA_8B.hidden_size) / bandwidth * 1000
    one, eight, three = (free[name]["device_ms"] for name in (ROOT.name, EIGHT.name, "chain3"))
    bars = {
        "round / floor": (one / floor, 1.15),
        "8 nodes / 1 node": (eight / one, 1.10),
        "drafting, share of the round": (
            (drafted["device_ms"] - three) / drafted["device_ms"],
            0.15,
        ),
        "host gap, us": (free[ROOT.name]["gap_us"], 50.0),
        "the same with run-ahead, us": (ahead["root, run-ahead"]["gap_us"], 50.0),
    }
    for name, (value, bar) in bars.items():
        print(f"{name}: {value:.2f} (at most {bar})")
    steps = {**free, "eagle3 chain3": drafted, **ahead}
    for name, times in steps.items():
        print(f"{name}: {times['step_ms']:.2f} ms a step, idle {times['idle_us']:.0f} us in it")
    missed = [f"{n}: {value:.2f}, at most {bar}" for n, (value, bar) in bars.items() if value > bar]
    found = {name: {"value": value, "at_most": bar} for name, (value, bar) in bars.items()}
    return {
        "floor_ms": floor,
        "bars": found,
        "steps": steps,
        "missed": missed,
    }
