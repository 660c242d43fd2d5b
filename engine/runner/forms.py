"""The form of a step: all that decides the shapes of its tensors. Sizes are exact on a CPU and
rounded up on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from engine.step.shape import TreeShape

FIRST_ROWS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)


@dataclass(frozen=True, slots=True)
class StepForm:
    """Everything that decides a step's tensor shapes and which parts of the body run. Steps of one
    form can share a CUDA graph."""

    exact: bool  # the host may read values: sizes are those of the plan and its trees
    num_rows: int  # B, padding included
    num_own: int  # P, bound of the rows' own tokens
    num_tokens: int  # T, bound of own tokens and nodes; unused if exact
    num_nodes: int  # R, bound of roots and nodes; unused if exact
    num_columns: int  # of the block tables
    only_roots: bool  # every row's only own token is its root
    follows: bool  # roots may come from the previous step, on the device
    shape: TreeShape  # of the proposer's trees; ROOT: the proposer does not run
    num_known: int  # K, tokens of the longest known draft
    draws: bool  # False: no row samples
    any_sampled: bool
    any_greedy: bool
    is_filtered: bool  # some row has top-k, top-p or min-p
    is_penalised: bool
    is_masked: bool  # some row may not have any token, such as one with a grammar
    num_bias: int  # M, entries of the longest list of logit changes
    num_top: int  # alternatives reported with log-probabilities; -1: no row asked
    num_named: int  # L, most tokens that a row wants to be reported besides
    num_echo: int  # S, prompt tokens that are scored
    num_echo_top: int
    num_pooled: int  # prompt tokens whose hidden states are wanted
    num_pools: int  # G, rows that have such tokens

    @property
    def max_nodes(self) -> int:
        """N, of one tree."""
        return max(self.shape.num_nodes, 1 + self.num_known)

    @property
    def max_depth(self) -> int:
        return max(self.shape.max_depth, self.num_known)

    @property
    def max_queries(self) -> int:
        """Bound of the tokens and nodes of one row."""
        return self.max_nodes if self.only_roots else self.num_tokens


@dataclass(frozen=True, slots=True)
class Sizes:
    """Rounds the sizes of a step: up to a few values where steps are captured as graphs; not at all
    on a CPU, where computing padding costs more than it saves."""

    exact: bool
    max_num_seqs: int

    def rows(self, count: int) -> int:
        if self.exact:
            return count
        return next(n for n in row_counts(self.max_num_seqs) if n >= count)

    def tokens(self, count: int) -> int:
        """Four sizes per power of two: at most a fifth is padding."""
        if self.exact:
            return count
        count = max(count, 16)
        step = 1 << ((count - 1).bit_length() - 3)
        return -(-count // step) * step

    def entries(self, count: int) -> int:
        """Length of a list: a power of two, 0 stays 0."""
        return count if self.exact or count == 0 else max(8, 1 << (count - 1).bit_length())


def row_counts(max_num_seqs: int) -> tuple[int, ...]:
    """Numbers of rows to which steps are padded."""
    return (*(n for n in FIRST_ROWS if n < max_num_seqs), max_num_seqs)
