"""The results of a draft head's evaluation, as stored on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec


@dataclass(frozen=True, slots=True)
class Measurement:
    """One tree at one temperature.

    `acceptance_length` is the mean number of tokens that a verified tree emits, the bonus token
    counted; steps without a draft are left out. Tokens after the end of a text do not count.
    """

    tree: str
    temperature: float
    shared_noise: bool
    num_drafts: int  # trees that were verified
    acceptance_length: float
    reached: tuple[float, ...]  # [d]: share of trees whose accepted path has depth d + 1 or more
    conditional: tuple[float, ...]  # [d]: reached[d] / reached[d - 1], as far as any path reached
    num_tokens: int
    tokens_per_second: float
    speedup: float  # against the root alone, same questions, same run
    num_changed: int  # answers that differ from plain decoding; native kernels: none
    lookup: bool = False  # also chains of prompt lookup, where they promise more


@dataclass(frozen=True, slots=True)
class Report:
    """The measurements and their conditions: the JSON that `aerie eval-draft` writes."""

    target: str
    draft: str
    dtype: str
    device: str
    prompts: str
    num_prompts: int
    num_turns: int
    output_tokens: int
    batch: int
    measurements: list[Measurement]
    # The acceptance length by what the head's ids of target layers could mean, if it was measured:
    # of the first tree, at the first temperature
    by_aux_layers: dict[str, float] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")

    @classmethod
    def read(cls, path: Path) -> Report:
        """ValueError, naming the file, unless it holds a report."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except msgspec.DecodeError as error:
            raise ValueError(f"{path} is not a report of eval-draft: {error}") from error
