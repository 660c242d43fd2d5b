"""A prediction as tables."""

from __future__ import annotations

from rich.console import Console, Group
from rich.table import Table

from server.planning.costs import LIMITS, Cost
from server.planning.memory import GIB, MemoryPlan
from server.planning.prediction import MILLI, BatchPrediction, Prediction
from server.planning.rounds import summed

BATCH_COLUMNS = (
    "batch",
    "plain, ms",
    "best tree",
    "round, ms",
    "tokens/round",
    "ms/token",
    "x plain",
    "tokens/s",
    "waits for",
)


def show(found: Prediction, console: Console | None = None) -> None:
    """Print memory, times by batch size, and the parts of the first batch's round."""
    (console or Console()).print(
        Group(memory_table(found), "", batch_table(found), "", parts_table(found), legend(found))
    )


def memory_table(found: Prediction) -> Table:
    """What is on each GPU."""
    plan = found.memory
    table = Table(title=memory_title(plan), title_justify="left")
    table.add_column("on each GPU")
    table.add_column("bytes", justify="right")
    table.add_column("GiB", justify="right")
    for name, size in plan.entries.items():
        table.add_row(name, f"{size:,}", f"{size / GIB:.2f}")
    return table


def memory_title(plan: MemoryPlan) -> str:
    """How many GPUs of which size."""
    gpus = "1 GPU" if plan.num_gpus == 1 else f"{plan.num_gpus} GPUs"
    copies = f", each KV head on {plan.kv_copies}" if plan.kv_copies > 1 else ""
    return f"Memory: {gpus} of {plan.gpu / GIB:.1f} GiB{copies}"


def batch_table(found: Prediction) -> Table:
    """Times by batch size."""
    table = Table(title=f"Time: {found.title}", title_justify="left")
    for name in BATCH_COLUMNS:
        table.add_column(name, justify="left" if name in ("best tree", "waits for") else "right")
    for batch in found.batches:
        table.add_row(*_cells(batch))
    return table


def _cells(batch: BatchPrediction) -> tuple[str, ...]:
    return (
        f"{batch.batch}" + ("" if batch.fits else "*"),
        f"{batch.plain_ms:.2f}",
        batch.tree,
        f"{batch.round_ms:.2f}",
        f"{batch.tokens_per_round:.2f}",
        f"{batch.ms_per_token:.2f}",
        f"{batch.speedup:.2f}",
        f"{batch.tokens_per_second:,.0f}",
        f"{batch.limit} ({batch.shares[batch.limit]:.0%})",
    )


def parts_table(found: Prediction) -> Table:
    """The parts of a round at the first batch size, by what they wait for."""
    first = found.batches[0]
    title = f"A round at batch {first.batch}, {first.tree}, in ms"
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    for name in ("total", *LIMITS):
        table.add_column(name, justify="right")
    for name, cost in found.parts.items():
        table.add_row(name, *_milliseconds(cost))
    table.add_section()
    table.add_row("all", *_milliseconds(summed(found.parts)))
    return table


def _milliseconds(cost: Cost) -> list[str]:
    return [f"{value * MILLI:.2f}" for value in (cost.total, *cost.by_limit().values())]


def legend(found: Prediction) -> str:
    """How to read the tables."""
    plan, room = found.memory, found.memory.num_sequences(found.context)
    lines = [
        f"{plan.num_blocks} cache blocks of {plan.block_size} tokens: {room} sequences of "
        f"{found.context} tokens at once.",
        f"Acceptance: a chain of 3 drafts gives {found.acceptance:.2f} tokens a round.",
    ]
    if not all(batch.fits for batch in found.batches):
        lines.append("* more than fit into the cache")
    return "\n".join(lines)
