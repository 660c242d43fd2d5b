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
class TokenScores:
    """Log-probabilities of R tokens, and of the best alternatives to each."""

    chosen: Tensor  # [R]
    top_ids: Tensor  # [R, k] int64
    top: Tensor  # [R, k]

    def entries(self, tokens: Tensor) -> list[TokenLogprob]:
        """As clients hear it, for `tokens` [R]."""
        ids, chosen = tokens.tolist(), self.chosen.tolist()
        tops = [
            list(zip(*pair, strict=True))
            for pair in zip(self.top_ids.tolist(), self.top.tolist(), strict=True)
        ]
        return [TokenLogprob(*entry) for entry in zip(ids, chosen, tops, strict=True)]


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
        return self.scores(logits, tokens, num_top).entries(tokens)

    def scores(self, logits: Tensor, tokens: Tensor, num_top: int) -> TokenScores:
        """The same as tensors."""
        normaliser = self.ops.logsumexp(logits)  # [R]
        chosen = logits.gather(1, tokens[:, None])[:, 0] - normaliser
        best = logits.topk(num_top, dim=1)
        return TokenScores(chosen, best.indices, best.values - normaliser[:, None])
