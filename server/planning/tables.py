"""A prediction as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, ConsoleDimensions
from rich.table import Table
from rich.text import Text

from server.planning.costs import LIMITS, Cost
from server.planning.memory import GIB, MemoryPlan
from server.planning.prediction import MILLI, BatchPrediction, Prediction
from server.planning.rounds import summed

BATCH_COLUMNS = (
    "batch",
    "plain,\nms",
    "best\ntree",
    "round,\nms",
    "tokens/\nround",
    "ms/\ntoken",
    "x\nplain",
    "tokens/s",
    "waits for",
)
LEFT = ("best\ntree", "waits for")
UNBOUNDED = 10_000  # columns, when tables are asked how many they need


def show(found: Prediction) -> None:
    """Print memory, times by batch size, and the parts of the first batch's round."""
    tables = {
        memory_title(found.memory): memory_table(found),
        f"Time: {found.title}": batch_table(found),
        parts_title(found): parts_table(found),
    }
    console = Console()
    width = max(console.width, *(needed(console, table) for table in tables.values()))
    console.size = ConsoleDimensions(width, console.height)
    for title, table in tables.items():
        console.print(Text(title, style="italic"), soft_wrap=True)
        console.print(table)
    console.print(legend(found), soft_wrap=True)


def needed(console: Console, table: Table) -> int:
    """The width that shows all values whole. A narrower terminal breaks lines, which loses
    nothing; a table that is told a smaller width cuts its values."""
    return console.measure(table, options=console.options.update(width=UNBOUNDED)).maximum


def memory_table(found: Prediction) -> Table:
    """What is on each GPU."""
    table = _table(("on each GPU", "bytes", "GiB"), left=("on each GPU",))
    for name, size in found.memory.entries.items():
        table.add_row(name, f"{size:,}", f"{size / GIB:.2f}")
    return table


def memory_title(plan: MemoryPlan) -> str:
    """How many GPUs of which size."""
    gpus = "1 GPU" if plan.num_gpus == 1 else f"{plan.num_gpus} GPUs"
    copies = f", each KV head on {plan.kv_copies}" if plan.kv_copies > 1 else ""
    return f"Memory: {gpus} of {plan.gpu / GIB:.1f} GiB{copies}"


def batch_table(found: Prediction) -> Table:
    """Times by batch size."""
    table = _table(BATCH_COLUMNS, left=LEFT)
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


def parts_title(found: Prediction) -> str:
    """Whose parts they are."""
    first = found.batches[0]
    return f"A round at batch {first.batch}, {first.tree}, in ms"


def parts_table(found: Prediction) -> Table:
    """The parts of a round at the first batch size, by what they wait for."""
    table = _table(("part", "total", *LIMITS), left=("part",))
    for name, cost in found.parts.items():
        table.add_row(name, *_milliseconds(cost))
    table.add_section()
    table.add_row("all", *_milliseconds(summed(found.parts)))
    return table


def _table(columns: Sequence[str], left: Sequence[str]) -> Table:
    """Narrow enough for 80 columns with usual values."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
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
