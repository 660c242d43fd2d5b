"""Tiny random models on a CUDA device: the text is the same however their steps run. They need no
weights of a real model. Without a CUDA device, everything runs on the CPU."""

from __future__ import annotations

import itertools
import json
import re
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.parts import print_result
from benchmarks.peers.aerie import AerieTarget
from configs.host import host_config
from engine.request import Grammar, Request, SamplingParams
from server.assembly.offline import OfflineEngine
from server.measuring.timing import measure
from tests.support.heads.copied_head import write_copied_head
from tests.support.heads.tiny_heads import write_tiny_head, write_tiny_llama4_head
from tests.support.models.greedy import greedy_margins
from tests.support.models.tiny_llama import TinyLlama, write_tiny_llama
from tests.support.models.tiny_llama4 import write_tiny_llama4

Found = dict[str, Any]
Texts = dict[str, list[int]]
VOCAB = 384
NUM_ROWS, NUM_TOKENS = 6, 40
PLAIN, TREE8 = ("speculation.draft=null",), ("speculation.tree=tree8",)
EAGER, ONE_BY_ONE = ("kernels.graphs=off",), ("scheduler.run_ahead=false",)
FLOAT32 = ("model.dtype=float32",)
REFERENCE = ("kernels.backend=reference", *PLAIN)
SHAPE = {  # of the bundled model
    "vocab_size": 49152,
    "num_layers": 30,
    "num_heads": 9,
    "num_kv_heads": 3,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "tied": True,
}
NAMES = r'\{"name": "[a-z]{1,12}", "age": [0-9]{1,3}(, "ok": (true|false))?\}'
WORDS = "[a-c]{3,30} (ab|ba|c)*"
SCHEMA = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
KINDS: dict[str, list[dict[str, Any]]] = {
    "plain": [{"temperature": heat, "ignore_eos": True} for heat in (0.0, 1.0, 0.7)],
    "edited": [
        {"temperature": 0.7, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "top_p": 0.9},
        {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 1},
        {"temperature": 1.0, "logit_bias": {11: 2.0, 12: -100.0}, "min_tokens": 9, "top_k": 40},
    ],
}
GRAMMARS: dict[str, list[dict[str, Any]]] = {
    "grammars": [
        {"temperature": 1.0, "grammar": Grammar("regex", NAMES)},
        {"temperature": 0.0, "grammar": Grammar("json_schema", json.dumps(SCHEMA))},
        {"temperature": 0.8, "grammar": Grammar("regex", WORDS), "logprobs": 2},
        {"temperature": 1.0, "repetition_penalty": 1.3},
    ]
}


def requests(name: str, kinds: Sequence[Mapping[str, Any]]) -> list[Request]:
    """One request per row, of these kinds in turn."""
    return [
        Request(
            request_id=f"{name} {row}",
            prompt_ids=[5 + (11 * i + 37 * row) % (VOCAB - 5) for i in range(20 + 9 * row)],
            params=SamplingParams(
                **{"max_tokens": NUM_TOKENS, "seed": row, **kinds[row % len(kinds)]}
            ),
        )
        for row in range(NUM_ROWS)
    ]


@contextmanager
def engine(*settings: str) -> Iterator[OfflineEngine]:
    """An engine with few rows, so that few steps are captured."""
    usual = ["cache.num_blocks=1024", "scheduler.max_num_seqs=8", "speculation.lookup=false"]
    usual.append("kernels.threads=2")  # several of these run at once
    running = OfflineEngine.from_config(host_config(None, [*usual, *settings]))
    try:
        yield running
    finally:
        running.close()


def texts(kinds: Mapping[str, Sequence[Mapping[str, Any]]], *settings: str) -> Texts:
    """Token ids of the requests of all `kinds`, and under "accepted" how many drafts were."""
    found: Texts = {}
    with engine(*settings) as running:
        for name, some in kinds.items():
            heard = running.generate(requests(name, some))
            found |= {request: record.token_ids for request, record in heard.items()}
        found["accepted"] = [running.core.stats().num_accepted_tokens]
    return found


def expected_texts(
    found: Found, kinds: Mapping[str, Sequence[Mapping[str, Any]]], *settings: str
) -> Texts:
    """Those of the reference operations in float32; if these fail, which is noted, those of plain
    steps without graphs."""
    try:
        return texts(kinds, *settings, *FLOAT32, *REFERENCE)
    except Exception as error:  # noqa: BLE001  (the other comparisons are worth having)
        found["failed"].append(f"the references: {type(error).__name__}: {error}"[:500])
        return texts(kinds, *settings, *FLOAT32, *PLAIN, *EAGER)


def difference(name: str, ours: Texts, expected: Texts) -> list[str]:
    """Which texts differ, and where first."""
    lines = []
    for request, tokens in expected.items():
        if request == "accepted" or ours[request] == tokens:
            continue
        pairs = enumerate(itertools.zip_longest(ours[request], tokens))
        first = next(at for at, (one, other) in pairs if one != other)
        lines.append(f"{name}: {request!r} differs from token {first} of {len(tokens)}")
    return lines


