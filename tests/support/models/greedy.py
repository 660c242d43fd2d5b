"""transformers as the oracle of greedy decoding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Llama4ForCausalLM, LlamaForCausalLM


@torch.inference_mode()
def greedy_margins(
    oracle: LlamaForCausalLM | Llama4ForCausalLM,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
) -> Tensor:
    """How far the logit of each output token lies above that of every other token, [len(output)].

    One forward over prompt and output. If all are positive, the output is that of greedy decoding,
    by induction over its tokens; the smallest one shows how near a tie was.
    """
    tokens = torch.tensor(output_ids)[:, None]
    ids = torch.tensor([[*prompt_ids, *output_ids[:-1]]])
    logits = oracle(ids, logits_to_keep=len(output_ids)).logits[0].float()  # [O, V]
    others = logits.scatter(1, tokens, -torch.inf).amax(dim=1)
    return logits.gather(1, tokens)[:, 0] - others
