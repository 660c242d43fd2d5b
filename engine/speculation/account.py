"""An account of what drafts win and lose, against plain steps that were measured."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.speculation.costs import Sample, StepCosts, Work

MOST_LOSS = 0.01  # share of the time that drafts may lose
MOST_CREDIT = 16.0  # plain steps whose time they may lose at once, after they have won it
FIRST_CREDIT = 2.0  # the same at first
# A step that takes longer than so many times the prediction was disturbed. The same for all steps:
# plain ones would seem faster than others if only they were spared.
MOST_OFF = 1.5
FIRST_DRAFTED = 4  # steps with drafts between the first two plain ones
MOST_DRAFTED = 64  # the same later
MOST_WORTH = 4.0  # plain steps that what was seen before counts for, beside the newest
FADED = 0.93  # what remains of that after a step with drafts
ALIKE = 1.1  # plain steps that differ by no more than this factor confirm each other
MOST_ASKED = 3  # plain steps in a row that are asked for


@dataclass(slots=True)
class PlainSteps:
    """What plain steps of about one number of rows take."""

    work: Work  # of the newest, or of one that was planned
    seconds: float  # about what that took, or is predicted to take
    scale: float  # of the costs then
    num_seen: int = 0
    worth: float = 0.0  # plain steps that `seconds` counts for
    num_drafted: int = 0  # steps with drafts since the newest
    most_drafted: int = 0  # of these before the next plain one
    num_asked: int = 0  # plain steps asked for in a row, since the newest with drafts
    is_doubtful: bool = False  # whether the newest differed from what was expected

    def observe(self, work: Work, seconds: float, costs: StepCosts) -> None:
        self.num_seen += 1
        before, weight = self.of(work, costs), 1 / (1 + self.worth)
        if self.num_seen == 2 and seconds < before:
            weight = 1.0  # the first was disturbed, as those after prompts often are
        most = MOST_OFF * before if self.num_seen > 1 else seconds
        self.work, self.seconds = work, before + weight * (min(seconds, most) - before)
        self.scale, self.num_drafted = costs.scale, 0
        self.worth = min(self.worth + 1, MOST_WORTH)
        expected = before / ALIKE <= seconds <= before * ALIKE
        self.is_doubtful = self.num_seen > 1 and not expected

    def pass_over(self) -> None:
        """A step had drafts. The more do, the less is known of what a plain one takes now."""
        self.num_drafted += 1
        self.num_asked = 0
        self.worth *= FADED

    def is_due(self) -> bool:
        """Whether the next step is to be plain. One that surprises is followed by another: if it
        was disturbed, all steps with drafts after it would seem to win."""
        if self.is_doubtful and 0 < self.num_asked < MOST_ASKED:
            self.num_asked += 1
            return True
        if self.num_drafted < self.most_drafted:
            return False
        self.num_drafted, self.num_asked = 0, 1
        self.most_drafted = min(max(FIRST_DRAFTED, 2 * self.most_drafted), MOST_DRAFTED)
        return True

    def of(self, work: Work, costs: StepCosts) -> float:
        """Seconds of a similar plain step now. The costs only say how the two differ, and how much
        slower the machine has become since: they may be wrong about both."""
        slower = min(max(costs.scale / self.scale, 1 / MOST_OFF), MOST_OFF)
        return self.seconds * slower * costs.of(work) / costs.of(self.work)


@dataclass(slots=True)
class Balance:
    """Of steps with about one number of rows."""

    plain: PlainSteps
    credit: float  # seconds that drafts may lose
    most: float  # of the credit


@dataclass(slots=True)
class Account:
    """Steps with drafts, of the head or looked up, add or take away the seconds that they won or
    lost against plain steps for the same tokens; all steps add a small share of their time. While
    the account is overdrawn, steps are to be plain. So drafts cannot lose more than that share,
    whatever the costs say. Plain steps now and then show what one takes.

    Each size of the batch has a balance of its own: what drafts won for a single row is not there
    to be lost with many.
    """

    costs: StepCosts
    _balances: dict[int, Balance] = field(default_factory=dict)  # by size of the batch

    def credit(self, num_rows: int) -> float:
        """Seconds that drafts may lose now."""
        found = self._balances.get(_size(num_rows))
        return 0.0 if found is None else min(found.credit, found.most)

    def is_overdrawn(self, num_rows: int) -> bool:
        return self.credit(num_rows) < 0

    def open(self, plain: Work) -> None:
        """A step is planned that would do this work if it were plain."""
        size, costs = _size(plain.rows), self.costs
        if size not in self._balances:
            guess = PlainSteps(plain, costs.of(plain), costs.scale)
            self._balances[size] = Balance(guess, FIRST_CREDIT * guess.seconds, 0.0)
        found = self._balances[size]
        found.most = MOST_CREDIT * found.plain.of(plain, costs)

    def is_reference(self, num_rows: int) -> bool:
        """Whether the next step is to be plain, to show what that takes."""
        found = self._balances.get(_size(num_rows))
        # None: rows have ended since a step was planned
        return found is not None and found.plain.is_due()

    def settle(self, sample: Sample, num_tokens: int, num_steps: int = 1) -> None:
        """Take in a step that emitted so many tokens, the last of `num_steps` alike."""
        work, found = sample.work, self._balances.get(_size(sample.work.rows))
        if found is None:
            return
        took = min(sample.seconds, MOST_OFF * self.costs.of(work))
        found.credit = min(found.credit, found.most) + MOST_LOSS * took * num_steps
        plain = Work(work.rows, work.rows, context=work.context)
        if work.tokens == work.rows:
            found.plain.observe(plain, took, self.costs)
        else:
            found.credit += num_tokens / work.rows * found.plain.of(plain, self.costs) - took
            found.plain.pass_over()


def _size(num_rows: int) -> int:
    """The same for similar numbers of rows."""
    return num_rows.bit_length()
