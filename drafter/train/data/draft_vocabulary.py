"""The draft vocabulary: the tokens that the target's answers use most."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from drafter.train.data.encoding import Example


@dataclass(frozen=True, slots=True)
class DraftVocabulary:
    """Ids in ascending order, and the share of answer tokens that they cover."""

    target_ids: Tensor  # [Vd] int64
    coverage: float  # 0..1


def count_answers(examples: Iterable[Example], vocab_size: int) -> Tensor:
    """How often each token is an answer token, [V] int64."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for example in examples:
        ids = torch.as_tensor(example.token_ids)[torch.as_tensor(example.is_answer)]
        counts += torch.bincount(ids, minlength=vocab_size)
    return counts


def choose(counts: Tensor, size: int) -> DraftVocabulary:
    """The `size` most frequent ids. Ties, even among tokens never seen, go to the lower id, since
    byte pair vocabularies list frequent tokens first."""
    if not 1 <= size <= len(counts):
        raise ValueError(f"draft_vocab_size {size} must be 1 to {len(counts)}, the vocabulary")
    total = int(counts.sum())
    if total == 0:
        raise ValueError("no example has an answer token: a draft vocabulary cannot be chosen")
    ids = counts.argsort(descending=True, stable=True)[:size].sort().values
    return DraftVocabulary(ids, int(counts[ids].sum()) / total)
