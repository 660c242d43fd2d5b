"""Limits of the scheduler."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Limits of one step and of one sequence."""

    max_num_seqs: int  # running sequences
    max_num_batched_tokens: int  # tokens in one step
    max_model_len: int  # prompt + output tokens of one sequence
    token_time: float | None = None  # seconds: goal for steps that decode and compute prompts

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, max_num_seqs is "
                f"{self.max_num_seqs}: a step must have room for one token of every sequence"
            )
