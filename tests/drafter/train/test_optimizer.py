"""The schedule, clipping, weight decay and saved state of the optimizer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from configs.training import OptimizerConfig
from drafter.train.optimizer import HeadOptimizer, by_clock, by_steps

PLAIN = OptimizerConfig(warmup_steps=0, learning_rate=0.1, weight_decay=0.0, max_norm=100.0)


class Headed(nn.Module):
    """Parameters with names that decide which optimizer updates them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3, bias=False)
        self.norm = nn.Parameter(torch.ones(3))
        self.mask_hidden = nn.Parameter(torch.ones(1, 1, 4))  # a vector, in P-EAGLE's shape
        self.lm_head = nn.Linear(3, 5, bias=False)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        nn.init.constant_(self.linear.weight, 0.5)
        nn.init.constant_(self.linear.bias, 0.5)


def take_step(optimizer: HeadOptimizer, index: int, num_tokens: float) -> float:
    norm = float(optimizer.clip(torch.tensor(num_tokens, dtype=torch.float64)))
    optimizer.step(index, norm)
    return norm


def put_gradients(network: nn.Module, value: float) -> None:
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, value)


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_the_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, final_share=0.1)
    rates = [by_steps(config, 12)(step) for step in range(14)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx(2.0 * (0.1 + 0.9 / 2))  # half of the way
    assert rates[6] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    assert rates[12:] == pytest.approx([0.2, 0.2])
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_by_the_clock_the_rate_falls_with_time_whatever_the_step() -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, final_share=0.1)
    now = 0.0
    rate = by_clock(config, lambda: now)
    assert [rate(step) for step in (0, 1, 3, 50)] == [0.5, 1.0, 2.0, 2.0]
    now = 0.5
    assert rate(50) == rate(9) == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    now = 1.2  # a step that began before the end
    assert rate(50) == pytest.approx(0.2)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (5, 5), (9, 3)])
def test_short_runs_have_a_rate(warmup: int, steps: int) -> None:
    config = OptimizerConfig(warmup_steps=warmup)
    assert all(0 < by_steps(config, steps)(step) <= 1e-3 for step in range(steps))


def test_steps_are_those_of_adamw_at_the_scheduled_rate() -> None:
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=2, weight_decay=0.3, max_norm=1e9)
    ours, theirs = Small(), Small()
    optimizer = HeadOptimizer(ours, config, by_steps(config, 5))
    groups = [
        {"params": [theirs.linear.weight], "weight_decay": 0.3},
        {"params": [theirs.norm, theirs.linear.bias], "weight_decay": 0.0},
    ]
    judge = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2))
    for step in range(5):
        put_gradients(ours, 6.0 + step)
        put_gradients(theirs, (6.0 + step) / 3)  # a mean over three tokens
        take_step(optimizer, step, 3.0)
        for group in judge.param_groups:
            group["lr"] = by_steps(config, 5)(step)
        judge.step()
    for name, tensor in weights(theirs).items():
        assert torch.allclose(tensor, weights(ours)[name], atol=1e-6), name


def test_norms_and_biases_do_not_decay() -> None:
    network = Small()
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    put_gradients(network, 0.0)
    take_step(HeadOptimizer(network, config, by_steps(config, 10)), 0, 1.0)
    assert torch.equal(network.norm, torch.ones(2))
    assert torch.equal(network.linear.bias, torch.full((2,), 0.5))
    assert torch.allclose(network.linear.weight, torch.full((2, 3), 0.5 * 0.95))


def test_gradients_are_clipped_after_the_division_by_tokens() -> None:
    """Adam's steps ignore a gradient's scale, so the test compares its moments."""
    network = Small()
    optimizer = HeadOptimizer(
        network,
        PLAIN.model_copy(update={"max_norm": 0.5}),
        by_steps(PLAIN.model_copy(update={"max_norm": 0.5}), 10),
    )
    put_gradients(network, 8.0)
    norm = take_step(optimizer, 0, 4.0)
    assert norm == pytest.approx(2.0 * math.sqrt(10))  # of 10 parameters, the frozen ones left out
    first = optimizer.state()["norm.exp_avg"] / (1 - PLAIN.beta1)
    assert torch.allclose(first, torch.full((2,), 0.5 / math.sqrt(10)), rtol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_changes_nothing(value: float) -> None:
    network = Small()
    optimizer = HeadOptimizer(network, PLAIN, by_steps(PLAIN, 10))
    put_gradients(network, 1.0)
    take_step(optimizer, 0, 1.0)
    before, moments = weights(network), {n: t.clone() for n, t in optimizer.state().items()}
    put_gradients(network, 1.0)
    assert network.norm.grad is not None
    network.norm.grad[1] = value
    assert not math.isfinite(take_step(optimizer, 1, 1.0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(network).items())
    assert all(torch.equal(t, moments[name]) for name, t in optimizer.state().items())
    assert network.norm.grad is None


def test_a_restored_state_continues_exactly() -> None:
    whole = Small()
    optimizer = HeadOptimizer(whole, PLAIN, by_steps(PLAIN, 10))
    assert optimizer.state() == {}
    for step in range(2):
        put_gradients(whole, 1.0 + step)
        take_step(optimizer, step, 1.0)
    other = Small()
    other.load_state_dict(weights(whole))
    again = HeadOptimizer(other, PLAIN, by_steps(PLAIN, 10))
    again.load_state({name: tensor.clone() for name, tensor in optimizer.state().items()})
    for network, each in ((whole, optimizer), (other, again)):
        put_gradients(network, 0.7)
        take_step(each, 2, 1.0)
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(whole).items())


def test_the_state_of_another_network_is_refused() -> None:
    optimizer = HeadOptimizer(Small(), PLAIN, by_steps(PLAIN, 10))
    with pytest.raises(ValueError, match="unknown parameter 'fc'"):
        optimizer.load_state({"fc.exp_avg": torch.ones(2)})
    with pytest.raises(ValueError, match=r"'norm.exp_avg' has shape \[3\], not \[2\]"):
        optimizer.load_state({"norm.exp_avg": torch.ones(3)})


def test_muon_steps_matrices_but_neither_the_lm_head_nor_vectors_and_survives_a_round_trip() -> (
    None
):
    config = PLAIN.model_copy(update={"matrices": "muon", "muon_factor": 3.0})
    torch.manual_seed(0)
    ours, again = Headed(), Headed()
    again.load_state_dict(ours.state_dict())
    judge = {name: nn.Parameter(tensor.clone()) for name, tensor in ours.named_parameters()}
    muon = torch.optim.Muon([judge["fc.weight"]], weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    rest = [judge[name] for name in ("norm", "mask_hidden", "lm_head.weight")]
    adam = torch.optim.AdamW(rest, weight_decay=0.0, betas=(config.beta1, config.beta2))
    optimizer = HeadOptimizer(ours, config, by_steps(config, 4))
    for step in range(4):
        if step == 2:  # another process continues from the saved state
            resumed = HeadOptimizer(again, config, by_steps(config, 4))
            resumed.load_state({name: t.clone() for name, t in optimizer.state().items()})
            again.load_state_dict(ours.state_dict())
            ours, optimizer = again, resumed
        for name, parameter in ours.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            judge[name].grad = parameter.grad.clone()
        take_step(optimizer, step, 1.0)
        for other, factor in ((muon, 3.0), (adam, 1.0)):
            other.param_groups[0]["lr"] = factor * by_steps(config, 4)(step)
            other.step()
    for name, tensor in ours.named_parameters():
        assert torch.allclose(tensor, judge[name], atol=1e-6), name
