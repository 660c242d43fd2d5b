"""The README.md of a published draft head, in Hugging Face's form."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from drafter.train.results.report import Measurement, Report

UNSAID = "The source of this head's training text was not stated."


@dataclass(frozen=True, slots=True)
class DataSource:
    """Where training text comes from."""

    name: str
    url: str
    licence: str
    use: str  # what was used of it, and how much


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Facts about a head for its users. Licences are lower-case SPDX names, as the hub requires;
    `report` holds the numbers that `aerie eval-draft` measured."""

    name: str
    summary: str  # a paragraph: what it is and how to use it
    target: str  # hub id of the target model
    licence: str
    sources: tuple[DataSource, ...]
    training: Mapping[str, str | int | float]  # setting -> value
    report: Report | None = None

    def render(self) -> str:
        """The whole file."""
        parts = [self._front_matter(), f"# {self.name}", self.summary, self._facts()]
        parts += ["## Data", _source_table(self.sources) if self.sources else UNSAID]
        parts += ["## Training", _table(("setting", "value"), self.training.items())]
        if self.report is not None:
            parts += ["## Measured acceptance", *_measured(self.report)]
        parts += ["## Licence", f"The weights are under {self.licence}."]
        return "\n\n".join(parts) + "\n"

    def _front_matter(self) -> str:
        lines = {
            "license": self.licence,
            "base_model": self.target,
            "library_name": "safetensors",
            "tags": ["eagle", "speculative-decoding", "draft-model"],
        }
        # JSON is valid YAML; its quotes keep every text a string.
        body = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in lines.items()]
        return "\n".join(["---", *body, "---"])

    def _facts(self) -> str:
        return f"Target model: {self.target}. The head alone generates nothing."


def _source_table(sources: Sequence[DataSource]) -> str:
    rows = [(f"[{one.name}]({one.url})", one.licence, one.use) for one in sources]
    return _table(("source", "licence", "use"), rows)


def _measured(report: Report) -> list[str]:
    """A paragraph about the measurement, and its table."""
    about = (
        f"{report.num_prompts} prompts of {report.prompts}, up to {report.num_turns} turns, "
        f"up to {report.output_tokens} tokens per answer, {report.batch} at a time, with "
        f"{report.target} in {report.dtype} on {report.device}. Acceptance length is the mean "
        "number of tokens per verified tree, the bonus token counted. Position d is the share of "
        "accepted nodes of depth d - 1 after which one of depth d was accepted too."
    )
    headings = ("temperature", "tree", "noise shared", "acceptance length", "per position")
    rows = [_row(one) for one in report.measurements if one.num_drafts and not one.lookup]
    return [about, _table(headings, rows)]


def _row(one: Measurement) -> tuple[str, ...]:
    return (
        f"{one.temperature:g}",
        one.tree,
        "yes" if one.shared_noise else "no",
        f"{one.acceptance_length:.2f}",
        " ".join(f"{share:.2f}" for share in one.conditional),
    )


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: object) -> str:
    """One cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")
