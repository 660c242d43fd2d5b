"""Draw one token at every node, and say how likely it was."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.messages import TokenLogprob
from engine.transfer import download
from kernels.ops import Ops
from kernels.sampling.pipeline_reference import DrawSettings


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-probabilities of R tokens, and of the best alternatives to each."""

    chosen: Tensor  # [R]
    top_ids: Tensor  # [R, k] int64
    top: Tensor  # [R, k]

    def entries(self, tokens: Tensor) -> list[TokenLogprob]:
        """As clients hear it, for `tokens` [R]."""
        found = download((tokens, self.chosen, self.top_ids, self.top))
        ids, chosen, top_ids, top = (part.tolist() for part in found)
        tops = [list(zip(*pair, strict=True)) for pair in zip(top_ids, top, strict=True)]
        return [TokenLogprob(*entry) for entry in zip(ids, chosen, tops, strict=True)]


@dataclass(frozen=True, slots=True)
class Sampler:
    """Stateless: the same logits and parameters give the same tokens on every rank and step."""

    ops: Ops

    def draw(self, logits: Tensor, settings: DrawSettings) -> Tensor:
        """[R, V] float32 logits -> [R] int64 tokens: argmax(log p + noise of seed and position)."""
        return self.ops.draw(logits, settings)

    def logprobs(self, logits: Tensor, tokens: Tensor, num_top: int) -> list[TokenLogprob]:
        """Log-probabilities of `tokens` [R] under the raw `logits` [R, V], with the best `num_top`
        alternatives of each: what the model believed, before penalties and temperature."""
        return self.scores(logits, tokens, num_top).entries(tokens)

    def scores(self, logits: Tensor, tokens: Tensor, num_top: int) -> TokenScores:
        """The same as tensors."""
        normaliser = self.ops.logsumexp(logits)  # [R]
        chosen = logits.gather(1, tokens[:, None])[:, 0] - normaliser
        best = logits.topk(num_top, dim=1)
        return TokenScores(chosen, best.indices, best.values - normaliser[:, None])
