"""The frozen target's features of a text equal those of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from drafter.train.data import target as module
from drafter.train.data.target import FrozenTarget, TargetFeatures
from engine.checkpoints.arch import LlamaArch
from engine.models.llama import LlamaLoader
from engine.models.place import Place
from engine.step.taps import LAST_OUTPUT
from engine.step.texts import BLOCK_SIZE
from kernels.ops import Ops
from tests.support.engines.tiny_engine import CPU, random_llama

LAYERS, VOCAB = 5, 131
TOLERANCE = 1e-4
LENGTHS = (1, BLOCK_SIZE, BLOCK_SIZE + 1, 3, 70)


@pytest.fixture(params=["reference", "native"])
def ops(request: pytest.FixtureRequest) -> Ops:
    found: Ops = request.getfixturevalue(f"{request.param}_ops")
    return found


@pytest.fixture(scope="module")
def oracle() -> LlamaForCausalLM:
    return random_llama(num_hidden_layers=LAYERS)


def frozen(oracle: LlamaForCausalLM, ops: Ops, taps: tuple[int, ...]) -> FrozenTarget:
    arch = LlamaArch.from_hf_config(oracle.config.to_dict())
    read = oracle.state_dict().__getitem__
    model = LlamaLoader(arch, read, Place(ops, torch.float32, CPU), max(LENGTHS)).load()
    return FrozenTarget(model, ops, taps, torch.float32)


def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def features(target: FrozenTarget, asked: list[list[int]]) -> list[TargetFeatures]:
    """Of each text."""
    return target.features(asked).split([len(text) for text in asked])


@pytest.mark.parametrize("taps", [(0, 2, 4), (4, 1), (LAYERS,), (1, LAST_OUTPUT)])
@torch.no_grad()
def test_features_are_those_of_transformers(
    taps: tuple[int, ...], ops: Ops, oracle: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGIT_ROWS", {"cpu": 7})
    last: list[torch.Tensor] = []
    oracle.model.layers[-1].register_forward_hook(lambda *call: last.append(call[-1]))
    for text, found in zip(texts(), features(frozen(oracle, ops, taps), texts()), strict=True):
        expected = oracle(torch.tensor([text]), output_hidden_states=True)
        states = [state[0] for state in expected.hidden_states]  # inputs of layers; the last normed
        close = {"atol": TOLERANCE, "rtol": TOLERANCE}
        at = dict(enumerate(states)) | {LAST_OUTPUT: last[-1][0]}
        wanted = torch.cat([at[layer] for layer in taps], dim=-1)
        torch.testing.assert_close(found.taps, wanted, **close)
        torch.testing.assert_close(found.hidden, states[-1], **close)
        assert found.best.dtype == torch.int32
        assert torch.equal(found.best.long(), expected.logits[0].argmax(dim=-1))


def test_texts_together_equal_each_alone(ops: Ops, oracle: LlamaForCausalLM) -> None:
    target, alone = frozen(oracle, ops, (0, 3)), frozen(oracle, ops, (0, 3))
    long, together = texts()[::-1], features(target, texts()[::-1])
    for text, found in zip(long, together, strict=True):
        assert_equal(found, alone.features([text]))
    again = features(target, long[2:])  # in pages that hold longer texts
    for first, found in zip(together[2:], again, strict=True):
        assert_equal(first, found)


def assert_equal(one: TargetFeatures, other: TargetFeatures) -> None:
    torch.testing.assert_close(one.taps, other.taps, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(one.hidden, other.hidden, atol=TOLERANCE, rtol=TOLERANCE)
    assert torch.equal(one.best, other.best)


def test_features_have_the_storage_dtype_and_take_no_gradient(
    reference_ops: Ops, oracle: LlamaForCausalLM
) -> None:
    target = frozen(oracle, reference_ops, (1,))
    narrow = FrozenTarget(target._model, reference_ops, (1,), torch.bfloat16)
    found = narrow.features([[5, 6, 7]])
    assert (found.taps.dtype, found.hidden.dtype) == (torch.bfloat16, torch.bfloat16)
    assert not found.taps.requires_grad
    assert not found.hidden.requires_grad
