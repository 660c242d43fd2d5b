"""Sizes in the options of `aerie plan-memory`."""

from __future__ import annotations

import pytest

from server.commands.plan import parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * 2**30), ("1.5 GB", 1_500_000_000), ("512MiB", 2**29), ("3MB", 3_000_000)],
)
def test_sizes_are_read_with_their_unit(text: str, size: int) -> None:
    assert parse_bytes(text, "--gpu-memory") == size


@pytest.mark.parametrize("text", ["80", "GiB", "-1GiB", "0GB", "1e3GB", "1.2.3GB", "8 TB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"--gpu-memory .* is not a size such as 80GiB"):
        parse_bytes(text, "--gpu-memory")
