"""Servers are compared in turns, and one that is missing or fails stops no other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer

from benchmarks import compare
from benchmarks.compare import Figures, Plan, Results, contents, measure_all
from benchmarks.peers.agreement import agreements, common_length
from benchmarks.peers.known import PEERS, Server, Setting
from benchmarks.tables import ROOT, markdown
from server.measuring.answers import Answer
from tests.support.servers import scripted_server
from tests.support.waiting import DEADLINE

PLAN = Plan((1, 2), min_prompts=3, num_tokens=4, rounds=2, threads=1, patience=DEADLINE)
QUESTIONS = ["a?", "b?", "c?", "d?"]


def scripted(name: str, text: str) -> Server:
    def command(setting: Setting) -> list[str]:
        return [sys.executable, scripted_server.__file__, str(setting.port), text]

    return Server(name, command, versions={name: "1.0"})


def broken(name: str) -> Server:
    code = "raise SystemExit('no such model')"
    return Server(name, lambda setting: [sys.executable, "-c", code])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Two servers that answer, and one that ends at once."""
    servers = [scripted(compare.BASE, "one two"), broken("broken"), scripted("peer", "one three")]
    found = Results()
    folder = tmp_path_factory.mktemp("compare")
    measure_all(servers, QUESTIONS, PLAN, Path("model.gguf"), folder, found)
    return found


def test_every_server_is_measured_in_every_round(results: Results) -> None:
    both = (compare.BASE, "peer")
    assert set(results.figures) == {(name, streams) for name in both for streams in (1, 2)}
    assert all(set(rounds) == {0, 1} for rounds in results.figures.values())
    assert set(results.texts["peer"]) == set(QUESTIONS)  # two streams take turns of two


def test_a_server_that_fails_is_a_note_and_is_not_started_again(results: Results) -> None:
    (note,) = (note for note in results.notes if note.startswith("broken"))
    assert note.startswith("broken failed: broken ended with 1")
    assert "no such model" in note


def test_the_written_results_make_a_table(results: Results) -> None:
    agreed = agreements(results.texts, QUESTIONS, lambda text: [ord(c) for c in text])
    servers = [scripted(compare.BASE, ""), scripted("peer", "")]
    content = contents(PLAN, servers, results, agreed, "tiny") | {"load": [(1, 1, 1), (2, 2, 2)]}
    content = json.loads(json.dumps(content))
    assert [row["server"] for row in content["rows"]] == [compare.BASE, "peer"] * 2
    assert content["rows"][0]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    (pair,) = content["agreement"]
    assert (pair["num_prompts"], pair["median"], pair["equal"]) == (4, len("one t"), 0)
    table = markdown("compare", content)
    assert "| 2 | peer | " in table
    assert "- broken failed: broken ended with 1" in table


@pytest.mark.parametrize(("streams", "number"), [(1, 3), (2, 4), (3, 3), (8, 8)])
def test_all_streams_are_busy_until_the_last_turn(streams: int, number: int) -> None:
    prompts = PLAN.prompts(QUESTIONS, streams)
    assert len(prompts) == number
    assert prompts[:3] == QUESTIONS[:3]


def test_figures_of_a_run() -> None:
    answers = [Answer(0.0, (0.1, 0.5), "", 5), Answer(0.0, (0.3, 1.0), "", 3)]
    figures = Figures.of(answers, 5)
    assert figures.tokens_per_second == pytest.approx(8.0)
    assert figures.ttft == pytest.approx(200.0)
    assert figures.ttit == pytest.approx((100.0 + 350.0) / 2)
    assert figures.short == 1


@pytest.mark.parametrize(
    ("first", "second", "length"),
    [([], [1], 0), ([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([2], [1], 0)],
)
def test_texts_agree_until_the_first_difference(
    first: list[int], second: list[int], length: int
) -> None:
    assert common_length(first, second) == length


def test_a_peer_that_is_not_installed_is_a_note_with_the_command(tmp_path: Path) -> None:
    notes: list[str] = []
    assert compare.present(PEERS, tmp_path, notes) == []
    assert len(notes) == len(PEERS)
    for peer, note in zip(PEERS, notes, strict=True):
        assert note == f"{peer.name} is not installed; run: {peer.set_up(tmp_path)}"


def test_an_unknown_peer_is_an_error_that_names_the_known_ones() -> None:
    assert [peer.name for peer in compare.choose("vllm,xllamacpp")] == ["vllm", "xllamacpp"]
    with pytest.raises(typer.BadParameter, match=r"'vlm' is not known; known are .*vllm"):
        compare.choose("vlm")


def test_every_peer_makes_a_command(tmp_path: Path) -> None:
    setting = Setting(tmp_path / "m.gguf", 8123, 2, 32, tmp_path)
    (tmp_path / "m-bfloat16").mkdir()  # as converted before
    for peer in PEERS:
        assert "8123" in peer.arguments(setting), peer.name


def test_the_documents_have_the_commands_that_install_peers() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert [peer.name for peer in PEERS if f"`{peer.set_up(Path())}`" not in text] == []
