"""Facts of a training run that publishing needs besides the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from drafter.heads.config import HeadConfig
from drafter.train.history import write_whole
from engine.checkpoints.arch import LlamaArch


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A JSON file beside the checkpoints."""

    fingerprint: str  # of the checkpoints that it belongs to
    num_processes: int
    target: LlamaArch
    head: HeadConfig
    target_ids: list[int] | None  # [Vd] the draft vocabulary; None: the target's
    coverage: float | None  # 0..1, share of answer tokens in the draft vocabulary

    def write(self, path: Path) -> None:
        """OSError if it cannot be written; an earlier record stays."""
        write_whole(path, msgspec.json.encode(self) + b"\n")

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """ValueError, naming the file, if it is missing or damaged."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            raise ValueError(f"{path} is not the record of a training run: {error}") from error
