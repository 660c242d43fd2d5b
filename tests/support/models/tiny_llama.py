"""Tiny random Llamas as Hugging Face directories, with tokenizer and chat template, so that
complete servers can run on them."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS, BOS = 2, 1  # <|im_end|> and <|im_start|>
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRAINING_TEXT = (
    "the quick brown fox jumps over the lazy dog",
    "a server answers many clients at once and never loses a token",
    "def main():\n    return 42\n",
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class TinyLlama:
    """The model to build. Vocabularies below 320 leave no room for merges beyond the 256 bytes."""

    vocab_size: int = 384
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    hidden_size: int = 64
    intermediate_size: int = 128
    max_position_embeddings: int = 512
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    llama3_rope: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0
    shard_bytes: int | None = None  # split the weights into files of at most this size

    def config(self) -> LlamaConfig:
        rope = LLAMA3_ROPE if self.llama3_rope else {"rope_type": "default", "rope_theta": 1e4}
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_position_embeddings,
            rope_parameters=dict(rope),
            rms_norm_eps=1e-5,
            tie_word_embeddings=self.tied,
            attention_bias=self.attention_bias,
            mlp_bias=self.mlp_bias,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )


def random_model(spec: TinyLlama) -> LlamaForCausalLM:
    """Weights large enough that logits differ by token; equal for equal `spec`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = LlamaForCausalLM(spec.config()).eval()
        for name, parameter in model.named_parameters():
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            torch.nn.init.normal_(parameter, mean, 0.15)
        return model.to(spec.dtype)


def write_tiny_llama(folder: Path, spec: TinyLlama | None = None) -> LlamaForCausalLM:
    """Write a complete model to `folder`; return it as loaded by transformers."""
    spec = spec or TinyLlama()
    model = random_model(spec)
    limit = {} if spec.shard_bytes is None else {"max_shard_size": spec.shard_bytes}
    model.save_pretrained(folder, **limit)
    write_tokenizer(folder, spec.vocab_size)
    return model


def write_tokenizer(folder: Path, vocab_size: int = 384) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    (folder / "tokenizer.json").write_text(_tokenizer_json(vocab_size), encoding="utf-8")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[BOS],
        "eos_token": SPECIALS[EOS],
        "pad_token": SPECIALS[0],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


@functools.cache
def _tokenizer_json(vocab_size: int) -> str:
    """Byte-level BPE with every byte, the special tokens first, and as many merges as fit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(text, special=True) for text in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return str(tokenizer.to_str())
