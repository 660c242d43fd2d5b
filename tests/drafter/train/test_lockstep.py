"""Many answers at once equal those of whole texts run one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from drafter.train.answers import lockstep as module
from drafter.train.answers.lockstep import ON_CPU, ON_DEVICE, Answer, LockstepTarget, Pace, Question
from drafter.train.data.target import FrozenTarget
from engine.checkpoints.arch import LlamaArch
from engine.models.interface import LoadedModel
from engine.models.llama import LlamaLoader
from engine.models.place import Place
from kernels.ops import Ops
from tests.support.engines.tiny_engine import CPU, random_llama
from tests.support.machine import pretend_device
from tests.support.machine.pretend_device import PretendDevice

VOCAB, EOS = 131, 2
MAX_NEW, MAX_PROMPT = 20, 40
NARROW = {"num_hidden_layers": 1, "hidden_size": 48, "intermediate_size": 32}
PADDED = replace(ON_DEVICE, steps=3, padded_prompts=4, padded_tokens=16)


def load(ops: Ops, device: torch.device = CPU, **changes: object) -> LoadedModel:
    oracle = random_llama(**changes)
    arch = LlamaArch.from_hf_config(oracle.config.to_dict())
    read = oracle.state_dict().__getitem__
    return LlamaLoader(arch, read, Place(ops, torch.float32, device), 64).load()


def lockstep(model: LoadedModel, ops: Ops, **changes: object) -> LockstepTarget:
    settings: dict[str, object] = {
        "rows": 3,
        "max_new_tokens": MAX_NEW,
        "max_prompt_tokens": MAX_PROMPT,
        "seed": 5,
    }
    eos_ids = frozenset({EOS, 77})
    settings |= changes
    device = settings.pop("device", CPU)
    return LockstepTarget(model, ops, torch.float32, device, eos_ids, **settings)  # type: ignore[arg-type]


def questions(temperature: float = 0.0) -> list[Question]:
    generator = torch.Generator().manual_seed(3)
    lengths = (1, 16, 17, MAX_PROMPT, 2, 31, 5, 33, 9, 12)
    prompts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return [Question(prompt, temperature, tag) for tag, prompt in enumerate(prompts)]


def asking(asked: Sequence[Question | None]) -> Callable[[], Question | None]:
    """Gives one after the other, then None."""
    rest = iter(asked)
    return lambda: next(rest, None)


def by_tag(answers: Iterator[Answer]) -> dict[int, list[int]]:
    return {answer.question.tag: answer.token_ids for answer in answers}


def plainly(frozen: FrozenTarget, prompt: Sequence[int]) -> list[int]:
    """The greedy answer to a prompt, each token from the whole text before it."""
    text = list(prompt)
    while len(text) - len(prompt) < MAX_NEW:
        text.append(int(frozen.logits(text)[-1].argmax()))
        if text[-1] in (EOS, 77):
            break
    return text[len(prompt) :]


@pytest.mark.parametrize(
    ("backend", "pace"),
    [
        ("reference", ON_CPU),
        ("native", ON_CPU),
        ("native", PADDED),
        ("native", Pace(steps=1, unread=2, prompt_tokens=30)),
    ],
    ids=["reference", "cpu", "padded", "small"],
)
def test_greedy_answers_are_those_of_whole_texts(
    backend: str, pace: Pace, request: pytest.FixtureRequest
) -> None:
    ops: Ops = request.getfixturevalue(f"{backend}_ops")
    model = load(ops)
    frozen = FrozenTarget(model, ops, (0,), torch.float32)
    target = lockstep(model, ops, pace=pace)
    found = {a.question.tag: a for a in target.answers(asking(questions()))}
    expected = {q.tag: plainly(frozen, q.prompt_ids) for q in questions()}
    assert {tag: answer.token_ids for tag, answer in found.items()} == expected
    for answer in found.values():
        assert answer.ended == (answer.token_ids[-1] in (EOS, 77))
        assert answer.ended or len(answer.token_ids) == MAX_NEW
    assert {answer.ended for answer in found.values()} == {True, False}
    assert target.num_tokens == sum(map(len, expected.values()))


def test_answers_wait_and_go_on_in_another_generator(native_ops: Ops) -> None:
    model = load(native_ops)
    whole = by_tag(lockstep(model, native_ops).answers(asking(questions(1.0))))
    target = lockstep(model, native_ops, pace=replace(ON_CPU, unread=1))
    ask, found = asking(questions(1.0)), {}
    for wanted in (1, 2, 4):
        part = target.answers(ask)
        for _ in range(wanted):
            answer = next(part)
            assert torch.is_grad_enabled()  # between two answers the caller trains
            found[answer.question.tag] = answer.token_ids
        part.close()
        FrozenTarget(model, native_ops, (0,), torch.float32).logits([4, 5, 6])
    assert found | by_tag(target.answers(ask)) == whole
    assert target.num_tokens == sum(map(len, whole.values()))


def test_rows_are_free_while_there_is_nothing_to_ask(native_ops: Ops) -> None:
    model = load(native_ops)
    whole = by_tag(lockstep(model, native_ops).answers(asking(questions())))
    some: list[Question | None] = list(questions())
    for at in (1, 2, 3, 5):
        some.insert(at, None)
    target, ask = lockstep(model, native_ops), asking(some)
    assert by_tag(target.answers(ask)) == whole
    target = lockstep(model, native_ops)
    assert by_tag(target.answers(asking([]))) == {}
    assert by_tag(target.answers(asking(questions()))) == whole


@pytest.mark.parametrize("max_new_tokens", [1, 7])
def test_one_row_answers_one_question_after_the_other(native_ops: Ops, max_new_tokens: int) -> None:
    model = load(native_ops)
    target = lockstep(model, native_ops, rows=1, max_new_tokens=max_new_tokens)
    found = list(target.answers(asking(questions())))
    assert [answer.question.tag for answer in found] == list(range(10))
    frozen = FrozenTarget(model, native_ops, (0,), torch.float32)
    expected = [plainly(frozen, q.prompt_ids)[:max_new_tokens] for q in questions()]
    assert [answer.token_ids for answer in found] == expected


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_tokens_follow_the_distribution(native_ops: Ops, temperature: float) -> None:
    """Chi-square of the first and second token; 0.1 % of seeds would fail."""
    model = load(native_ops, vocab_size=8, **NARROW)
    num, prompt = 4000, [3, 4]
    target = lockstep(model, native_ops, rows=500, max_new_tokens=2)
    asked = [Question(prompt, temperature, tag) for tag in range(num)]
    found = by_tag(target.answers(asking(asked)))
    frozen = FrozenTarget(model, native_ops, (0,), torch.float32)
    first = (frozen.logits(prompt)[-1] / temperature).softmax(0)
    drawn = torch.tensor([found[tag][0] for tag in range(num)])
    assert chi_square(drawn, first) < 24.3  # 7 degrees of freedom
    likeliest = int(torch.where(torch.arange(8) == EOS, 0, first).argmax())
    after = torch.tensor([f[1] for f in found.values() if f[0] == likeliest])
    second = (frozen.logits([*prompt, likeliest])[-1] / temperature).softmax(0)
    assert len(after) > 300
    assert chi_square(after, second) < 24.3


def chi_square(drawn: torch.Tensor, probabilities: torch.Tensor) -> float:
    counts, expected = drawn.bincount(minlength=8), probabilities * len(drawn)
    return float(((counts - expected) ** 2 / expected).sum())


def test_a_draw_depends_on_the_seed_and_the_number_of_the_question(native_ops: Ops) -> None:
    model = load(native_ops)
    whole = by_tag(lockstep(model, native_ops, seed=-3).answers(asking(questions(1.0))))
    again = by_tag(lockstep(model, native_ops, seed=-3, rows=7).answers(asking(questions(1.0))))
    other = by_tag(lockstep(model, native_ops, seed=4).answers(asking(questions(1.0))))
    same = [Question([5, 6], 1.0, tag) for tag in range(4)]
    assert again == whole
    assert all(whole[tag] != other[tag] for tag in whole)
    texts = by_tag(lockstep(model, native_ops).answers(asking(same))).values()
    assert len(set(map(tuple, texts))) == 4


def test_steps_stay_on_the_device(native_ops: Ops) -> None:
    """A copy to it for each group of prompts, one back for each look, and no wait."""
    expected = by_tag(lockstep(load(native_ops), native_ops).answers(asking(questions(0.8))))
    with PretendDevice() as device:
        ops, there = pretend_device.operations_of(native_ops), pretend_device.DEVICE
        target = lockstep(load(ops, there), ops, device=there, pace=PADDED)
        groups = counted(target, "_start", lambda: device.uploads)
        looks = counted(target, "_look", lambda: device.downloads)
        before = device.uploads, device.downloads
        found = by_tag(target.answers(asking(questions(0.8))))
        after = device.uploads, device.downloads
    assert found == expected
    assert device.waits == []
    assert set(groups) | set(looks) == {1}
    assert (after[0] - before[0], after[1] - before[1]) == (len(groups), len(looks))


def counted(target: LockstepTarget, name: str, count: Callable[[], int]) -> list[int]:
    """By how much each call of a method of `target` raises the count."""
    method, rises = getattr(target, name), []

    def counting(*args: object) -> None:
        before = count()
        method(*args)
        rises.append(count() - before)

    setattr(target, name, counting)
    return rises


def test_questions_that_do_not_fit_are_refused_and_lose_no_other(native_ops: Ops) -> None:
    model, good = load(native_ops), questions()
    target = lockstep(model, native_ops)
    ask = asking([good[0], Question([5] * 41, 0.0, 66), *good[1:]])
    with pytest.raises(ValueError, match="question 66 has 41 tokens; 1 to 40 are allowed"):
        list(target.answers(ask))
    assert set(by_tag(target.answers(ask))) == set(range(10))
    with pytest.raises(ValueError, match="question 67 has 0 tokens"):
        list(target.answers(asking([Question([], 0.0, 67)])))
    with pytest.raises(ValueError, match=r"question 68 has temperature -0\.5"):
        list(target.answers(asking([Question([5], -0.5, 68)])))


def test_sizes_and_models_that_cannot_be_used_are_refused(native_ops: Ops) -> None:
    model = load(native_ops, **NARROW)
    with pytest.raises(ValueError, match="rows is 0"):
        lockstep(model, native_ops, rows=0)
    with pytest.raises(ValueError, match="need 1025 positions; the model has 1024"):
        lockstep(model, native_ops, max_prompt_tokens=1005)
    chunked = SimpleNamespace(arch=model.arch, attention_chunk=8192)
    with pytest.raises(ValueError, match="chunks of 8192 positions"):
        lockstep(chunked, native_ops)  # type: ignore[arg-type]


@pytest.mark.parametrize("works", [True, False])
def test_a_captured_step_gives_the_same_answers(
    native_ops: Ops, works: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Launches before the capture change nothing; without a graph, steps are launched."""
    model, replays = load(native_ops), []
    expected = by_tag(lockstep(model, native_ops).answers(asking(questions(0.7))))

    def capture(launch: Callable[[], None], pool: object) -> tuple[SimpleNamespace, None]:
        for _ in range(3):
            launch()
        if not works:
            raise RuntimeError(f"no memory left in {pool}")

        def replay() -> None:
            replays.append(launch())

        return SimpleNamespace(replay=replay), None

    monkeypatch.setattr(module, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
    target = lockstep(model, native_ops)
    with monkeypatch.context() as patch:
        patch.setattr(target, "_device", torch.device("cuda"))
        target._run_step = target._captured()
    assert by_tag(target.answers(asking(questions(0.7)))) == expected
    assert bool(replays) == works
    assert ("no CUDA graph for answering" in caplog.text) != works
