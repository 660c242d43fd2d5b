"""The table of `make bench`."""

from __future__ import annotations

import io

from rich.console import Console

from benchmarks.latency import BASE, METRICS, Plan, Row, show
from server.measuring.timing import Spread


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    out = io.StringIO()
    wide = Spread(1234.56, 1000.12, 2345.67)
    row = Row(BASE, 128, dict.fromkeys(METRICS, wide), Spread(1.0, 1.0, 1.0))
    show(Console(file=out, width=80), [row], 12.3, Plan((128,), 4096, 1024, 5, 49152, 0))
    text = out.getvalue()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "1235 (1000-2346)" in text  # nothing is cut
    assert "…" not in text
    assert "TPOT" in text
