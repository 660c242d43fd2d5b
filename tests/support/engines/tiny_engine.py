"""The real engine with a tiny random Llama."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import Llama4ForCausalLM, LlamaConfig, LlamaForCausalLM

from configs.resolve import with_sizes
from configs.schema import (
    CacheConfig,
    Config,
    ModelConfig,
    SchedulerConfig,
    SpeculationConfig,
)
from engine.checkpoints.families import read_text_model
from engine.core import EngineCore
from engine.grammar.grammars import Grammars
from engine.models.families import load_target
from engine.models.place import Place
from engine.runner.runner import StepSettings
from kernels.ops import Ops
from server.assembly.compose import assemble
from server.assembly.drafting import Drafting, Target
from tests.support.configurations import hosted

CPU = torch.device("cpu")
EOS = 2


def random_llama(seed: int = 7, **changes: object) -> LlamaForCausalLM:
    """A float32 model with weights large enough that its logits differ."""
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

    oracle: LlamaForCausalLM | Llama4ForCausalLM
    ops: Ops
    num_blocks: int = 128
    prefix_caching: bool = True
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 64
    max_model_len: int = 256
    eos_token_ids: frozenset[int] = frozenset({EOS})
    drafting: Drafting | None = None
    device: torch.device = CPU
    padded: bool = False  # padded steps, as on a GPU
    run_ahead: bool = False  # with `padded`
    lookup: bool = False
    grammars: Callable[[], Grammars] | None = None

    @property
    def place(self) -> Place:
        return Place(self.ops, torch.float32, self.device)

    def build(self) -> EngineCore:
        arch = read_text_model(self.oracle.config.to_dict()).arch
        read = self.oracle.state_dict().__getitem__
        model = load_target(arch, read, self.place, self.max_model_len)
        config = Config(
            model=ModelConfig(dtype="float32"),
            cache=CacheConfig(prefix_caching=self.prefix_caching),
            scheduler=SchedulerConfig(
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=self.max_num_batched_tokens,
                run_ahead=self.run_ahead,
            ),
            speculation=SpeculationConfig(lookup=self.lookup),
        )
        sizes = {"max_model_len": self.max_model_len, "num_blocks": self.num_blocks}
        resolved = with_sizes(hosted(config), **sizes)
        target = Target(model, arch, self.eos_token_ids)
        exact = self.device == CPU and not self.padded
        grammars = None if self.grammars is None else self.grammars()
        steps = StepSettings(exact)
        return assemble(resolved, target, self.place, self.drafting, steps, grammars)
