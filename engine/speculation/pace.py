"""Decides whether to launch steps ahead or to look up drafts. A step ahead cannot look up tokens
that are not known yet; a step that waits for them leaves the device idle."""

from __future__ import annotations

from dataclasses import dataclass, field

DECAY = 0.95  # weight of the past per observed step
MIN_WEIGHT = 8.0  # observations before a rate counts
PROBE_EVERY = 256  # steps of the better way between two trials of the other
PROBE_STEPS = 8  # steps of one trial


@dataclass(slots=True)
class Rate:
    """Running average of tokens per row and second."""

    tokens: float = 0.0
    seconds: float = 0.0
    weight: float = 0.0

    def observe(self, tokens: float, seconds: float) -> None:
        self.tokens = DECAY * self.tokens + tokens
        self.seconds = DECAY * self.seconds + seconds
        self.weight = DECAY * self.weight + 1

    @property
    def value(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class Pace:
    """Chooses the way with more tokens per second so far, and tries the other now and then. Only
    speed depends on it."""

    _rates: dict[bool, Rate] = field(default_factory=lambda: {True: Rate(), False: Rate()})
    _steps: int = 0

    def runs_ahead(self) -> bool:
        """Whether the next step should be launched ahead."""
        better = self._better()
        self._steps = (self._steps + 1) % (PROBE_EVERY + PROBE_STEPS)
        return better if self._steps < PROBE_EVERY else not better

    def observe(self, num_tokens: int, num_rows: int, seconds: float, *, ahead: bool) -> None:
        """Record a decode step: tokens of all its rows, and seconds since the previous step."""
        if num_rows:
            self._rates[ahead].observe(num_tokens / num_rows, seconds)

    def _better(self) -> bool:
        for way, rate in self._rates.items():
            if rate.weight < MIN_WEIGHT:
                return way
        return self._rates[True].value >= self._rates[False].value
