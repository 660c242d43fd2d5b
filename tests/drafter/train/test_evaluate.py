"""Acceptance is counted exactly, on proposals whose outcome is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from drafter.train.data.conversations import Message, Prompt
from drafter.train.results.evaluate import Question, Sampling, ask_plainly, measure_trees
from drafter.train.results.report import Measurement, Report
from engine.completion import Completion
from engine.messages import EngineStats
from engine.request import Request
from engine.speculation.policy import DraftPolicy
from engine.step.shape import ROOT, TreeShape, chain, depths_of
from server.assembly.compose import Drafting
from server.assembly.offline import OfflineEngine
from tests.support.drafts.scripted_proposer import Script, ScriptedProposer, wide_shape
from tests.support.engines.tiny_engine import TinyEngine

VOCAB, MAX_LEN = 131, 256
USER, ANSWER = 3, 4  # ids that begin a turn
TEMPERATURES = (0.0, 1.0)
SHAPES = (chain(1), chain(3), chain(5))


class NumberChat:
    """Texts are token ids, written out."""

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        ids: list[int] = []
        for message in messages:
            ids.append(USER if message["role"] == "user" else ANSWER)
            ids += map(int, message["content"].split())
        return [*ids, ANSWER] if add_generation_prompt else ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(map(str, token_ids))


@dataclass
class RightUpTo(ScriptedProposer):
    """Proposes the true tokens down to a depth, wrong ones below."""

    depth: int = 2

    def _tokens(
        self, text: Sequence[int], position: int, parents: Sequence[int], rng: object, root: int
    ) -> list[int]:
        tokens = [root]
        for depth in depths_of(parents)[1:]:
            at = position + depth
            true = text[at] if at < len(text) else 0
            tokens.append(true if depth <= self.depth else (true + 1) % VOCAB)
        return tokens


def prompt(number: int, *texts: str) -> Prompt:
    first = {"role": "user", "content": texts[0]}
    return Prompt(f"file:{number}", str(number), (first,), texts[1:])


PROMPTS = [prompt(1, "7 8 9 10", "50 51"), prompt(2, "20 21 22"), prompt(3, "30", "31", "32")]


@dataclass
class Evaluated:
    """An engine whose drafts are right down to depth 2, once `learn` has set the answers."""

    engine: OfflineEngine
    scripts: dict[int, Script] = field(default_factory=dict)

    @classmethod
    def build(cls, tiny: TinyEngine) -> Evaluated:
        scripts: dict[int, Script] = {}
        proposer = RightUpTo(scripts, 1.0, VOCAB, MAX_LEN)
        endless = replace(tiny, eos_token_ids=frozenset(), drafting=Drafting(proposer))
        return cls(OfflineEngine(endless.build()), scripts)

    def learn(self, temperature: float, output_tokens: int, num_turns: int = 2) -> list[Question]:
        sampling = Sampling(temperature, output_tokens, num_turns)
        questions = ask_plainly(self.engine, NumberChat(), PROMPTS, sampling, batch=2)
        for one in questions:
            self.scripts[one.params.seed] = Script([*one.token_ids, *one.answer_ids])
        return questions

    def measure(
        self, questions: Sequence[Question], shapes: Sequence[TreeShape] = SHAPES, batch: int = 1
    ) -> list[Measurement]:
        return list(measure_trees(self.engine, questions, shapes, batch, shared_noise=True))


@dataclass
class Told:
    """A core whose counters are made up."""

    stats: Callable[[], EngineStats]
    policy: DraftPolicy = field(default_factory=DraftPolicy)

    def draft_with(self, policy: DraftPolicy) -> None:
        """Whatever it is, the counters are told."""


@dataclass
class ToldEngine:
    core: Told
    real: OfflineEngine

    def generate(self, requests: Iterable[Request]) -> dict[str, Completion]:
        return self.real.generate(requests)


@pytest.fixture
def evaluated(tiny_engine: TinyEngine) -> Evaluated:
    return Evaluated.build(tiny_engine)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_later_turns_follow_the_models_own_answers(
    temperature: float, evaluated: Evaluated
) -> None:
    first, second, third, again, last = evaluated.learn(temperature, output_tokens=5)
    assert first.token_ids == [USER, 7, 8, 9, 10, ANSWER]
    assert again.token_ids == [*first.token_ids, *first.answer_ids, USER, 50, 51, ANSWER]
    assert last.token_ids == [*third.token_ids, *third.answer_ids, USER, 31, ANSWER]
    assert [one.where for one in (first, second, third)] == ["file:1", "file:2", "file:3"]
    assert {len(one.answer_ids) for one in (first, second, third, again, last)} == {5}


@pytest.mark.parametrize(("num_turns", "num_questions"), [(1, 3), (2, 5), (3, 6), (9, 6)])
def test_prompts_are_asked_as_far_as_they_have_turns(
    num_turns: int, num_questions: int, evaluated: Evaluated
) -> None:
    questions = evaluated.learn(0.0, 2, num_turns)
    assert [one.params.seed for one in questions] == list(range(num_questions))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_acceptance_is_exact_for_known_proposals(
    temperature: float, batch: int, evaluated: Evaluated
) -> None:
    # One token after the prompt, then 12: whole trees of 1 + 1 and of 1 + 2 tokens.
    questions = evaluated.learn(temperature, output_tokens=13)
    root, *trees = evaluated.measure(questions, batch=batch)
    assert [one.tree for one in (root, *trees)] == ["root", "chain1", "chain3", "chain5"]
    assert (root.num_drafts, root.acceptance_length, root.reached) == (0, 1.0, ())
    assert [one.num_drafts for one in trees] == [6 * 5, 4 * 5, 4 * 5]
    assert [one.acceptance_length for one in trees] == [2.0, 3.0, 3.0]
    assert [one.reached for one in trees] == [(1.0,), (1.0, 1.0, 0.0), (1.0, 1.0, 0.0, 0.0, 0.0)]
    # No path reached depth 3, so the share after it is unknown.
    assert [one.conditional for one in trees] == [(1.0,), (1.0, 1.0, 0.0), (1.0, 1.0, 0.0)]
    assert {one.temperature for one in (root, *trees)} == {temperature}
    assert {one.num_tokens for one in (root, *trees)} == {13 * 5}
    assert {one.num_changed for one in (root, *trees)} == {0}
    assert root.speedup == 1.0


def test_every_node_of_a_wide_tree_counts_at_its_depth(evaluated: Evaluated) -> None:
    (_, wide) = evaluated.measure(evaluated.learn(0.0, 13), [wide_shape(2, 2, 1)])
    assert wide.reached == (1.0, 1.0, 0.0)


def test_the_root_is_measured_once(evaluated: Evaluated) -> None:
    assert [one.tree for one in evaluated.measure(evaluated.learn(0.0, 3), [ROOT])] == ["root"]


def test_answers_that_are_not_those_of_plain_decoding_are_counted(evaluated: Evaluated) -> None:
    questions = evaluated.learn(0.0, 7)
    questions[3] = dataclasses.replace(questions[3], answer_ids=[1])
    assert [one.num_changed for one in evaluated.measure(questions)] == [1, 1, 1, 1]


def test_a_prompt_that_the_engine_refuses_is_named(evaluated: Evaluated) -> None:
    long = prompt(9, " ".join(["7"] * 300))
    with pytest.raises(ValueError, match=r"file:9: .*maximum context length is 256"):
        ask_plainly(evaluated.engine, NumberChat(), [long], Sampling(0.0, 5, 1), batch=1)


def test_shares_are_of_trees_verified_since_the_counters_were_read(
    evaluated: Evaluated,
) -> None:
    questions = evaluated.learn(0.0, 7)
    before = EngineStats(0, 0, 0.0, 0, 0, 0, 0, 0, num_drafts=10, accepted_per_position=(9,))
    after = EngineStats(0, 0, 0.0, 0, 0, 0, 0, 0, num_drafts=18, accepted_per_position=(15, 3))
    told = iter([before, before, before, after])  # around the root, around the chain
    core = Told(lambda: next(told))
    engine = ToldEngine(core, evaluated.engine)
    _, chained = measure_trees(engine, questions, [chain(2)], 8, shared_noise=True)
    assert (chained.num_drafts, chained.acceptance_length) == (8, 1 + 9 / 8)
    assert chained.reached == (6 / 8, 3 / 8)
    assert chained.conditional == (6 / 8, 3 / 6)


def test_a_report_is_read_as_it_was_written(evaluated: Evaluated, tmp_path: Path) -> None:
    found = evaluated.measure(evaluated.learn(0.0, 7))
    report = Report("t", "d", "float32", "cpu", "p.jsonl", 3, 2, 7, 1, found)
    path = tmp_path / "new" / "report.json"
    report.write(path)
    assert Report.read(path) == report
    path.write_text('{"target": "t"}')
    with pytest.raises(ValueError, match=r"report\.json is not a report of eval-draft: .*draft"):
        Report.read(path)


def test_lookups_are_measured_beside_every_tree_and_change_no_answer(evaluated: Evaluated) -> None:
    questions = evaluated.learn(0.0, output_tokens=30)
    found = list(
        measure_trees(evaluated.engine, questions, SHAPES, 1, shared_noise=True, with_lookup=True)
    )
    with_lookup = [one for one in found if one.lookup]
    assert [one.tree for one in with_lookup] == ["root", *[shape.name for shape in SHAPES]]
    assert [one.tree for one in found if not one.lookup] == [one.tree for one in with_lookup]
    assert all(one.num_changed == 0 for one in found)
    assert with_lookup[0].num_drafts > 0
    assert with_lookup[0].acceptance_length == 1 + sum(with_lookup[0].reached)
