"""What forms of weights and cache cost in accuracy: `python -m benchmarks.accuracy`.

The perplexity of a fixed text, and the divergence of each next token's distribution from that of
float32 weights and cache, for each value of `model.weights`, for an FP8 cache, and for models that
`aerie quantize` has made of it (`--quantised`). Where llama-cpp-python or xllamacpp is installed
among the peers of `benchmarks.compare`, also llama.cpp's perplexity with the same file and tokens.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.measuring import machine
from benchmarks.peers.known import HERE, installed_versions
from benchmarks.tables import write_results
from configs.host import host_config
from configs.resolve import HostConfig
from drafter.train.data.target import FrozenTarget
from engine.checkpoints.checkpoint import open_checkpoint
from engine.checkpoints.source import BUNDLED_ALIAS, resolve_source
from engine.models.families import load_target
from engine.models.place import Place
from server.assembly.operations import configured_ops, torch_dtype
from server.assembly.ranks.rank import cache_scales, cache_type, weight_form
from server.measuring.open_load import TEXT
from server.text.chat_codec import load_codec

WINDOW = 512  # tokens
LLAMA_CPP = {
    "llama-cpp-python": "llama_cpp_perplexity.py",
    "xllamacpp": "xllamacpp_perplexity.py",
}  # by the name of the peer: what runs in its environment
Forms = Mapping[str, tuple[str, ...]]
FLOAT32, PLAIN = "model.dtype=float32", "model.weights=plain"
REFERENCE = (PLAIN, FLOAT32)
FORMS: dict[str, tuple[str, ...]] = {
    **{form: (f"model.weights={form}",) for form in ("stored", "plain", "q8", "q4")},
    "stored, 16-bit inputs": ("model.weights=stored", "model.input_bits=16"),
    "plain, fp8 cache": (PLAIN, "cache.dtype=fp8"),
}
Windows = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Row:
    """One form of weights and cache. Of llama.cpp, not all probabilities are read."""

    name: str
    perplexity: float
    kl: float | None  # nats per token, from the reference to this form
    same_best: float  # share of the scored tokens


def main(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", show_default=False)
    ] = None,
    model: Annotated[str, typer.Option(help="As model.source.")] = BUNDLED_ALIAS,
    text: Annotated[Path, typer.Option(help="UTF-8.")] = TEXT,
    window: Annotated[int, typer.Option(min=2)] = WINDOW,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Default: all of the text.")] = (
        None
    ),
    quantised: Annotated[
        list[Path] | None,
        typer.Option(
            help="A model that was made of this one; may be repeated.", show_default=False
        ),
    ] = None,
    only_quantised: Annotated[
        bool, typer.Option("--only-quantised", help="Measure no other form of weights.")
    ] = False,
    peers_dir: Annotated[Path, typer.Option(help="As in `benchmarks.compare`.")] = Path(
        "build/peers"
    ),
    output: Annotated[Path, typer.Option(help="JSON; the table is written beside it.")] = Path(
        "benchmarks/out/accuracy.json"
    ),
) -> None:
    """Measure perplexity and divergence of the forms of weights, and of an FP8 cache."""
    given = [f"model.source={model}", *(overrides or ())]
    config = host_config(None, given)
    ids = load_codec(config).tokenizer.encode(text.read_text(encoding="utf-8"), False)
    windows = cut(ids, window)[:max_windows]
    notes: list[str] = []
    forms, best = {} if only_quantised else dict(FORMS), list[int]()
    for path in quantised or ():
        forms[path.name] = (f"model.source={path}", *REFERENCE)
    rows = compare_forms(given, forms, windows, best, notes)
    rows += llama_cpp(config, windows, best, peers_dir, notes)
    content = {
        "benchmark": "accuracy",
        **machine.facts(),
        "model": model,
        "text": text.name,
        "window": window,
        "num_scored": len(windows) * (window - window // 2),
        "rows": [asdict(row) for row in rows],
        "notes": notes,
    }
    write_results("accuracy", output, content)
    print(f"wrote {output}")


def cut(ids: Sequence[int], window: int) -> list[list[int]]:
    """Whole windows, one after the other. ValueError if the text is shorter than one."""
    if len(ids) < window:
        raise ValueError(f"the text has {len(ids)} tokens; it needs at least {window}")
    starts = range(0, len(ids) - window + 1, window)
    return [list(ids[start : start + window]) for start in starts]


def compare_forms(
    given: Sequence[str], forms: Forms, windows: Windows, best: list[int], notes: list[str]
) -> list[Row]:
    """The reference, then each form that this machine's kernels can compute. `best` gets the
    reference's likeliest token in the place of each scored one."""
    reference = load(host_config(None, [*given, *REFERENCE]), len(windows[0]))
    targets = {"float32": reference}
    for form, settings in forms.items():
        try:
            config = host_config(None, [*given, *settings])
            targets[form] = load(config, len(windows[0]))
        except ValueError as error:
            notes.append(str(error))
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in targets}
    for number, ids in enumerate(windows):
        print(f"window {number + 1} of {len(windows)}", flush=True)
        truth = scores(reference, ids)
        best += truth.argmax(dim=1).tolist()
        for name, target in targets.items():
            own = truth if target is reference else scores(target, ids)
            sums[name] += measures(own, truth, ids)
    scored = len(windows) * (len(windows[0]) - len(windows[0]) // 2)
    return [_row(name, (total / scored).tolist()) for name, total in sums.items()]


def _row(name: str, means: Sequence[float]) -> Row:
    loss, kl, same = means
    return Row(name, math.exp(loss), kl, same)


def load(config: HostConfig, length: int) -> FrozenTarget:
    """The model that `config` names, for texts of up to `length` tokens, with the kernels that
    serve it. ValueError if they cannot compute with these weights."""
    checkpoint = open_checkpoint(resolve_source(config.model.source, config.model.revision))
    dtype, device = torch_dtype(config.model.dtype), torch.device("cpu")
    ops = configured_ops(config, device, dtype, config.kernels.threads)
    form = weight_form(config.model.weights, "model.weights", ops)
    cache = cache_type(config.cache, ops, device)
    place = Place(ops, dtype, device, weights=form, cache=cache)
    scales = cache_scales(checkpoint, place)
    model = load_target(checkpoint.arch, checkpoint.stored, place, length, scales)
    return FrozenTarget(model, ops, (), place.cache_dtype)


def scores(target: FrozenTarget, ids: Sequence[int]) -> Tensor:
    """[S / 2, V] float32: log-probabilities of each token of the second half of `ids`."""
    first = len(ids) // 2
    return target.logits(ids)[first - 1 : len(ids) - 1].float().log_softmax(dim=-1)


def measures(own: Tensor, truth: Tensor, ids: Sequence[int]) -> Tensor:
    """[3] float64, sums over the scored tokens: negative log-likelihood, divergence from `truth`,
    and how often the likeliest token is the same."""
    scored = torch.tensor(ids[len(ids) // 2 :])
    loss = -own.gather(1, scored[:, None]).double().sum()
    kl = (truth.exp() * (truth - own)).double().sum()
    same = (own.argmax(dim=1) == truth.argmax(dim=1)).double().sum()
    return torch.stack((loss, kl, same))


def llama_cpp(
    config: HostConfig, windows: Windows, best: Sequence[int], folder: Path, notes: list[str]
) -> list[Row]:
    """llama.cpp's row; none, with a note, where it is not installed, fails or reads no such file.
    `best`: the reference's likeliest tokens."""
    files = resolve_source(config.model.source, config.model.revision)
    if files.kind != "gguf":
        notes.append("without llama.cpp: the model is no .gguf file")
        return []
    pythons = {name: folder / name / "bin" / "python" for name in LLAMA_CPP}
    name = next((name for name in LLAMA_CPP if _imports(pythons[name], name)), None)
    if name is None:
        notes.append(f"without llama.cpp: none of {', '.join(LLAMA_CPP)} is installed in {folder}")
        return []
    command = [str(pythons[name]), str(HERE / LLAMA_CPP[name]), str(files.path)]
    done = subprocess.run(
        [*command, str(config.kernels.threads)],
        input=json.dumps(windows),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        notes.append(f"llama.cpp failed: {done.stderr[-500:]}")
        return []
    found = json.loads(done.stdout)
    same = sum(a == b for a, b in zip(found["best"], best, strict=True)) / len(best)
    return [Row(f"llama.cpp ({name})", math.exp(found["loss"]), None, same)]


def _imports(python: Path, package: str) -> bool:
    return python.is_file() and installed_versions(python, (package,)) is not None


if __name__ == "__main__":
    typer.run(main)
