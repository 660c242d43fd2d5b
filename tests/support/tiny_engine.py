"""A tiny random Llama behind the real engine."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from configs.schema import (
    CacheConfig,
    Config,
    ModelConfig,
    SchedulerConfig,
    SpeculationConfig,
)
from engine.checkpoints.arch import LlamaArch
from engine.core import EngineCore
from engine.models.llama import LlamaLoader
from engine.runner.model_runner import ModelRunner
from engine.runner.rounds import RoundSettings
from kernels.ops import Ops
from server.assembly.compose import assemble
from server.assembly.drafting import Drafting, Target

CPU = torch.device("cpu")
EOS = 2


def random_llama(seed: int = 7, **changes: object) -> LlamaForCausalLM:
    """A float32 model whose weights are large enough for its logits to disagree with each other."""
    settings: dict[str, object] = {
        "vocab_size": 131,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "eos_token_id": EOS,
        "bos_token_id": 1,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, 0.0, 0.15)
    return model


@dataclass(frozen=True)
class TinyEngine:
    """How to build an engine around `oracle`; change a field with `dataclasses.replace`."""

    oracle: LlamaForCausalLM
    ops: Ops
    num_blocks: int = 128
    prefix_caching: bool = True
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 64
    max_model_len: int = 256
    eos_token_ids: frozenset[int] = frozenset({EOS})
    drafting: Drafting | None = None
    device: torch.device = CPU
    rounds: bool = False  # on a CPU too
    run_ahead: bool = False  # with `rounds`
    lookup: bool = False

    def build(self) -> EngineCore:
        arch = LlamaArch.from_hf_config(self.oracle.config.to_dict())
        read = self.oracle.state_dict().__getitem__
        loader = LlamaLoader(arch, read, self.ops, torch.float32, self.device, self.max_model_len)
        config = Config(
            model=ModelConfig(dtype="float32", max_model_len=self.max_model_len),
            cache=CacheConfig(num_blocks=self.num_blocks, prefix_caching=self.prefix_caching),
            scheduler=SchedulerConfig(
                max_num_seqs=self.max_num_seqs, max_num_batched_tokens=self.max_num_batched_tokens
            ),
            speculation=SpeculationConfig(lookup=self.lookup),
        )
        target = Target(loader.load(), arch, self.eos_token_ids)
        core = assemble(config, target, self.ops, self.device, self.drafting)
        if self.rounds:
            runner = core.executor
            assert isinstance(runner, ModelRunner)
            settings = RoundSettings(self.max_num_seqs, graphs=False)
            core.executor = runner = ModelRunner(replace(runner._parts, rounds=settings))
            if self.run_ahead:
                core.launch_with(runner)
        return core
