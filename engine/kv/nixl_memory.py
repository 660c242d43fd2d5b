"""Pages between engines on different machines, through NIXL and UCX."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Sequence

import msgspec
import torch
from nixl import _bindings
from nixl._api import nixl_agent, nixl_agent_config
from torch import Tensor

from engine.kv.transfer import BlockPages

POLL = 5e-5  # seconds between looks at a transfer
# NIXL's errors have no class of their own in common.
NIXL_ERRORS = (
    _bindings.nixlBackendError,
    _bindings.nixlCancelledError,
    _bindings.nixlInvalidParamError,
    _bindings.nixlMismatchError,
    _bindings.nixlNotAllowedError,
    _bindings.nixlNotFoundError,
    _bindings.nixlRemoteDisconnectError,
    _bindings.nixlUnknownError,
)


class Endpoint(msgspec.Struct, frozen=True, array_like=True):
    """What a sender needs to know of a receiver."""

    agent: bytes  # NIXL's own data
    areas: tuple[int, ...]  # addresses of the places, by the number of the sender
    width: int  # bytes of a place


class NixlMemory:
    """`KVTransfer` by writes into the memory of the receiver, which has an area of places for each
    sender. What is sent and received passes through host memory."""

    def __init__(
        self, pages: Sequence[Tensor], number: int, num_peers: int, num_places: int, timeout: float
    ) -> None:
        """`pages`: as for `BlockPages`. `number`: that of this engine among those of its role.
        `num_places`: blocks that this engine receives into; 0 for one that sends only. `timeout`:
        seconds that a transfer may take."""
        self._pages = BlockPages(pages)
        self._number = number
        self._timeout = timeout
        self._agent = nixl_agent(uuid.uuid4().hex, nixl_agent_config(backends=["UCX"]))
        shape = num_places, self._pages.width
        self._areas = [torch.empty(shape, dtype=torch.uint8) for _ in range(num_peers)]
        self._staged = torch.empty((0, self._pages.width), dtype=torch.uint8)
        self._registered = None  # of `_staged`
        self._peers: dict[int, tuple[bytes, str]] = {}  # endpoint, name
        self._silent: dict[int, tuple[bytes, float]] = {}  # endpoint, until when it is left alone
        self.endpoint = b""
        if num_places:
            for area in self._areas:
                self._agent.register_memory(area)
            addresses = tuple(area.data_ptr() for area in self._areas)
            agent = self._agent.get_agent_metadata()
            self.endpoint = msgspec.msgpack.encode(Endpoint(agent, addresses, self._pages.width))

    def send(
        self, peer: int, blocks: Sequence[int], places: Sequence[int], endpoint: bytes
    ) -> None:
        there = msgspec.msgpack.decode(endpoint, type=Endpoint)
        if there.width != self._pages.width:
            raise ConnectionError(f"its pages have {there.width} bytes, not {self._pages.width}")
        silent, until = self._silent.get(peer, (b"", 0.0))
        if silent == endpoint and time.monotonic() < until:
            raise ConnectionError(f"it has not answered for {self._timeout} s")
        staged = self._stage(blocks)
        own = self._addresses(staged.data_ptr(), range(len(blocks)))
        theirs = self._addresses(there.areas[self._number], places)
        try:
            self._write(own, theirs, self._reach(peer, endpoint, there))
        except NIXL_ERRORS as error:
            self._forget(peer)
            raise ConnectionError(str(error)) from error
        except TimeoutError:
            self._forget(peer)
            self._silent[peer] = endpoint, time.monotonic() + self._timeout
            raise ConnectionError(f"not written within {self._timeout} s") from None

    def receive(self, peer: int, blocks: Sequence[int]) -> None:
        self._pages.copy_in(blocks, self._areas[peer], blocks)

    def _stage(self, blocks: Sequence[int]) -> Tensor:
        """These blocks, in memory that NIXL may read."""
        if len(blocks) > len(self._staged):
            if self._registered is not None:
                self._agent.deregister_memory(self._registered)
            shape = 2 * len(blocks), self._pages.width
            self._staged = torch.empty(shape, dtype=torch.uint8)
            self._registered = self._agent.register_memory(self._staged)
        self._pages.copy_out(blocks, self._staged, range(len(blocks)))
        return self._staged

    def _addresses(self, first: int, rows: Sequence[int]) -> list[tuple[int, int, int]]:
        """Rows of an area that begins at `first`: address, bytes, device."""
        width = self._pages.width
        return [(first + row * width, width, 0) for row in rows]

    def _reach(self, peer: int, endpoint: bytes, there: Endpoint) -> str:
        """The name of a peer, which may have started again since the last time."""
        known, name = self._peers.get(peer, (b"", ""))
        if known != endpoint:
            self._forget(peer)
            name = self._agent.add_remote_agent(there.agent)
            self._peers[peer] = endpoint, name
        return name

    def _write(
        self, own: list[tuple[int, int, int]], theirs: list[tuple[int, int, int]], name: str
    ) -> None:
        """Return when the receiver has all of it."""
        agent, end = self._agent, time.monotonic() + self._timeout
        rows, places = (agent.get_xfer_descs(each, "DRAM") for each in (own, theirs))
        transfer = agent.initialize_xfer("WRITE", rows, places, name)
        try:
            state = agent.transfer(transfer)
            while state == "PROC":
                if time.monotonic() > end:
                    raise TimeoutError
                time.sleep(POLL)
                state = agent.check_xfer_state(transfer)
        finally:
            with contextlib.suppress(*NIXL_ERRORS):
                agent.release_xfer_handle(transfer)
        if state != "DONE":
            raise TimeoutError

    def _forget(self, peer: int) -> None:
        """Disconnect: what is still on its way to this peer does not arrive."""
        known = self._peers.pop(peer, None)
        if known is not None:
            with contextlib.suppress(*NIXL_ERRORS):
                self._agent.remove_remote_agent(known[1])
