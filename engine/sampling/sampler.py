"""Draw one token at every node, and say how likely it was."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.messages import TokenLogprob
from engine.sampling.batch import SamplingBatch
from engine.sampling.logits import edit_logits, filter_logits
from kernels.ops import Ops
from kernels.sampling.reference import noise_keys


@dataclass(frozen=True, slots=True)
class Sampler:
    """Stateless: the same logits and parameters give the same tokens on every rank and step."""

    ops: Ops

    def draw(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """[R, V] float32 logits -> [R] int64 tokens: argmax(log p + noise of seed and position)."""
        logits = edit_logits(logits, batch)
        if not batch.any_sampled:
            return self.ops.argmax(logits)
        if not batch.any_greedy:
            return self._draw_sampled(logits, batch, slice(None))
        drawn = self.ops.argmax(logits)
        rows = (batch.temperature > 0).nonzero()[:, 0]
        drawn[rows] = self._draw_sampled(logits[rows], batch, rows)
        return drawn

    def _draw_sampled(self, logits: Tensor, batch: SamplingBatch, rows: Tensor | slice) -> Tensor:
        scaled = logits / batch.temperature[rows, None]
        if batch.any_filtered:
            scaled = filter_logits(scaled, batch.top_k[rows], batch.top_p[rows], batch.min_p[rows])
        keys = noise_keys(batch.seeds[rows], batch.positions[rows])
        return self.ops.gumbel_argmax(scaled, keys)

    def logprobs(self, logits: Tensor, tokens: Tensor, num_top: int) -> list[TokenLogprob]:
        """Log-probabilities of `tokens` [R] under the raw `logits` [R, V], with the best `num_top`
        alternatives of each: what the model believed, before penalties and temperature."""
        normaliser = self.ops.logsumexp(logits)  # [R]
        chosen = (logits.gather(1, tokens[:, None])[:, 0] - normaliser).tolist()
        ids = tokens.tolist()
        if num_top == 0:
            return [TokenLogprob(*pair, []) for pair in zip(ids, chosen, strict=True)]
        best = logits.topk(num_top, dim=1)
        values = (best.values - normaliser[:, None]).tolist()
        tops = [
            list(zip(top_ids, row, strict=True))
            for top_ids, row in zip(best.indices.tolist(), values, strict=True)
        ]
        return [TokenLogprob(*entry) for entry in zip(ids, chosen, tops, strict=True)]
