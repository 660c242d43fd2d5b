"""Pages on their way between engines, by each transport."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from engine.kv.transfer import KVTransfer, SharedMemory

NUM_BLOCKS = 7


def pages(fill: float | None = None) -> list[Tensor]:
    """Three tensors of a block, of several types and widths."""
    made = [
        torch.randn(NUM_BLOCKS, 2, 3),
        torch.randn(NUM_BLOCKS, 5).bfloat16(),
        torch.randint(255, (NUM_BLOCKS, 1), dtype=torch.uint8),
    ]
    return made if fill is None else [torch.full_like(page, fill) for page in made]


@dataclass
class Lab:
    """Two engines that compute prompts, and one that decodes."""

    kind: str
    areas: list[int]

    def sender(self, number: int, own: list[Tensor]) -> KVTransfer:
        if self.kind == "shared_memory":
            return SharedMemory(own, {0: self.areas[number]}, 0)
        from engine.kv.nixl_memory import NixlMemory

        return NixlMemory(own, number, 1, 0, timeout=20.0)

    def receiver(self, own: list[Tensor]) -> KVTransfer:
        if self.kind == "shared_memory":
            return SharedMemory(own, dict(enumerate(self.areas)), NUM_BLOCKS)
        from engine.kv.nixl_memory import NixlMemory

        return NixlMemory(own, 0, 2, NUM_BLOCKS, timeout=20.0)


@pytest.fixture(params=["shared_memory", pytest.param("nixl", marks=pytest.mark.nixl)])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    if request.param == "nixl":
        pytest.importorskip("nixl", reason="the extra `nixl` is not installed")
    areas = [os.memfd_create(f"test-{number}") for number in range(2)]
    yield Lab(request.param, areas)
    for area in areas:
        os.close(area)


def test_blocks_arrive_bit_for_bit_and_touch_no_others(lab: Lab) -> None:
    ours, theirs = pages(), pages(0)
    receiver = lab.receiver(theirs)
    sender = lab.sender(0, ours)
    sender.send(0, [4, 1, 6], [5, 0, 2], receiver.endpoint)
    assert not any(page.any() for page in theirs)
    receiver.receive(0, [5, 0, 2])
    for own, there in zip(ours, theirs, strict=True):
        assert torch.equal(there[[5, 0, 2]], own[[4, 1, 6]])
        assert not there[[1, 3, 4, 6]].any()


def test_senders_do_not_write_where_others_do(lab: Lab) -> None:
    first, second, theirs = pages(1), pages(2), pages(0)
    receiver = lab.receiver(theirs)
    for number, own in enumerate((first, second)):
        lab.sender(number, own).send(0, [3], [3], receiver.endpoint)
    for number, value in ((0, 1), (1, 2)):
        receiver.receive(number, [3])
        assert all((page[3] == value).all() for page in theirs)


def test_a_receiver_that_starts_again_is_found_at_its_new_endpoint(lab: Lab) -> None:
    sender = lab.sender(0, pages(3))
    for _ in range(2):
        theirs = pages(0)
        receiver = lab.receiver(theirs)
        sender.send(0, list(range(NUM_BLOCKS)), list(range(NUM_BLOCKS)), receiver.endpoint)
        receiver.receive(0, list(range(NUM_BLOCKS)))
        assert all((page == 3).all() for page in theirs)


def _fail(*_: object) -> None:
    raise TimeoutError


@pytest.mark.nixl
def test_a_receiver_that_is_gone_or_different_is_a_connection_error() -> None:
    pytest.importorskip("nixl", reason="the extra `nixl` is not installed")
    lab = Lab("nixl", [])
    sender, receiver = lab.sender(0, pages(3)), lab.receiver(pages(0))
    endpoint = receiver.endpoint
    sender.send(0, [0], [0], endpoint)
    del receiver
    for _ in range(2):
        with pytest.raises(ConnectionError):
            sender.send(0, [0], [0], endpoint)
    wider = lab.receiver([torch.zeros(NUM_BLOCKS, 50)])
    with pytest.raises(ConnectionError, match="its pages have 200 bytes, not 35"):
        sender.send(0, [0], [0], wider.endpoint)
    silent = lab.receiver(pages(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(sender), "_write", _fail)
        with pytest.raises(ConnectionError, match=r"not written within 20\.0 s"):
            sender.send(0, [0], [0], silent.endpoint)
    with pytest.raises(ConnectionError, match=r"it has not answered for 20\.0 s"):
        sender.send(0, [0], [0], silent.endpoint)
    again, theirs = pages(0), [0]
    receiver = lab.receiver(again)
    sender.send(0, [0], theirs, receiver.endpoint)
    receiver.receive(0, theirs)
    assert all((page[0] == 3).all() for page in again)
