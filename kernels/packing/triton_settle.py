"""Ends the rows of a step in Triton: the walk, the next roots, the moves of KV and the report for
the host, in one launch instead of thirty small ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.packing.settling import DrawnTrees, SettledTrees
from kernels.tree.triton_kernel import child_of
from kernels.triton_launch import Launch, pointers
from kernels.triton_overlap import await_inputs


@triton.jit
def _of_node(values, node, nodes):
    """The value of one node."""
    return tl.sum(tl.where(nodes == node, values, 0), axis=0)


@triton.jit
def _store_twice(ptr, report_ptr, at, value):
    """For the device, and for the report to the host."""
    tl.store(ptr + at, value)
    tl.store(report_ptr + at, value)


@triton.jit
def _settle_kernel(
    tokens_ptr,  # as `DrawnTrees` says
    parents_ptr,
    sizes_ptr,
    faults_ptr,
    drawn_ptr,
    at_ptr,
    inside_ptr,
    slots_ptr,
    lines_ptr,
    starts_ptr,
    lens_ptr,
    line_tokens_ptr,
    line_positions_ptr,
    settled_path_ptr,  # as `SettledTrees` says
    settled_num_accepted_ptr,
    settled_emitted_ptr,
    settled_sources_ptr,
    settled_targets_ptr,
    report_ptr,  # int64
    reported_faults_ptr,  # uint8
    tokens_stride,
    parents_stride,
    first_scratch,
    B,
    N,
    max_depth,
    NODES: tl.constexpr,  # a power of two, at least N
):
    """One row, grid (B,). The report holds for all rows what was emitted, then the paths, then the
    sizes of the trees, their tokens and their parents."""
    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    nodes = tl.arange(0, NODES)
    exists = nodes < N
    E = max_depth + 1
    tokens = tl.load(tokens_ptr + row * tokens_stride + nodes, mask=exists, other=-1)
    parents = tl.load(parents_ptr + row * parents_stride + nodes, mask=exists, other=-1)
    inside = tl.load(inside_ptr + row * N + nodes, mask=exists, other=0) != 0
    at = tl.load(at_ptr + row * N + nodes, mask=inside, other=0)
    drawn = tl.load(drawn_ptr + at, mask=inside, other=-1)
    slots = tl.load(slots_ptr + at, mask=inside, other=first_scratch)
    root_slot = _of_node(slots, 0, nodes)
    node = tl.program_id(0) * 0
    num_steps = node
    token = _of_node(drawn, 0, nodes)
    bonus = token
    first = row * E
    reported_path_ptr = report_ptr + B * E
    _store_twice(settled_path_ptr, reported_path_ptr, first, node.to(tl.int64))
    _store_twice(settled_emitted_ptr, report_ptr, first, token)
    for depth in range(1, E):
        found = child_of(node, token, tokens, parents, nodes, exists, NODES)
        alive = (found < NODES) & (num_steps == depth - 1)
        node = tl.where(alive, found, node)
        num_steps += alive.to(tl.int32)
        token = _of_node(drawn, node, nodes)
        bonus = tl.where(alive, token, bonus)
        taken = tl.where(alive, node, -1).to(tl.int64)
        _store_twice(settled_path_ptr, reported_path_ptr, first + depth, taken)
        emitted = tl.where(alive, token, -1)
        _store_twice(settled_emitted_ptr, report_ptr, first + depth, emitted)
        moved = alive & (node != depth)
        source, target = _of_node(slots, node, nodes), _of_node(slots, depth, nodes)
        place = row * max_depth + depth - 1
        tl.store(settled_sources_ptr + place, tl.where(moved, source, root_slot))
        tl.store(settled_targets_ptr + place, tl.where(moved, target, root_slot))
    tl.store(settled_num_accepted_ptr + row, num_steps.to(tl.int64))

    line = tl.load(lines_ptr + row)
    position = tl.load(starts_ptr + row) + tl.load(lens_ptr + row) + num_steps
    tl.store(line_tokens_ptr + line, tl.maximum(bonus, 0))
    tl.store(line_positions_ptr + line, position)

    rest = report_ptr + 2 * B * E
    tl.store(rest + row, tl.load(sizes_ptr + row))
    tl.store(rest + B + row * N + nodes, tokens, mask=exists)
    tl.store(rest + B + B * N + row * N + nodes, parents, mask=exists)
    tl.store(reported_faults_ptr + row, tl.load(faults_ptr + row).to(tl.uint8))


def settle(trees: DrawnTrees) -> SettledTrees:
    """The walks of all rows; changes the state of their lines."""
    (B, N), E, device = trees.tokens.shape, trees.max_depth + 1, trees.tokens.device

    def new(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    settled = SettledTrees(
        path=new(B, E),
        num_accepted=new(B),
        emitted=new(B, E),
        sources=new(B * trees.max_depth),
        targets=new(B * trees.max_depth),
        report=new(8 * B * (2 * E + 2 * N + 1) + B, dtype=torch.uint8),
    )
    launch(trees, settled).run()
    return settled


def launch(trees: DrawnTrees, settled: SettledTrees) -> Launch:
    B, N = trees.tokens.shape
    num_bytes = settled.report.numel() - B
    arguments = {**pointers("", trees), **pointers("settled_", settled)}
    del arguments["settled_report_ptr"]
    strided = ("tokens_ptr", "parents_ptr")
    whole = [part for name, part in arguments.items() if name not in strided]
    assert B > 0
    assert N == 1 or all(arguments[name].stride(1) == 1 for name in strided)
    assert all(part.is_contiguous() for part in whole)
    return Launch(
        name=f"settle[N={N}]",
        kernel=_settle_kernel,
        grid=(B,),
        arguments={
            **arguments,
            "report_ptr": settled.report[:num_bytes].view(torch.int64),
            "reported_faults_ptr": settled.report[num_bytes:],
            "tokens_stride": trees.tokens.stride(0),
            "parents_stride": trees.parents.stride(0),
            "first_scratch": trees.first_scratch,
            "B": B,
            "N": N,
            "max_depth": trees.max_depth,
            "NODES": triton.next_power_of_2(N),
        },
        num_warps=1,
    )


def example_launches() -> list[Launch]:
    """Plain steps and trees of 8 nodes, in 64 rows."""
    found = []
    for N, depth in ((1, 0), (8, 3)):
        B, E = 64, depth + 1
        nodes = torch.empty(B, N, dtype=torch.int64, device="meta")
        row, path = nodes[:, 0].contiguous(), torch.empty_like(nodes).resize_(B, E)
        flags = nodes.bool()
        trees = DrawnTrees(
            nodes, nodes, row, flags[:, 0].contiguous(), nodes.view(-1), nodes, flags,
            nodes.view(-1), *(row,) * 5, max_depth=depth, first_scratch=1600,
        )  # fmt: skip
        report = torch.empty(8 * B * (2 * E + 2 * N + 1) + B, dtype=torch.uint8, device="meta")
        moves = torch.empty(B * depth, dtype=torch.int64, device="meta")
        found.append(launch(trees, SettledTrees(path, row, path, moves, moves, report)))
    return found
