"""Several ranks draw the tokens of one rank where requests have grammars."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import pytest

from configs.load import load_config
from configs.resolve import HostConfig, HostFacts, resolve_host
from engine.checkpoints.source import resolve_source
from engine.request import Grammar, Request
from engine.speculation.planner import FixedPlanner
from engine.step.shape import StaticShape
from server.text.tokens.tokenizer_files import load_tokenizer
from tests.support.engines.in_process import ask
from tests.support.heads.copied_head import write_copied_head
from tests.support.machine.threads import own_torch_threads
from tests.support.models.tiny_llama import TinyLlama, write_tiny_llama
from tests.support.ranks.thread_ranks import EXACT, PADDED, Way, answer

TREE = StaticShape("tree", (-1, 0, 0, 1, 1, 2))
PATTERN = r'\{"name": "[a-z]{2,6}", "n": [0-9]{1,3}\}'


@pytest.fixture(scope="module", autouse=True)
def _torch_threads() -> Iterator[None]:
    with own_torch_threads():
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> HostConfig:
    base = tmp_path_factory.mktemp("ranks")
    spec = TinyLlama(num_heads=4, num_kv_heads=2, intermediate_size=96, vocab_size=389)
    (base / "model").mkdir()
    write_copied_head(base / "eagle", write_tiny_llama(base / "model", spec))
    settings = [
        f"model.source={base / 'model'}",
        f"speculation.draft={base / 'eagle'}",
        "speculation.tree=root",
        "model.dtype=float32",
        "model.max_model_len=128",
        "kernels.backend=reference",
        "cache.num_blocks=96",
        "scheduler.max_num_seqs=6",
        "scheduler.max_num_batched_tokens=160",
        "parallel.check_every=2",
    ]
    return resolve_host(load_config(None, settings), HostFacts(1, base))


def table() -> list[Request]:
    rng = random.Random(3)
    grammars = [Grammar("regex", PATTERN), None, Grammar("regex", PATTERN)]
    return [
        ask(
            str(at),
            rng.choices(range(3, 131), k=5 + 4 * at),
            max_tokens=40,
            temperature=at % 2,
            seed=at,
            logprobs=1,
            grammar=grammar,
        )
        for at, grammar in enumerate(grammars)
    ]


def test_ranks_and_padding_do_not_change_texts(config: HostConfig) -> None:
    tokenizer = load_tokenizer(
        resolve_source(config.model.source, None), config.files.dir, chat_template=None
    )
    truth = answer(config, Way(), table(), FixedPlanner(TREE)).texts
    for name in ("0", "2"):
        assert re.fullmatch(PATTERN, tokenizer.decode(truth[name].token_ids))
    for way in (Way(2, EXACT), Way(2, PADDED, run_ahead=True)):
        texts = answer(config, way, table(), FixedPlanner(TREE)).texts
        for name, record in texts.items():
            assert record.token_ids == truth[name].token_ids, (way, name)
            expected = [one.logprob for one in truth[name].logprobs]
            assert [one.logprob for one in record.logprobs] == pytest.approx(expected, abs=1e-4)
