"""AdamW with warm-up and cosine, over gradients that may come from several processes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.training import OptimizerConfig


def rate_at(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """The learning rate of optimizer step `step`, counted from 0: linear up to its full value, then
    a cosine down to `final_share` of it."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    span = max(1, num_steps - config.warmup_steps)
    share = min(1.0, (step - config.warmup_steps) / span)
    low = config.final_share
    return config.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * share)) / 2)


class HeadOptimizer:
    """Steps the parameters of a head that take gradients."""

    def __init__(self, network: nn.Module, config: OptimizerConfig, num_steps: int) -> None:
        self._config = config
        self._num_steps = num_steps
        self._named = {n: p for n, p in network.named_parameters() if p.requires_grad}
        decayed = [p for p in self._named.values() if p.dim() > 1]
        others = [p for p in self._named.values() if p.dim() <= 1]  # norms and biases
        self._adam = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
        )

    def step(self, index: int, num_tokens: float) -> float:
        """Divide the summed gradients by `num_tokens`, clip, and take step `index`. Returns the
        gradients' norm before clipping; a norm that is not finite changes no weight."""
        for parameter in self._named.values():
            if parameter.grad is not None:
                parameter.grad /= num_tokens
        norm = float(nn.utils.clip_grad_norm_(self._named.values(), self._config.max_norm))
        if math.isfinite(norm):
            rate = rate_at(index, self._num_steps, self._config)
            for group in self._adam.param_groups:
                group["lr"] = rate
            self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Moments and counts by parameter name, flat."""
        return {
            f"{name}.{key}": value
            for name, parameter in self._named.items()
            for key, value in self._adam.state[parameter].items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take what `state` gave. ValueError if it is of another network."""
        state: dict[Tensor, dict[str, Tensor]] = {p: {} for p in self._named.values()}
        for name, tensor in tensors.items():
            owner, _, key = name.rpartition(".")
            if owner not in self._named:
                raise ValueError(f"optimizer state of an unknown parameter {owner!r}")
            wanted = () if key == "step" else self._named[owner].shape
            if tensor.shape != wanted:
                raise ValueError(
                    f"optimizer state {name!r} has shape {list(tensor.shape)}, not {list(wanted)}"
                )
            place = "cpu" if key == "step" else self._named[owner].device
            state[self._named[owner]][key] = tensor.to(place)
        self._adam.state.update(state)


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Add up each tensor over all processes, in place; one exchange for all of a dtype."""
    if not dist.is_initialized():
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for some in by_dtype.values():
        flat = torch.cat([tensor.flatten() for tensor in some])
        dist.all_reduce(flat)
        first = 0
        for tensor in some:
            tensor.copy_(flat[first : first + tensor.numel()].view_as(tensor))
            first += tensor.numel()
