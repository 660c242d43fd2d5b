"""Rounds of the 8B shape on a CUDA device: their time against reading the weights, and the kernels
that they launch."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.engine import Large, floor_ms
from benchmarks.gpu.parts import print_result
from benchmarks.kernels import copy_bandwidth, triton_ops
from benchmarks.measuring import bars
from benchmarks.measuring.bars import Verdict
from benchmarks.measuring.step_times import WARM_UP, Load, device_spans, steps, time_steps
from engine.core import EngineCore
from engine.speculation.planner import FixedPlanner
from engine.step.shape import ROOT, TreeShape, chain
from kernels.ops import Ops
from server.assembly.compose import assemble
from server.assembly.drafting import Drafting, LoadedDraft, Target, tree_shape

Found = dict[str, Any]
PROFILED = 8  # steps
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
EDITED = {"repetition_penalty": 1.1, "frequency_penalty": 0.2, "top_p": 0.9, "temperature": 0.8}
ALONE, AHEAD = Load(), Load(run_ahead=True)
LOADS: dict[str, tuple[TreeShape, Load]] = {
    "root": (ROOT, AHEAD),
    "chain3": (chain(3), AHEAD),
    "dynamic16": (tree_shape("dynamic16"), AHEAD),
    "root, 64 rows, penalties and top-p": (ROOT, Load(rows=64, params=EDITED)),
    "root, 64 rows, the same, run-ahead": (ROOT, Load(rows=64, params=EDITED, run_ahead=True)),
}
PROFILED_LOADS = ("root", "chain3", "dynamic16")
# Words after the name of a load -> settings of its kernels; the others have the default ones
NO_OVERLAP = ", without overlap"
KERNELS: dict[str, tuple[str, ...]] = {
    NO_OVERLAP: ("kernels.overlap=false",),
    ", torch between drafts": ("kernels.fused_drafting=false",),
}
NAMES = (
    *(f"{load}{words}" for load in ("root", "chain3") for words in ("", *KERNELS)),
    *list(LOADS)[2:],
)


@dataclass(frozen=True, slots=True)
class Rounds:
    """Runs rounds of a model of the 8B shape; `head` is None until a tree needs one."""

    large: Large
    target: Target
    head: LoadedDraft | None = None

    def with_kernels(self, ops: Ops) -> Rounds:
        """The same model with other operations."""
        return replace(self, large=replace(self.large, ops=ops))

    def core(self, shape: TreeShape, load: Load) -> EngineCore:
        if shape == ROOT:
            drafting = Drafting(planner=FixedPlanner(ROOT))
        else:
            assert self.head is not None
            drafting = self.large.drafting(self.head, shape)
        config = load.settings(self.large.config)
        return assemble(config, self.target, self.large.place, drafting)


def rounds(names: Iterable[str] = NAMES) -> Found:
    """Times and kernels of the rounds of LOADS, printed after every one."""
    device = torch.device("cuda")
    bandwidth = copy_bandwidth()
    found: Found = {"copy": bandwidth, "floor_ms": floor_ms(bandwidth), "rounds": {}, "failed": []}
    with tempfile.TemporaryDirectory() as folder:
        tables = {
            words: triton_ops(device, *settings) for words, settings in {"": (), **KERNELS}.items()
        }
        large = Large(tables[""], device, Path(folder), rows=64)
        running = Rounds(large, large.target())
        for name in names:
            words = next((words for words in KERNELS if name.endswith(words)), "")
            shape, load = LOADS[name.removesuffix(words)]
            if shape != ROOT and running.head is None:
                running = Rounds(large, running.target, large.head(running.target))
            used = running.with_kernels(tables[words])
            found["rounds"][name] = measured(
                lambda r=used, s=shape, o=load: r.core(s, o),  # type: ignore[misc]
                load,
                profiled=name in PROFILED_LOADS,
            )
            found["bars"] = bars.as_json(verdicts(found))
            print_result(found)
            torch.cuda.empty_cache()
    return found


def measured(make: Callable[[], EngineCore], load: Load, *, profiled: bool) -> Found:
    """Times of a load's steps and, if `profiled`, their kernels, in engines from `make`."""
    found: Found = dict(time_steps(make(), load))
    if profiled:
        found |= profile(make(), load)
    return found


def profile(core: EngineCore, load: Load) -> Found:
    """What one step runs on the device: the number of kernels, their microseconds, and those by
    name. Running ahead, one step more than `PROFILED` may be launched."""
    running = steps(core, load)
    for _ in itertools.islice(running, WARM_UP):
        pass
    core.land()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with device_spans() as spans, torch.profiler.profile(activities=activities) as trace:
        for _ in itertools.islice(running, PROFILED):
            pass
        core.land()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return by_name(events, len(spans))


def by_name(events: Iterable[dict[str, Any]], num_steps: int) -> Found:
    """Events of a trace, per step: `kernels` and their `kernel_us` in all, and `by_name` the number
    and microseconds of each, the longest first."""
    counts: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") in ON_DEVICE:
            entry = counts.setdefault(str(event["name"])[:80], [0, 0.0])
            entry[0] += 1
            entry[1] += event["dur"]
    ordered = sorted(counts.items(), key=lambda item: -item[1][1])
    return {
        "kernels": sum(count for count, _ in counts.values()) / num_steps,
        "kernel_us": round(sum(micros for _, micros in counts.values()) / num_steps, 1),
        "by_name": {
            name: [round(count / num_steps, 2), round(micros / num_steps, 1)]
            for name, (count, micros) in ordered
        },
    }


def verdicts(found: Found) -> list[Verdict]:
    """The bars, as far as what they need was measured."""
    times = {name: round_["device_ms"] for name, round_ in found["rounds"].items()}
    kernels = {name: round_.get("kernels") for name, round_ in found["rounds"].items()}
    made = []
    if "root" in times:
        share = times["root"] / found["floor_ms"]
        made.append(Verdict("round of the 8B shape / reading its weights", 1.18, share))
        made.append(Verdict("kernels in that round", 230, kernels["root"]))
    for name, most, launches in (("chain3", 0.75, 150), ("dynamic16", 1.2, 500)):
        if name in times:
            more = kernels[name] - kernels["root"]
            made.append(Verdict(f"{name} adds, ms", most, times[name] - times["root"]))
            made.append(Verdict(f"{name} adds, kernels", launches, more))
    for name in ("root", "chain3"):
        without = f"{name}{NO_OVERLAP}"
        if without in times:
            verdict = f"{name} / {without}"
            made.append(Verdict(verdict, 1.0, times[name] / times[without]))
    for name, round_ in found["rounds"].items():
        if "64 rows" in name:
            made.append(Verdict(f"host's time in a step, us: {name}", 100, round_["gap_us"]))
    return made
