"""The bundled model as `make serve` runs it: small, but its answers make sense."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from configs.load import load_config, shipped_configs
from engine.checkpoints.source import BUNDLED_ALIAS
from server.assembly.offline import OfflineEngine
from server.text.chat_codec import load_codec
from tests.support.configurations import hosted
from tests.support.engines.in_process import ask
from tests.support.machine.threads import own_torch_threads
from tests.support.servers.live_server import LiveServer

# No token of this answer is near a tie: CPUs differ in the last bits of attention. The answer to
# "What is the capital of France?" begins with one of two tokens that are only 0.13 nats apart.
QUESTION = [{"role": "user", "content": "Name the capital of France."}]
GREEDY: dict[str, Any] = {
    "model": BUNDLED_ALIAS,
    "messages": QUESTION,
    "temperature": 0,
    "max_tokens": 24,
}
STORY = [{"role": "user", "content": "Count from one to thirty in words."}]
SHIPPED_HEAD = "smollm2-135m-instruct-eagle3"
NUM_BLOCKS = "cache.num_blocks=512"
DRAWN = GREEDY | {"temperature": 1.0, "seed": 11}


@pytest.fixture(scope="module")
def bundled(native_cache: Path) -> Iterator[LiveServer]:
    # One tree for every step: `auto` may choose none on a busy machine, and tests count drafts.
    settings = (NUM_BLOCKS, f"files.dir={native_cache}", "speculation.tree=chain3")
    with LiveServer(*settings, config="smollm2") as live:
        yield live
        assert live.stop() == 0


def answer(server: LiveServer, **fields: Any) -> Any:
    return server.client().chat.completions.create(**fields)


def streamed(server: LiveServer, **fields: Any) -> list[Any]:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    return list(server.client().chat.completions.create(**fields, **options))


def test_an_answer_is_right_and_ends_by_itself(bundled: LiveServer) -> None:
    (choice,) = answer(bundled, **GREEDY).choices
    assert "Paris" in choice.message.content
    assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")


def test_the_shipped_head_drafts_by_default_and_its_drafts_are_accepted(
    bundled: LiveServer,
) -> None:
    head = bundled.get("/info").json()["engine"]["draft"]
    assert Path(head["path"]).name == SHIPPED_HEAD
    fields = GREEDY | {"messages": STORY, "max_tokens": 64}
    plain = answer(bundled, **fields, extra_body={"speculation": {"enabled": False}})
    drafted = answer(bundled, **fields)
    assert drafted.choices == plain.choices
    counted = drafted.usage.completion_tokens_details
    assert counted.accepted_prediction_tokens > 8


@pytest.mark.parametrize("fields", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_stream_says_what_the_whole_answer_says(
    bundled: LiveServer, fields: dict[str, Any]
) -> None:
    whole, chunks = answer(bundled, **fields), streamed(bundled, **fields)
    *parts, last = chunks
    text = "".join(chunk.choices[0].delta.content or "" for chunk in parts)
    assert text == whole.choices[0].message.content
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({chunk.id for chunk in chunks}) == 1
    counted = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [getattr(last.usage, n) for n in counted] == [getattr(whole.usage, n) for n in counted]


def test_the_server_answers_as_the_engine_alone_does(
    bundled: LiveServer, native_cache: Path
) -> None:
    # Drafts change no text, and without a head nothing is measured.
    overrides = [NUM_BLOCKS, f"files.dir={native_cache}", "speculation.draft=null"]
    config = load_config(shipped_configs()["smollm2"], overrides)
    codec = load_codec(hosted(config))
    prompt = codec.encode(QUESTION, True)
    requests = [
        ask("greedy", prompt, max_tokens=24),
        ask("drawn", prompt, max_tokens=24, temperature=1.0, seed=11),
    ]
    with own_torch_threads():
        completions = OfflineEngine.from_config(config).generate(requests)
    for name, fields in (("greedy", GREEDY), ("drawn", DRAWN)):
        reply, ids = answer(bundled, **fields), completions[name].token_ids
        assert reply.choices[0].message.content == codec.decode(ids), name
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (
            len(prompt),
            len(ids),
        )


def test_logprobs_are_those_of_the_tokens_that_were_sent(bundled: LiveServer) -> None:
    reply = answer(bundled, **GREEDY, logprobs=True, top_logprobs=3)
    tokens = reply.choices[0].logprobs.content
    ended = [token for token in tokens if token.token in ("<|im_end|>", "")]
    assert "".join(token.token for token in tokens[: len(tokens) - len(ended)]) == (
        reply.choices[0].message.content
    )
    for token in tokens:
        best = [top.logprob for top in token.top_logprobs]
        assert len(best) == 3
        assert all(left >= right for left, right in pairwise(best))
        assert token.logprob == best[0], "greedy takes the best"
        assert token.logprob <= 0
        assert bytes(token.bytes).decode(errors="replace") == token.token


def test_a_stop_string_ends_the_answer_in_front_of_it(bundled: LiveServer) -> None:
    whole = answer(bundled, **GREEDY).choices[0].message.content
    (choice,) = answer(bundled, **GREEDY, stop=["Paris"]).choices
    assert choice.message.content == whole.partition("Paris")[0]
    assert choice.finish_reason == "stop"


def test_models_lists_the_one_that_is_served(bundled: LiveServer) -> None:
    assert [model.id for model in bundled.client().models.list()] == [BUNDLED_ALIAS]
