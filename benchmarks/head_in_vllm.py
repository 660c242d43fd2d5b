"""Whether a draft head is the same in vLLM: `python -m benchmarks.head_in_vllm --peers-dir DIR`.

vLLM's CPU build, where it is installed among the peers of `benchmarks.compare`, and Aerie answer
the same prompts greedily, one at a time, with the same files of the head, a chain of drafts, and
weights in bfloat16. The head is right in vLLM if as many drafts are accepted. Texts part where
rounding does, so the acceptance lengths differ a little.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.measuring import machine
from benchmarks.peers.converted import converted_folder
from benchmarks.peers.known import HERE, PEERS
from benchmarks.tables import write_results
from configs.host import host_config
from drafter.source import resolve_draft
from drafter.train.data.conversations import read_prompts, sample_file
from engine.checkpoints.source import BUNDLED_ALIAS, resolve_source
from engine.request import Request, SamplingParams
from server.assembly.compose import build_engine
from server.assembly.offline import OfflineEngine
from server.text.chat_codec import load_codec

PEER = next(peer for peer in PEERS if peer.name == "vllm")
SCRIPT = HERE / "vllm_acceptance.py"
CONTEXT = 1024
BAR = 0.03


@dataclass(frozen=True, slots=True)
class Work:
    """What both servers do."""

    prompts: list[list[int]]
    chain: int
    tokens: int  # of each answer
    threads: int


@dataclass(frozen=True, slots=True)
class Accepted:
    """What one server did with the drafts of a head."""

    num_drafts: int
    accepted: list[int]  # by position: drafts of which so many tokens were accepted
    answers: list[list[int]]

    @property
    def length(self) -> float:
        """Tokens per draft, the target's own included."""
        return 1 + sum(self.accepted) / max(1, self.num_drafts)


def main(
    draft: Annotated[str, typer.Option(help="As speculation.draft.")] = "auto",
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines; default: those that come with Aerie.")
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1)] = 16,
    chain: Annotated[int, typer.Option(min=1, max=7)] = 3,
    tokens: Annotated[int, typer.Option(min=1, max=512, help="Of each answer.")] = 128,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    peers_dir: Annotated[Path, typer.Option(help="As in `benchmarks.compare`.")] = Path(
        "build/peers"
    ),
    output: Annotated[Path, typer.Option(help="JSON; the table is written beside it.")] = Path(
        "benchmarks/out/head-in-vllm.json"
    ),
) -> None:
    """Compare how many drafts are accepted here and in vLLM; exit code 1 if it is not as many."""
    server = PEER.server(peers_dir)
    path = prompts or sample_file("prompts.jsonl")
    head = resolve_draft(draft, BUNDLED_ALIAS)
    if head is None:
        raise typer.BadParameter(f"{draft!r} names no head", param_hint="--draft")
    work = Work(encoded(path, num_prompts, CONTEXT - tokens), chain, tokens, threads)
    model = converted_folder(resolve_source(BUNDLED_ALIAS).path, peers_dir / "models").resolve()
    python = peers_dir / PEER.name / "bin" / "python"
    theirs = in_vllm(python, server.environment, model, head.resolve(), work)
    found = compared(here(model, head.resolve(), work), theirs)
    content = {
        "benchmark": "head_in_vllm",
        **machine.facts(),
        "versions": server.versions,
        "draft": head.name,
        "prompts": path.name,
        "num_prompts": len(work.prompts),
        "chain": chain,
        "tokens": tokens,
        "threads": threads,
        **found,
    }
    write_results("head_in_vllm", output, content)
    if abs(found["ratio"] - 1) > BAR:
        raise typer.Exit(1)


def encoded(path: Path, count: int, longest: int) -> list[list[int]]:
    """The first prompts of at most `longest` tokens. ValueError if there is none."""
    codec = load_codec(host_config(None, [f"model.source={BUNDLED_ALIAS}"]))
    every = (codec.encode(prompt.messages, True) for prompt in read_prompts(path))
    found = list(islice((ids for ids in every if len(ids) <= longest), count))
    if not found:
        raise ValueError(f"{path} holds no prompt of at most {longest} tokens")
    return found


def in_vllm(
    python: Path, environment: Mapping[str, str], model: Path, head: Path, work: Work
) -> Accepted:
    """RuntimeError with the end of what vLLM said if it fails."""
    numbers = map(str, (work.chain, work.tokens, CONTEXT))
    done = subprocess.run(
        [str(python), str(SCRIPT), str(model), str(head), *numbers],
        input=json.dumps(work.prompts),
        env=os.environ | dict(environment) | {"OMP_NUM_THREADS": str(work.threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"vLLM failed:\n{done.stderr[-3000:]}")
    return Accepted(**json.loads(done.stdout))


def here(model: Path, head: Path, work: Work) -> Accepted:
    """The same with the engine of this project, in this process."""
    settings = {
        "model.source": model,
        "model.weights": "plain",
        "model.dtype": "bfloat16",
        "model.max_model_len": CONTEXT,
        "speculation.draft": head,
        "speculation.draft_weights": "plain",
        "speculation.tree": f"chain{work.chain}",
        "speculation.lookup": "false",
        "kernels.threads": work.threads,
    }
    config = host_config(None, [f"{key}={value}" for key, value in settings.items()])
    engine = OfflineEngine(build_engine(config))
    params = SamplingParams(max_tokens=work.tokens, temperature=0, ignore_eos=True)
    answers = []
    for number, ids in enumerate(work.prompts):
        request = Request(request_id=str(number), prompt_ids=ids, params=params)
        answers.append(engine.generate([request])[request.request_id].token_ids)
    stats = engine.core.stats()
    return Accepted(stats.num_drafts, list(stats.accepted_per_position), answers)


def compared(ours: Accepted, theirs: Accepted) -> dict[str, Any]:
    """Both, without their texts, and how they relate."""
    pairs = list(zip(ours.answers, theirs.answers, strict=True))
    rows = [
        asdict(found) | {"name": name, "acceptance_length": round(found.length, 4)}
        for name, found in (("aerie", ours), ("vllm", theirs))
    ]
    return {
        "rows": [{key: row[key] for key in row if key != "answers"} for row in rows],
        "ratio": round(theirs.length / ours.length, 4),
        "same_texts": sum(mine == others for mine, others in pairs),
        "same_tokens": round(sum(map(_common, pairs)) / len(pairs), 1),  # until texts part
    }


def _common(pair: tuple[list[int], list[int]]) -> int:
    equal = (mine == theirs for mine, theirs in zip(*pair, strict=False))
    return next((place for place, same in enumerate(equal) if not same), min(map(len, pair)))


if __name__ == "__main__":
    typer.run(main)
