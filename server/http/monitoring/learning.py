"""What operators see of a head that learns while the server serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

Phase = Literal["waiting", "training", "trial"]


class LearningStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of GET and POST /admin/learning."""

    paused: bool  # by an operator
    phase: Phase  # waiting for text, training, or watching a new head draft
    interrupted: bool  # whether training stands still, as while requests run
    num_rounds: int  # of training that ended
    num_adopted: int  # heads that were better on held-out sequences
    num_reverted: int  # of these, heads that accepted less of live requests
    num_failed: int  # rounds that ended with an error
    held_out_before: float | None  # tokens per step on held-out sequences, in the newest round
    held_out_after: float | None
    problem: str | None  # why there is no learning, or why the newest round failed


@dataclass(slots=True)
class Learning:
    """The state of learning, on the event loop's thread."""

    paused: bool = False
    phase: Phase = "waiting"
    interrupted: bool = False
    num_rounds: int = 0
    num_adopted: int = 0
    num_reverted: int = 0
    num_failed: int = 0
    held_out_before: float | None = None
    held_out_after: float | None = None
    problem: str | None = None
    on_pause: Callable[[], None] = field(default=lambda: None)  # called when `paused` has changed

    def pause(self, *, paused: bool) -> None:
        self.paused = paused
        self.on_pause()

    @property
    def status(self) -> LearningStatus:
        names = LearningStatus.__struct_fields__
        return LearningStatus(**{name: getattr(self, name) for name in names})


class LearningCollector(Collector):
    """The state as metrics."""

    def __init__(self, learning: Learning, label: str, model_name: str) -> None:
        self._learning = learning
        self._label = label
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        found = self._learning
        counts = {
            "learning_rounds": (found.num_rounds, "Rounds of training the draft head that ended"),
            "learning_adopted": (found.num_adopted, "Draft heads put to use after training"),
            "learning_reverted": (found.num_reverted, "Draft heads taken back: they accepted less"),
            "learning_failed": (found.num_failed, "Rounds of training that ended with an error"),
        }
        for name, (count, text) in counts.items():
            counter = CounterMetricFamily(name, text, labels=[self._label])
            counter.add_metric([self._model_name], count)
            yield counter
        values = {
            "learning_paused": (float(found.paused), "1: an operator has paused learning"),
            "learning_held_out_before": (
                found.held_out_before or 0.0,
                "Tokens per step on held-out sequences before the newest round",
            ),
            "learning_held_out_after": (
                found.held_out_after or 0.0,
                "Tokens per step on held-out sequences after the newest round",
            ),
        }
        for name, (value, text) in values.items():
            gauge = GaugeMetricFamily(name, text, labels=[self._label])
            gauge.add_metric([self._model_name], value)
            yield gauge
