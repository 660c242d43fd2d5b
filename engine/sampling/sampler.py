"""Draw one token at every node, and say how likely it was."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.messages import TokenLogprob
from engine.transfer import download
from kernels.ops import Ops
from kernels.sampling.pipeline_reference import DrawSettings


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
        normaliser = self.ops.logsumexp(logits)  # [R]
        chosen = logits.gather(1, tokens[:, None])[:, 0] - normaliser
        if num_top == 0:
            ids, values = (part.tolist() for part in download((tokens, chosen)))
            return [TokenLogprob(*pair, []) for pair in zip(ids, values, strict=True)]
        best = logits.topk(num_top, dim=1)
        scores = best.values - normaliser[:, None]
        found = download((tokens, chosen, best.indices, scores))
        ids, values, top_ids, top_values = (part.tolist() for part in found)
        tops = [list(zip(*row, strict=True)) for row in zip(top_ids, top_values, strict=True)]
        return [TokenLogprob(*entry) for entry in zip(ids, values, tops, strict=True)]
