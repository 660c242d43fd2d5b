"""AdamW or Muon with warm-up and cosine decay; gradients may come from several processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.training import OptimizerConfig
from drafter.manifest import LM_HEAD

Rate = Callable[[int], float]  # optimizer step, counted from 0 -> learning rate


def by_steps(config: OptimizerConfig, num_steps: int) -> Rate:
    """The rate rises linearly to its full value, then falls as a cosine to `final_share` of it,
    which it reaches after `num_steps`."""
    span = max(1, num_steps - config.warmup_steps)
    return lambda step: _rate(config, step, (step - config.warmup_steps) / span)


def by_clock(config: OptimizerConfig, elapsed: Callable[[], float]) -> Rate:
    """The same shape over time instead of steps. `elapsed` tells which share of it, 0 to 1, is
    over; only the rise is counted in steps."""
    return lambda step: _rate(config, step, elapsed())


def _rate(config: OptimizerConfig, step: int, share: float) -> float:
    """The rate of step `step` when `share` of its fall is over."""
    low = config.final_share
    fallen = low + (1 - low) * (1 + math.cos(math.pi * min(1.0, max(0.0, share)))) / 2
    return config.learning_rate * fallen * min(1.0, (step + 1) / max(1, config.warmup_steps))


class HeadOptimizer:
    """Updates a head's trainable parameters: all by AdamW, or the matrices of `fc` and layers by
    Muon (Jordan et al. 2024), whose steps are scaled to AdamW's size."""

    def __init__(self, network: nn.Module, config: OptimizerConfig, rate: Rate) -> None:
        self._config = config
        self._rate = rate
        self._named = {n: p for n, p in network.named_parameters() if p.requires_grad}
        self._on_cuda = all(p.device.type == "cuda" for p in self._named.values())
        by_muon, decayed, others = self._shared_out()
        self._optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (
                torch.optim.AdamW(
                    [
                        {"params": decayed, "weight_decay": config.weight_decay},
                        {"params": others, "weight_decay": 0.0},
                    ],
                    lr=config.learning_rate,
                    betas=(config.beta1, config.beta2),
                    fused=self._on_cuda,
                ),
                1.0,
            )
        ]
        if by_muon:
            muon = torch.optim.Muon(
                by_muon, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            self._optimizers.append((muon, config.muon_factor))

    def _shared_out(self) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
        """Parameters for Muon, for AdamW with decay, and for AdamW without: norms, biases and
        a P-EAGLE head's learnt feature."""
        by_muon, decayed, others = [], [], []
        for name, parameter in self._named.items():
            if parameter.dim() != 2:
                others.append(parameter)
            elif self._config.matrices == "muon" and name != LM_HEAD:
                by_muon.append(parameter)
            else:
                decayed.append(parameter)
        return by_muon, decayed, others

    def clip(self, num_tokens: Tensor) -> Tensor:
        """Divide the summed gradients by `num_tokens` and clip them. Returns their norm before
        clipping, where they are: the host does not wait."""
        for parameter in self._named.values():
            if parameter.grad is not None:
                parameter.grad /= num_tokens
        return nn.utils.clip_grad_norm_(self._named.values(), self._config.max_norm)

    def step(self, index: int, norm: float) -> None:
        """Take step `index` with clipped gradients of this norm, and drop them. If it is not
        finite, no weight changes."""
        if math.isfinite(norm):
            rate = self._rate(index)
            for optimizer, factor in self._optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * factor
                optimizer.step()
        for optimizer, _ in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Moments and counts by parameter name, flat."""
        return {
            f"{name}.{key}": value
            for name, parameter in self._named.items()
            for optimizer, _ in self._optimizers
            for key, value in optimizer.state.get(parameter, {}).items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore the result of `state`. ValueError if it belongs to another network."""
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
            on_host = key == "step" and not self._on_cuda  # where AdamW keeps it
            place = "cpu" if on_host else self._named[owner].device
            state[self._named[owner]][key] = tensor.to(place)
        for optimizer, _ in self._optimizers:
            for group in optimizer.param_groups:
                optimizer.state.update({p: state[p] for p in group["params"] if state[p]})


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over all processes, in place; all tensors of a dtype share one exchange."""
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
