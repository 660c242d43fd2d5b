"""Linear layers in plain torch. The packed layout is the weight itself."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.ops import LinearWeight


def pack_linear(weight: Tensor, bias: Tensor | None) -> LinearWeight:
    """weight [N, K], bias [N] float32 or None."""
    return LinearWeight(weight.contiguous(), bias, *weight.shape)


def linear(x: Tensor, weight: LinearWeight) -> Tensor:
    """x [T, K] -> [T, N] in x's dtype. Products are summed in float32 or wider."""
    if weight.bias is None:
        return F.linear(x, weight.data.to(x.dtype))
    return F.linear(x, weight.data.to(x.dtype), weight.bias.to(x.dtype))


def embedding_float32(token_ids: Tensor, weight: LinearWeight) -> Tensor:
    """Rows of the weight for each token id, [T, K] float32."""
    return weight.data[token_ids].float()


def embedding_as_stored(token_ids: Tensor, weight: LinearWeight) -> Tensor:
    """Rows of the weight for each token id, [T, K] in the weight's dtype."""
    return weight.data[token_ids]
