"""Which way a frame goes: a learning switch (IEEE 802.1D) whose ports are the device and the peers."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final, Generic, TypeVar

P = TypeVar("P", bound=Hashable)
"""A peer: what the carrier takes to send to it."""

AGEING: Final = 300.0
"""Seconds without a frame from an address after which it may be anywhere (IEEE 802.1D, table 7-5)."""

SILENCE: Final = 86400.0
"""Seconds without a frame from a peer after which it gets no more; GOST's clients have no keep-alive."""

MOST_ADDRESSES: Final = 65536
"""Addresses that are kept; what is too much is not learnt, and its frames go everywhere."""

MOST_PEERS: Final = 1024
"""Peers that are kept: each gets a copy of every broadcast."""


class _Place(Generic[P]):
    """Where an address is, and when a frame has come from it last."""

    __slots__ = ("peer", "seen")

    def __init__(self, peer: P | None, seen: float) -> None:
        self.peer = peer
        self.seen = seen


class _Peer:
    """When a peer was heard last, and how many addresses are known to be there."""

    __slots__ = ("addresses", "heard")

    def __init__(self, heard: float) -> None:
        self.heard = heard
        self.addresses = 0


class Switch(Generic[P]):
    """Hardware addresses and where they are: at a peer, or (None) at the device. The time is an argument."""

    __slots__ = ("_peers", "_places", "_swept")

    def __init__(self) -> None:
        self._places: dict[bytes, _Place[P]] = {}
        self._peers: dict[P, _Peer] = {}
        self._swept = float("-inf")

    def __len__(self) -> int:
        return len(self._places)

    @property
    def peers(self) -> list[P]:
        """All peers that are kept."""
        return list(self._peers)

    def heard(self, peer: P, now: float) -> bool | None:
        """Note that a frame has come from a peer: True for a new one, None for one too many, who is not served."""
        known = self._peers.get(peer)
        if known is not None:
            known.heard = now
            return False
        if len(self._peers) >= MOST_PEERS and not self._make_room(now):
            return None
        self._peers[peer] = _Peer(now)
        return True

    def learn(self, address: bytes, peer: P | None, now: float) -> None:
        """Note where an address is; a peer has been `heard` before."""
        place = self._places.get(address)
        if place is None:
            if len(self._places) >= MOST_ADDRESSES and not self._forget_old(now):
                return
            self._places[address] = _Place(peer, now)
            self._count(peer, 1)
            return
        place.seen = now
        if place.peer != peer:
            old, place.peer = place.peer, peer
            self._count(peer, 1)
            if self._count(old, -1) == 0:
                # Its last address is elsewhere now: it has most likely become the other peer.
                assert old is not None
                del self._peers[old]

    def _count(self, peer: P | None, change: int) -> int:
        """Return how many addresses a peer has then, -1 for what is none or none any more."""
        known = self._peers.get(peer) if peer is not None else None
        if known is None:
            return -1
        known.addresses += change
        return known.addresses

    def find(self, address: bytes, now: float) -> P | None:
        """Return the peer that has an address. Raise KeyError if it may be anywhere."""
        place = self._places[address]
        if now - place.seen > AGEING or (place.peer is not None and place.peer not in self._peers):
            raise KeyError(address)
        return place.peer

    def others(self, peer: P | None) -> list[P]:
        """Return the peers that a frame for everybody goes to if it came from `peer`."""
        return [known for known in self._peers if known != peer]

    def sweep(self, now: float) -> None:
        """Forget peers that have been silent for very long: to be called from time to time."""
        for silent in [peer for peer, known in self._peers.items() if now - known.heard > SILENCE]:
            self._forget(silent)

    def _make_room(self, now: float) -> bool:
        """Forget the peer that has been silent longest; False if even that one is still there."""
        oldest = min(self._peers, key=lambda peer: self._peers[peer].heard)
        if now - self._peers[oldest].heard <= AGEING:
            return False
        self._forget(oldest)
        return True

    def _forget(self, peer: P) -> None:
        """Forget a peer and its addresses, so that it starts with none when it comes back."""
        del self._peers[peer]
        self._places = {address: place for address, place in self._places.items() if place.peer != peer}

    def _forget_old(self, now: float) -> bool:
        """Make room for addresses; False if there is none."""
        if now - self._swept >= 1.0:  # whoever fills the table shall not make us walk it for each frame
            self._swept = now
            for address in [address for address, place in self._places.items() if now - place.seen > AGEING]:
                self._count(self._places.pop(address).peer, -1)
        return len(self._places) < MOST_ADDRESSES
