"""Pictures of results, where matplotlib is installed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MISSING = "no picture: matplotlib is not installed"


def plot_compare(content: Mapping[str, Any], output: Path) -> str:
    """Bars of tokens per second beside `output`, as .png; says what was done."""
    figure, axes = _figure(1)
    if figure is None:
        return MISSING
    servers = list(dict.fromkeys(row["server"] for row in content["rows"]))
    streams = list(dict.fromkeys(row["streams"] for row in content["rows"]))
    width = 0.8 / max(len(servers), 1)
    for place, server in enumerate(servers):
        rows = [row for row in content["rows"] if row["server"] == server]
        left = [streams.index(row["streams"]) + width * place for row in rows]
        spreads = [row["tokens_per_second"] for row in rows]
        axes[0].bar(left, _medians(spreads), width, yerr=_errors(spreads), label=server)
    axes[0].set_xticks([i + 0.4 - width / 2 for i in range(len(streams))], streams)
    axes[0].set(xlabel="streams", ylabel="tokens/s", title=f"{content['model']}, {_place(content)}")
    axes[0].legend()
    return _save(figure, output)


def plot_serving(content: Mapping[str, Any], output: Path) -> str:
    """Goodput and times over the offered rate beside `output`, as .png; says what was done."""
    figure, axes = _figure(2)
    if figure is None:
        return MISSING
    rows = content["rows"]
    rates = [row["rate"] for row in rows]
    axes[0].plot(rates, rates, ":", color="grey", label="offered")
    axes[0].plot(rates, [row["goodput"] for row in rows], "o-", label="goodput")
    axes[0].set(ylabel="requests/s", title=f"{content['server']}, {_place(content)}")
    for name in ("ttft_p50", "ttft_p99", "ttit_p50", "ttit_p99"):
        axes[1].plot(rates, [row[name] for row in rows], "o-", label=name)
    axes[1].set(xlabel="offered requests/s", ylabel="ms", yscale="log")
    for part in axes:
        part.legend()
    return _save(figure, output)


def plot_fleet(content: Mapping[str, Any], output: Path) -> str:
    """Goodput of an engine and p99 over the offered rate, by routing and size of the fleet, beside
    `output`; says what was done."""
    figure, axes = _figure(2)
    if figure is None:
        return MISSING
    styles = {"prefix": "o-", "round_robin": "x--"}
    sizes = list(dict.fromkeys(row["replicas"] for row in content["rows"]))
    for place, number in enumerate(sizes):
        for routing, style in styles.items():
            rows = [
                row
                for row in content["rows"]
                if (row["replicas"], row["routing"]) == (number, routing)
            ]
            rates = [row["rate"] for row in rows]
            label, look = f"{number}, {routing}", {"color": f"C{place}", "markersize": 4}
            goodput = [row["goodput"] / number for row in rows]
            axes[0].plot(rates, goodput, style, label=label, **look)
            firsts = [row["ttft_p99"] for row in rows]
            axes[1].plot(rates, [math.nan if f is None else f for f in firsts], style, **look)
    axes[0].set(ylabel="good requests/s and engine", title=f"simulated from {content['measured']}")
    axes[0].legend(title="engines, routing")
    axes[1].axhline(content["ttft"] * 1e3, color="grey", linestyle=":")
    axes[1].set(
        xlabel="offered requests/s and engine",
        ylabel="p99 of the time to first token, ms",
        yscale="log",
    )
    return _save(figure, output)


def _figure(rows: int) -> tuple[Any, Sequence[Any]]:
    """A figure and its axes, one below the other; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None, ()
    figure = Figure(figsize=(9, 4.5 * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, 1, row + 1) for row in range(rows)]


def _medians(spreads: Sequence[Mapping[str, float]]) -> list[float]:
    return [spread["median"] for spread in spreads]


def _errors(spreads: Sequence[Mapping[str, float]]) -> list[list[float]]:
    below = [spread["median"] - spread["low"] for spread in spreads]
    return [below, [spread["high"] - spread["median"] for spread in spreads]]


def _place(content: Mapping[str, Any]) -> str:
    return f"{content['cores']} cores of {content['device']}"


def _save(figure: Any, output: Path) -> str:
    path = output.with_suffix(".png")
    figure.savefig(path, dpi=120)
    return f"wrote {path}"
