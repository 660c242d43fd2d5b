"""Trainable heads with the weights of published layouts, and batches of random texts for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from drafter import manifest
from drafter.heads.config import HeadConfig
from drafter.train.head.network import DraftNetwork, Eagle3Network, EagleNetwork
from drafter.train.head.unroll import TrainBatch, UnrolledStep, plan_unrolling, unroll
from tests.drafter.published_heads import DRAFT_VOCAB, HIDDEN, LAYOUTS, VOCAB, Layout, named

MAX_LEN = 40
TRAINABLE = {name: layout for name, layout in LAYOUTS.items() if layout.is_trainable} | {
    "eagle3-of-two-layers": Layout(
        "eagle3",
        named("LlamaForCausalLMEagle3", draft_vocab_size=DRAFT_VOCAB, num_hidden_layers=2),
        num_layers=2,
        draft_vocab=DRAFT_VOCAB,
        mapped=True,
        own=("lm_head",),
    )
}
ONE_OF_EACH_KIND = ("reference-eagle", "meta-dense", "eagle3-of-two-layers")


def config_of(layout: Layout) -> HeadConfig:
    config = HeadConfig.from_json(layout.config)
    return dataclasses.replace(config, fc_bias=layout.fc_bias)


def network_of(layout: Layout, embedding: Tensor, lm_head: Tensor) -> DraftNetwork:
    """A network with the weights of `layout`, and the given ones where it has none of its own."""
    config, weights = config_of(layout), layout.tensors()
    embedding = weights.pop(manifest.EMBEDDING, embedding)
    network: DraftNetwork
    if layout.kind == "eagle3":
        network = Eagle3Network(config, embedding, MAX_LEN)
    else:
        head = weights.pop(manifest.LM_HEAD, lm_head)
        network = EagleNetwork(config, embedding, head, MAX_LEN, layout.kind == "dense")
    kept = {n: t for n, t in weights.items() if n not in (manifest.D2T, manifest.T2D)}
    network.load_state_dict(kept)
    return network


def random_batch(
    layout: Layout, lengths: Sequence[int], answers: Sequence[Sequence[range]], seed: int = 1
) -> TrainBatch:
    """Texts of these lengths with answer tokens at `answers`; zeros after their ends."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    inside = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    width = HIDDEN * (layout.num_taps if layout.kind == "eagle3" else 1)
    is_answer = torch.zeros(shape, dtype=torch.bool)
    for row, spans in enumerate(answers):
        for span in spans:
            is_answer[row, span.start : span.stop] = True
    hidden = torch.randn(*shape, HIDDEN, generator=generator) * inside[..., None]
    taps = torch.randn(*shape, width, generator=generator) * inside[..., None]
    return TrainBatch(
        token_ids=torch.randint(VOCAB, shape, generator=generator) * inside,
        is_answer=is_answer,
        starts=torch.zeros(shape, dtype=torch.int64),
        taps=taps if layout.kind == "eagle3" else hidden.clone(),
        hidden=hidden,
        best=torch.randint(VOCAB, shape, generator=generator) * inside,
    )


def unrolled(network: DraftNetwork, batch: TrainBatch, num_steps: int) -> Iterator[UnrolledStep]:
    return unroll(network, batch, plan_unrolling(batch, num_steps))
