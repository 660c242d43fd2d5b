"""A configuration becomes an engine, or an error that says why not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from configs.load import ConfigError, load_config
from configs.resolve import HostFacts, resolve_host
from configs.schema import Config
from kernels.native import build
from kernels.ops import Ops
from server.assembly.compose import build_engine, prepare_kernels
from tests.support.engines.in_process import ask, generate
from tests.support.machine.threads import own_torch_threads
from tests.support.models.tiny_llama import EOS, TinyLlama, random_model, write_tiny_llama

PROMPT = [5, 77, 300, 41, 8]
# Against float32 arithmetic on the same weights. A bfloat16 cache rounds keys and values, and that
# shows; float32 rounds nothing.
LOGPROB_ERROR = {"float32": (0.0, 1e-5), "bfloat16": (1e-4, 0.02)}


@pytest.fixture(autouse=True)
def _torch_threads() -> Iterator[None]:
    with own_torch_threads():
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete model in float32."""
    write_tiny_llama(tmp_path)
    return tmp_path


def configure(folder: Path, cache: Path, *overrides: str) -> Config:
    settings = [f"model.source={folder}", "model.dtype=float32", "cache.num_blocks=32", *overrides]
    return resolve_host(load_config(None, settings), HostFacts(2, cache))


def rounded_model(dtype: torch.dtype) -> LlamaForCausalLM:
    """The tiny model with weights of `dtype`, computing in float32. Only the weights are rounded:
    `model.to` would round rotary frequencies too."""
    model = random_model(TinyLlama())
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return model


def write_json(path: Path, **changes: object) -> None:
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(settings | changes))


def test_an_engine_reports_its_parts(folder: Path, native_cache: Path, native_ops: Ops) -> None:
    info = build_engine(configure(folder, native_cache)).info
    assert (info.vocab_size, info.max_model_len) == (384, 512)
    assert (info.num_blocks, info.block_size) == (32, 16)
    assert info.eos_token_ids == [EOS]
    assert info.ops_in_words == {name: str(own) for name, own in native_ops.backends.items()}
    assert not any(backend.is_fallback for backend in info.ops.values())
    assert info.device == "cpu"
    assert list(info.weights) == ["float32"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, [0, EOS]),
        ("{% for m in messages %}{{ m.content }}<|im_start|>{% endfor %}", [0, 1, EOS]),
    ],
)
def test_answers_end_with_the_ids_of_configuration_tokenizer_and_template(
    folder: Path, native_cache: Path, template: str | None, expected: list[int]
) -> None:
    write_json(folder / "config.json", eos_token_id=0)
    (folder / "generation_config.json").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    assert build_engine(configure(folder, native_cache)).info.eos_token_ids == expected


def test_a_model_without_a_tokenizer_ends_with_the_ids_of_its_configuration(
    folder: Path, native_cache: Path
) -> None:
    (folder / "tokenizer.json").unlink()
    assert build_engine(configure(folder, native_cache)).info.eos_token_ids == [EOS]


def test_unset_sizes_are_filled_in(folder: Path, native_cache: Path) -> None:
    config = configure(folder, native_cache, "cache.num_blocks=null", "scheduler.max_num_seqs=3")
    info = build_engine(config).info
    assert (info.max_model_len, info.num_blocks) == (512, 3 * 32)


def test_a_small_cache_bounds_an_unset_context(folder: Path, native_cache: Path) -> None:
    core = build_engine(configure(folder, native_cache, "cache.num_blocks=2"))
    assert core.info.max_model_len == 32
    heard = generate(core, [ask("a", PROMPT, max_tokens=99, ignore_eos=True)])
    assert len(heard["a"].token_ids) == 32 - len(PROMPT)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_held_in_the_dtype_that_is_asked_for(
    tmp_path: Path,
    native_cache: Path,
    native_ops: Ops,
    dtype: str,
    stored: torch.dtype,
    backend: str,
) -> None:
    spec = TinyLlama(dtype=stored)
    write_tiny_llama(tmp_path, spec)
    options = (f"model.dtype={dtype}", f"kernels.backend={backend}")
    core = build_engine(configure(tmp_path, native_cache, *options))
    prompts = {f"p{length}": PROMPT * length for length in (1, 3, 9)}
    requests = [ask(name, ids, logprobs=0, max_tokens=1) for name, ids in prompts.items()]
    oracle = rounded_model(torch.bfloat16 if dtype == "bfloat16" else stored)
    errors = []
    for name, completion in generate(core, requests).items():
        with torch.inference_mode():
            expected = oracle(torch.tensor([prompts[name]])).logits[0, -1].log_softmax(-1)
        (entry,) = completion.logprobs
        errors.append(abs(entry.logprob - float(expected[entry.token_id])))
    smallest, largest = LOGPROB_ERROR[dtype]
    assert smallest <= max(errors) < largest