@contextmanager
def agreeing() -> Iterator[tuple[str, ...]]:
    """Settings for a tiny Llama with a head that often agrees with it."""
    with tempfile.TemporaryDirectory() as name:
        model, head = Path(name) / "model", Path(name) / "head"
        spec = TinyLlama(VOCAB, num_layers=3, hidden_size=256, intermediate_size=512)
        write_copied_head(head, write_tiny_llama(model, spec))
        yield (f"model.source={model}", f"speculation.draft={head}")


def note(found: Found, way: str, ours: Texts, expected: Texts) -> None:
    """Add a comparison to the results and print them."""
    failed = difference(way, ours, expected)
    same = f"{len(expected) - 1 - len(failed)} of {len(expected) - 1} texts"
    found["ways"][way] = {"same": same, "accepted": ours["accepted"][0]}
    found["failed"] += failed
    print_result(found)


def same_tokens() -> Found:
    """Every way to run gives the text of the reference operations, in float32."""
    ways = {
        "tree8": TREE8,
        "plain": PLAIN,
        "tree8, eager": TREE8 + EAGER,
        "tree8, one by one": TREE8 + ONE_BY_ONE,
        "dynamic8": ("speculation.tree=dynamic8",),
        "auto with lookup": ("speculation.tree=auto", "speculation.lookup=true"),
        "plain, eager": PLAIN + EAGER,
        "plain, one by one": PLAIN + ONE_BY_ONE,
    }
    found: Found = {"ways": {}, "failed": []}
    with agreeing() as usual:
        expected = expected_texts(found, KINDS, *usual)
        for way, settings in ways.items():
            note(found, way, texts(KINDS, *usual, *FLOAT32, *settings), expected)
    return found


def graphs_equal_eager() -> Found:
    """A graph gives the text of the same steps without it, in bfloat16."""
    found: Found = {"ways": {}, "failed": []}
    with agreeing() as usual:
        for way, settings in {"tree8": TREE8, "plain": PLAIN}.items():
            own = usual + settings + ONE_BY_ONE
            note(found, way, texts(KINDS, *own), texts(KINDS, *own, *EAGER))
    return found


def llama4() -> Found:
    """Llama 4 with experts and chunks of 24 positions: greedy texts by what transformers computes,
    and all texts by plain decoding and by the reference operations."""
    found: Found = {"ways": {}, "failed": []}
    with tempfile.TemporaryDirectory() as name:
        model, head = Path(name) / "model", Path(name) / "head"
        oracle = write_tiny_llama4(model)
        write_tiny_llama4_head(head, oracle)
        usual = (f"model.source={model}", f"speculation.draft={head}")
        plain = texts(KINDS, *usual, *FLOAT32, *PLAIN)
        prompt = requests("plain", KINDS["plain"])[0].prompt_ids
        margin = float(greedy_margins(oracle, prompt, plain["plain 0"]).min())
        found["smallest_margin"] = margin
        found["failed"] += [] if margin > 0 else [f"the greedy text is another: {margin:.1e}"]
        note(found, "tree8 = plain", texts(KINDS, *usual, *FLOAT32, *TREE8), plain)
        note(found, "plain = references", plain, expected_texts(found, KINDS, *usual))
    return found


def grammars() -> Found:
    """Requests with grammars beside one without: they match, and are those of plain decoding and of
    the references."""
    found: Found = {"ways": {}, "failed": []}
    with agreeing() as usual:
        plain = texts(GRAMMARS, *usual, *FLOAT32, *PLAIN)
        found["failed"] += _unmatched(usual[0].removeprefix("model.source="), plain)
        for way, settings in {"tree8": TREE8, "tree8, eager": TREE8 + EAGER}.items():
            note(found, f"{way} = plain", texts(GRAMMARS, *usual, *FLOAT32, *settings), plain)
        note(found, "plain = references", plain, expected_texts(found, GRAMMARS, *usual))
    return found


def _unmatched(model: str, found: Texts) -> list[str]:
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(model).decode(
        found["grammars 0"], skip_special_tokens=True
    )
    return [] if re.fullmatch(NAMES, str(text)) else [f"{text!r} does not match {NAMES}"]


def automatic() -> Found:
    """Tokens per second of a random model of the bundled one's shape, plain and with an untrained
    head and the planner: where no draft is accepted, drafting must cost nothing."""
    found: Found = {"tokens_per_second": {}, "failed": []}
    with tempfile.TemporaryDirectory() as name:
        model, head = Path(name) / "model", Path(name) / "head"
        spec = TinyLlama(**SHAPE, dtype=torch.bfloat16)  # type: ignore[arg-type]
        write_tiny_llama(model, spec)
        write_tiny_head(head, spec, draft_vocab=8192)
        usual = (f"model.source={model}", f"speculation.draft={head}", "scheduler.max_num_seqs=32")
        speeds = found["tokens_per_second"]
        for way, settings in {"plain": PLAIN, "auto": ("speculation.tree=auto",)}.items():
            with engine(*usual, "cache.num_blocks=2048", *settings) as running:
                for batch in (1, 8, 32):
                    speeds.setdefault(f"batch {batch}", {})[way] = _speed(running, batch)
                    print_result(found)
    return found


def _speed(running: OfflineEngine, batch: int) -> float:
    target = AerieTarget(running)
    prompts = [[(7 * i + row) % 40000 + 5 for i in range(128)] for row in range(batch)]
    target.run(prompts, 16)
    return round(
        statistics.median(measure(target.run(prompts, 128)).tokens_per_second for _ in range(3)), 1
    )
