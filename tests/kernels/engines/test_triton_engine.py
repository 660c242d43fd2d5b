"""A tiny engine gives the same text with the Triton kernels as with the references."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet

from engine.checkpoints.arch import LlamaArch
from engine.completion import Completion
from engine.speculation.planner import FixedPlanner
from engine.step.shape import ROOT, DynamicShape, StaticShape, TreeShape, chain
from kernels.registry import reference_ops, triton_ops
from tests.engine.test_speculation_equality import assert_same
from tests.kernels import triton_env
from tests.support.engines.in_process import ask, generate
from tests.support.engines.tiny_engine import TinyEngine, random_llama
from tests.support.heads.head_lab import HeadLab, write_head
from tests.support.heads.parallel_heads import ParallelKind, write_parallel_head
from tests.support.machine.guarded_memory import check_guards, guard
from tests.support.machine.kernel_count import counted_steps

triton_env.load("kernels.norm.triton_kernel")
pytestmark = [
    *triton_env.MARKS,
    pytest.mark.slow,
    pytest.mark.skipif(
        not triton_env.INTERPRETED, reason="on a GPU: python -m benchmarks.gpu_check"
    ),
]
KINDS: tuple[ParallelKind, ...] = ("peagle", "dflash")
SHAPES: tuple[TreeShape, ...] = (
    ROOT,
    chain(2),
    StaticShape("tree", (-1, 0, 0, 1, 1, 2)),
    DynamicShape("dynamic", 6, 2, 3),
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> HeadLab:
    oracle = random_llama(hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=32)
    engine = TinyEngine(oracle, triton_ops(torch.float32), max_model_len=64, num_blocks=16)
    return HeadLab(engine, write_head(engine, tmp_path_factory.mktemp("head") / "eagle3"))


def texts(lab: HeadLab, shape: TreeShape) -> tuple[dict[str, Completion], int]:
    """What three requests get, and how many trees were drafted."""
    core, proposer = lab.build(FixedPlanner(shape))
    edited = {
        "repetition_penalty": 1.4,
        "frequency_penalty": 0.5,
        "logit_bias": {7: 3.0, 8: -100.0},
        "min_tokens": 2,
        "logprobs": 2,
        "prompt_logprobs": 1,
    }
    asked = [
        ask("greedy", [9, 8, 7], max_tokens=5, ignore_eos=True),
        ask("hot", [5] * 17, max_tokens=4, temperature=0.9, top_p=0.8, seed=3, ignore_eos=True),
        ask("edited", [7, 8, 7, 9], max_tokens=3, temperature=1.0, seed=4, **edited),
    ]
    heard = generate(core, asked)
    assert not proposer.failed
    assert core.stats().num_draft_faults == 0
    return heard, core.stats().num_drafts


def cases() -> Iterator[ParameterSet]:
    """Trees in both layouts. Every run takes a static tree and a dynamic one, which begin and end
    with steps of the root only; the others rarely differ, and each takes seconds. A chain's exact
    steps are a static tree's."""
    always = {("tree", False), ("dynamic", True)}
    for shape in SHAPES:
        for padded in (False, True):
            if not padded and shape in (ROOT, chain(2)):
                continue
            name = f"{shape.name}-{'padded' if padded else 'exact'}"
            marks = () if (shape.name, padded) in always else (pytest.mark.extended,)
            yield pytest.param(shape, padded, id=name, marks=marks)


@pytest.mark.parametrize(("shape", "padded"), list(cases()))
def test_tokens_and_drafts_are_those_of_the_reference(
    lab: HeadLab, reference_ops: object, shape: TreeShape, padded: bool
) -> None:
    usual = replace(lab, engine=replace(lab.engine, ops=reference_ops))  # type: ignore[arg-type]
    interpreted = replace(lab, engine=replace(lab.engine, padded=padded))
    expected, drafts = texts(usual, shape)
    heard, drafts_here = texts(interpreted, shape)
    for name, record in heard.items():
        assert_same(name, record, expected[name])
    assert drafts_here == drafts
    assert (drafts > 0) == (shape is not ROOT)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.extended) for k in KINDS])
def test_heads_that_draft_in_parallel_draft_as_with_the_reference(
    lab: HeadLab, reference_ops: object, kind: ParallelKind, tmp_path: Path
) -> None:
    target = LlamaArch.from_hf_config(lab.engine.oracle.config.to_dict())
    head = write_parallel_head(tmp_path / kind, target, kind, draft_vocab=90)
    lab = replace(lab, head_folder=head)
    usual = replace(lab, engine=replace(lab.engine, ops=reference_ops))  # type: ignore[arg-type]
    expected, drafts = texts(usual, chain(3))
    heard, drafts_here = texts(replace(lab, engine=replace(lab.engine, padded=True)), chain(3))
    for name, record in heard.items():
        assert_same(name, record, expected[name])
    assert drafts_here == drafts > 0


def test_no_kernel_reads_beyond_the_tables_of_a_row_at_its_last_position(
    lab: HeadLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a row that drafts deep; guard rows hold NaN."""
    near = replace(lab, engine=replace(lab.engine, max_model_len=8, padded=True, max_num_seqs=2))
    asked = [
        ask("last", list(range(3, 9)), max_tokens=9, ignore_eos=True),
        ask("mate", [7], max_tokens=4, ignore_eos=True, temperature=0.9, seed=2),
    ]
    usual = replace(
        near, engine=replace(near.engine, ops=reference_ops(triton_env.DEVICE, torch.float32))
    )
    expected = generate(usual.build(FixedPlanner(chain(4)))[0], asked)
    tensors = guard(monkeypatch)
    core, proposer = near.build(FixedPlanner(chain(4)))
    heard = generate(core, asked)
    check_guards(tensors)
    assert [heard[name].token_ids for name in heard] == [expected[name].token_ids for name in heard]
    assert len(heard["last"].token_ids) == 2
    stats = core.stats()
    assert stats.num_drafts > 0
    assert (stats.num_draft_faults, stats.num_unsound, proposer.failed) == (0, 0, False)


# Kernels of a round of two layers, drafting included: our own, products, and other operations of
# torch. Each costs about a microsecond on a GPU, and its place in a graph.
MOST_KERNELS = {"root": (19, 9, 2), "chain3": (48, 25, 11), "dynamic16": (63, 30, 13)}
DYNAMIC16 = DynamicShape("dynamic16", 16, 4, 6)


@pytest.mark.parametrize("shape", [ROOT, chain(3), DYNAMIC16], ids=lambda shape: shape.name)
def test_a_round_launches_no_more_kernels_than_it_did(
    lab: HeadLab, monkeypatch: pytest.MonkeyPatch, shape: TreeShape
) -> None:
    engine = replace(lab.engine, padded=True, run_ahead=True, max_num_seqs=1)
    core = engine.build()
    if shape != ROOT:
        core, _ = replace(lab, engine=engine).build(FixedPlanner(shape))
    with counted_steps(monkeypatch) as counts:
        generate(core, [ask("a", [9, 8, 7], max_tokens=4, ignore_eos=True)])
    last = next(c for c in reversed(counts) if c.form.only_roots and c.form.shape == shape)
    found = (last.launches.total(), last.products, last.others.total())
    assert all(map(int.__le__, found, MOST_KERNELS[shape.name])), (last.launches, last.others)
