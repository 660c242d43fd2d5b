"""The cache returns the target's features, runs it once per example, and survives bad files."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from drafter.train.data import feature_cache
from drafter.train.data.encoding import Example
from drafter.train.data.feature_cache import CachedFeatures, LiveFeatures
from drafter.train.data.target import TargetFeatures

WIDTH, HIDDEN = 6, 4
PER_TOKEN = (WIDTH + HIDDEN) * 2 + 4
LENGTHS = (5, 1, 7, 3)
BATCHES = ([2, 0], [1, 3])


class CountingTarget:
    """Features that depend only on the text; records the texts."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, shift: int = 0) -> None:
        self.asked: list[Sequence[int]] = []
        self._dtype = dtype
        self._shift = shift

    def features(self, texts: Sequence[Sequence[int]]) -> TargetFeatures:
        self.asked += texts
        return TargetFeatures.join([self._one(text) for text in texts])

    def _one(self, text: Sequence[int]) -> TargetFeatures:
        column = torch.tensor(text)[:, None] + self._shift
        taps = (column * torch.arange(1, WIDTH + 1)).to(self._dtype)
        return TargetFeatures(taps, -taps[:, :HIDDEN], column.flatten().to(torch.int32))


def examples(first_token: int = 1) -> list[Example]:
    found, token = [], first_token
    for length in LENGTHS:
        ids = list(range(token, token + length))
        found.append(Example(ids, [True] * length))
        token += length
    return found


def cache(
    folder: Path,
    target: CountingTarget,
    data: Sequence[Example] | None = None,
    max_bytes: int = 10**6,
    dtype: torch.dtype = torch.bfloat16,
    identity: str = "target",
) -> CachedFeatures:
    live = LiveFeatures(target, data or examples())  # type: ignore[arg-type]
    return CachedFeatures(live, folder, max_bytes, WIDTH, HIDDEN, dtype, identity)


def epoch(source: CachedFeatures) -> list[TargetFeatures]:
    return [
        features
        for batch in BATCHES
        for features in source.features(batch).split(
            [len(source._live.examples[number].token_ids) for number in batch]
        )
    ]


def assert_right(found: list[TargetFeatures], data: Sequence[Example] | None = None) -> None:
    numbers = [number for batch in BATCHES for number in batch]
    texts = [(data or examples())[number].token_ids for number in numbers]
    expected = CountingTarget().features(texts).split([len(text) for text in texts])
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.taps, theirs.taps)
        assert torch.equal(mine.hidden, theirs.hidden)
        assert torch.equal(mine.best, theirs.best)
        assert (mine.taps.dtype, mine.best.dtype) == (theirs.taps.dtype, torch.int32)


def test_second_epoch_equals_the_first_without_the_target(tmp_path: Path) -> None:
    target = CountingTarget()
    source = cache(tmp_path / "new" / "folder", target)
    assert_right(epoch(source))
    assert len(target.asked) == len(LENGTHS)
    assert_right(epoch(source))
    assert len(target.asked) == len(LENGTHS)


def test_a_later_process_uses_what_is_stored(tmp_path: Path) -> None:
    cache(tmp_path, CountingTarget()).features([2, 1])
    target = CountingTarget()
    assert_right(epoch(cache(tmp_path, target)))
    assert target.asked == [examples()[0].token_ids, examples()[3].token_ids]


def test_two_caches_at_once_share_what_either_computes(tmp_path: Path) -> None:
    targets = CountingTarget(), CountingTarget()
    first, second = (cache(tmp_path, target) for target in targets)
    first.features([0, 1])
    second.features([2, 3])
    assert_right(epoch(first))
    assert_right(epoch(second))
    assert [len(target.asked) for target in targets] == [2, 2]


@pytest.mark.parametrize("kept", range(len(LENGTHS) + 1))
def test_files_stay_below_the_limit_and_the_rest_is_recomputed(kept: int, tmp_path: Path) -> None:
    limit = sum(LENGTHS[:kept]) * PER_TOKEN + 8 * kept  # and a checksum of each
    target = CountingTarget()
    source = cache(tmp_path, target, max_bytes=max(limit, 4))
    assert_right(epoch(source))
    assert_right(epoch(source))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= max(limit, 4)
    assert len(target.asked) == 2 * len(LENGTHS) - kept


def test_one_byte_less_keeps_one_example_less(tmp_path: Path) -> None:
    target = CountingTarget()
    source = cache(tmp_path, target, max_bytes=sum(LENGTHS) * PER_TOKEN + 8 * len(LENGTHS) - 1)
    epoch(source)
    epoch(source)
    assert target.asked.count(examples()[3].token_ids) == 2
    assert len(target.asked) == len(LENGTHS) + 1


def test_other_targets_and_other_data_use_other_files(tmp_path: Path) -> None:
    epoch(cache(tmp_path, CountingTarget(shift=1), identity="another"))
    epoch(cache(tmp_path, CountingTarget(torch.float32, shift=1), dtype=torch.float32))
    epoch(cache(tmp_path, CountingTarget(shift=1), examples(first_token=2)))
    epoch(cache(tmp_path, CountingTarget(shift=1), examples()[::-1][2:] + examples()[:2]))
    target = CountingTarget()
    assert_right(epoch(cache(tmp_path, target)))
    assert len(target.asked) == len(LENGTHS)


@pytest.mark.parametrize("part", ["taps", "hidden", "best", "sums"])
def test_what_did_not_reach_the_disk_is_computed_again(part: str, tmp_path: Path) -> None:
    """A power failure loses pages in any order, even data whose checksum was written later."""
    epoch(cache(tmp_path, CountingTarget()))
    (path,) = tmp_path.glob(f"*.{part}")
    content = path.read_bytes()
    path.write_bytes(bytes(len(content) // 2) + content[len(content) // 2 :])
    target = CountingTarget()
    source = cache(tmp_path, target)
    assert_right(epoch(source))
    assert 0 < len(target.asked) < len(LENGTHS)
    assert_right(epoch(source))
    assert_right(epoch(cache(tmp_path, CountingTarget())))


def test_a_process_killed_while_it_stores_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(features: TargetFeatures) -> int:
        raise KeyboardInterrupt

    first = cache(tmp_path, CountingTarget(shift=5))
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "_checksum", kill)
        with pytest.raises(KeyboardInterrupt):
            first.features([0])
    target = CountingTarget()
    assert_right(epoch(cache(tmp_path, target)))
    assert len(target.asked) == len(LENGTHS)


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Files cannot grow beyond this size, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_is_an_error_at_once_that_names_the_file_and_takes_no_room(tmp_path: Path) -> None:
    size = max(LENGTHS) * PER_TOKEN
    with (
        largest_file(size // 4),
        pytest.raises(OSError, match=r"no room.* bytes.*\.taps") as raised,
    ):
        cache(tmp_path, CountingTarget())
    assert raised.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_at_a_later_file_frees_the_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache(tmp_path, CountingTarget())
    kept = set(tmp_path.iterdir())
    allocate, calls = feature_cache.os.posix_fallocate, []

    def full(handle: int, first: int, size: int) -> None:
        calls.append(size)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(handle, first, size)

    monkeypatch.setattr(feature_cache.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left") as raised:
        cache(tmp_path, CountingTarget(), identity="another")
    assert raised.value.errno == errno.ENOSPC
    assert set(tmp_path.iterdir()) == kept  # files of another run stay
