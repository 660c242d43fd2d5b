"""What stays on the device between steps: block tables, newest tokens and token counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.kv.scratch import Scratch
from engine.runner.inputs import StepInputs
from engine.speculation.proposer import Drafted
from engine.step.tree import DraftTree, VerifyResult
from kernels.packing.rows import LineRows, StartedRows

StartRows = Callable[[LineRows], StartedRows]


@dataclass(frozen=True, slots=True)
class LineState:
    """State that stays on the device between steps, by line. Padding rows use the last line."""

    tables: Tensor  # [lines + 1, columns] int32 block tables; the last is all scratch
    tokens: Tensor  # [lines + 1] int64, the last step's bonus token: the next root
    positions: Tensor  # [lines + 1] int64, its position
    counts: Tensor  # [lines + 1, V] int32 occurrences of tokens, see `Penalties.counts`
    # For steps without drafts: trees of the root only, whose tokens are arbitrary, and no faults
    lone: DraftTree  # of `lines` rows
    no_faults: Tensor  # [lines] bool

    @classmethod
    def allocate(
        cls, num_lines: int, columns: int, vocab_size: int, scratch: Scratch, device: torch.device
    ) -> LineState:
        tokens, positions = torch.zeros(2, num_lines + 1, dtype=torch.int64, device=device).unbind()
        tables = torch.full((num_lines + 1, columns), scratch.block, dtype=torch.int32)
        # On a CPU, untouched pages of `counts` cost no memory.
        counts = torch.zeros(num_lines + 1, vocab_size, dtype=torch.int32, device=device)
        lone = DraftTree.roots(torch.zeros(num_lines, dtype=torch.int64, device=device))
        no_faults = torch.zeros(num_lines, dtype=torch.bool, device=device)
        return cls(tables.to(device), tokens, positions, counts, lone, no_faults)

    def follow(self, inputs: StepInputs) -> StepInputs:
        """`inputs` with the roots that the last step left, for rows that follow it. The only own
        token of every row must be its root."""
        lines, follows = inputs.lines, inputs.follows
        return replace(
            inputs,
            own_tokens=torch.where(follows, self.tokens[lines], inputs.own_tokens),
            starts=torch.where(follows, self.positions[lines], inputs.starts),
        )

    def start(self, inputs: StepInputs, start_rows: StartRows) -> tuple[StepInputs, StartedRows]:
        """As `follow`, after the changes of the block tables. `start_rows`: as in `Ops`."""
        rows = LineRows(
            lines=inputs.lines,
            follows=inputs.follows,
            own_tokens=inputs.own_tokens,
            own_starts=inputs.starts,
            lens=inputs.lens,
            limits=inputs.limits,
            num_known=inputs.num_known,
            places=inputs.table_places,
            blocks=inputs.table_blocks,
            line_tokens=self.tokens,
            line_positions=self.positions,
            line_tables=self.tables,
        )
        started = start_rows(rows)
        return replace(inputs, own_tokens=started.tokens, starts=started.starts), started

    def lone_roots(self, tokens: Tensor) -> Drafted:
        """Trees of the roots `tokens` [B], without a kernel."""
        count, lone = len(tokens), self.lone
        tree = DraftTree(
            tokens=tokens[:, None],
            parents=lone.parents[:count],
            depths=lone.depths[:count],
            ancestors=lone.ancestors[:count],
            sizes=lone.sizes[:count],
            max_depth=0,
        )
        return Drafted(tree, self.no_faults[:count])

    def keep(self, lines: Tensor, root_positions: Tensor, result: VerifyResult) -> None:
        """Store the bonus tokens of a step and their positions. A row without a bonus token ends,
        but the next step may already be on its way: any token will do."""
        bonus = result.emitted.gather(1, result.num_accepted[:, None])[:, 0]
        self.tokens.index_put_((lines,), bonus.clamp(min=0))
        self.positions.index_put_((lines,), root_positions + 1 + result.num_accepted)

    def count(self, inputs: StepInputs, result: VerifyResult) -> None:
        """Add the emitted tokens to the counts of their lines."""
        counted = (result.emitted >= 0) & inputs.samples[:, None]
        lines = torch.where(counted, inputs.lines[:, None], len(self.tokens) - 1)
        at = lines * self.counts.shape[1] + result.emitted.clamp(min=0)
        twice = torch.full_like(at, 2, dtype=torch.int32)
        self.counts.view(-1).index_add_(0, at.flatten(), twice.flatten())