@pytest.mark.parametrize(("backend", "num_threads"), [("native", 1), ("reference", 3)])
@pytest.mark.usefixtures("native_ops")
def test_torch_leaves_the_cores_to_native_operations(
    folder: Path, native_cache: Path, backend: str, num_threads: int
) -> None:
    build_engine(configure(folder, native_cache, f"kernels.backend={backend}", "kernels.threads=3"))
    assert torch.get_num_threads() == num_threads


@pytest.mark.parametrize(
    ("override", "error", "explanation"),
    [
        ("model.source=/nowhere/at/all", FileNotFoundError, "no model at '/nowhere/at/all'"),
        ("model.source=nowhere.gguf", FileNotFoundError, "no model at 'nowhere.gguf'"),
        ("model.revision=main", ValueError, "model.revision 'main' is for hub ids only"),
        ("model.max_model_len=513", ConfigError, "max_model_len = 513: .* made for 512 tokens"),
        ("model.max_model_len=1000000000000000", ConfigError, "made for 512 tokens"),
        ("scheduler.max_num_batched_tokens=8", ValueError, "max_num_batched_tokens is 8"),
    ],
)
def test_an_impossible_setting_is_named(
    folder: Path, native_cache: Path, override: str, error: type[Exception], explanation: str
) -> None:
    with pytest.raises(error, match=explanation):
        build_engine(configure(folder, native_cache, override))


def test_a_cache_too_small_for_the_asked_context_is_refused(
    folder: Path, native_cache: Path
) -> None:
    config = configure(folder, native_cache, "model.max_model_len=33", "cache.num_blocks=2")
    with pytest.raises(ConfigError, match=r"cache\.num_blocks = 2.*needs 3 blocks"):
        build_engine(config)


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_truncated_weights_are_named(folder: Path, native_cache: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
        build_engine(configure(folder, native_cache))


def test_a_damaged_configuration_of_the_model_is_named(folder: Path, native_cache: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        build_engine(configure(folder, native_cache))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_token_outside_the_vocabulary_is_refused(
    folder: Path, native_cache: Path, file: str
) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    write_json(folder / file, eos_token_id=[2, 384])
    with pytest.raises(
        ValueError, match="eos_token_id 384 is not in the model's vocabulary of 384"
    ):
        build_engine(configure(folder, native_cache))


def test_unavailable_native_kernels_are_an_error_only_if_configured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    monkeypatch.setattr(build, "variants", lambda: ())
    with pytest.raises(ValueError, match=r"kernels.backend is 'native': .*compiler"):
        build_engine(configure(folder, tmp_path, "kernels.backend=native"))
    core = build_engine(configure(folder, tmp_path))
    backend = core.info.ops["linear"]
    assert backend.is_fallback
    assert str(backend).startswith("reference (no C++ compiler")
    assert len(generate(core, [ask("a", PROMPT)])["a"].token_ids) > 0


@pytest.mark.usefixtures("native_ops")
def test_kernels_can_be_prepared_before_the_first_start(folder: Path, native_cache: Path) -> None:
    assert Path(prepare_kernels(configure(folder, native_cache))).is_file()


def test_preparing_says_why_there_will_be_no_kernels(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    monkeypatch.setattr(build, "variants", lambda: ())
    said = prepare_kernels(configure(folder, tmp_path))
    assert said.startswith("none (no C++ compiler")
