"""Which peer a packet goes to: addresses that peers have registered, and networks behind them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from ipaddress import ip_address
from typing import Generic, TypeVar

from ...core.address import IPAddress, parse_ip
from ...core.contracts import Router
from ...core.packets import Way

P = TypeVar("P", bound=Hashable)
"""A peer: what the carrier takes to send to it."""

MOST_PEERS = 65536
"""Addresses that are kept: a /16 of IPv4. Whoever may register could fill the memory otherwise."""

_MOST_CACHED = 16384
"""Destinations whose way is remembered; forgotten all at once when there are more."""

_ANY = b"\0"
"""The key of the one peer in point-to-point mode."""


class PeerTable(Generic[P]):
    """Addresses inside the tunnel, and the peers that have them; keys are packed addresses of 4 or 16 bytes.

    A network leads to the peer that has its gateway's address; the longest prefix counts. (# GOST: the first one in
    the configuration's order.) A router, if there is one, knows the networks in place of `ways`. Entries stay until
    another peer registers the address (# GOST: as there).
    """

    __slots__ = ("_cache", "_generation", "_peers", "_router", "_single", "_ways")

    def __init__(self, ways: Iterable[Way] = (), *, single: bool = False, router: Router | None = None) -> None:
        """With `single` there is one peer, that which registered last, and everything goes to it."""
        self._single = single
        self._router = router
        self._generation = 0
        self._peers: dict[bytes, P] = {}
        self._cache: dict[bytes, P | None] = {}
        # By length of the packed address: mask, network, gateway, the longest prefix first.
        self._ways: dict[int, list[tuple[int, int, bytes]]] = {4: [], 16: []}
        for way in sorted(ways, key=lambda way: way.network.prefixlen, reverse=True):
            if way.gateway is None:
                continue
            net = way.network
            size = len(net.network_address.packed)
            self._ways[size].append((int(net.netmask), int(net.network_address), way.gateway.packed))

    def __len__(self) -> int:
        return len(self._peers)

    def learn(self, addresses: Sequence[IPAddress], peer: P) -> bool:
        """Note that `peer` has these addresses; return whether anything is new. What is too much is left out."""
        changed = False
        for key in [_ANY] if self._single else [address.packed for address in addresses]:
            known = self._peers.get(key)
            if known == peer or (known is None and len(self._peers) >= MOST_PEERS):
                continue
            self._peers[key] = peer
            changed = True
        if changed:
            self._cache.clear()
        return changed

    def forget(self, address: IPAddress) -> None:
        """Forget which peer has an address."""
        if not self._single and self._peers.pop(address.packed, None) is not None:
            self._cache.clear()

    def clear(self) -> None:
        """Forget all peers."""
        self._peers.clear()
        self._cache.clear()

    def find(self, address: bytes) -> P | None:
        """Return the peer for a packed address, None if there is none."""
        if self._single:
            return self._peers.get(_ANY)
        peer = self._peers.get(address)
        if peer is not None:
            return peer
        router = self._router
        if router is not None and router.generation != self._generation:
            self._generation = router.generation
            self._cache.clear()
        try:
            return self._cache[address]
        except KeyError:
            pass
        if len(self._cache) >= _MOST_CACHED:
            self._cache.clear()
        peer = self._cache[address] = self._by_way(address)
        return peer

    def _by_way(self, address: bytes) -> P | None:
        if self._router is not None:
            route = self._router.get_route(str(ip_address(address)))
            neighbour = parse_ip(route.gateway) if route is not None else None
            return self._peers.get(neighbour.packed) if neighbour is not None else None
        number = int.from_bytes(address, "big")
        for mask, network, gateway in self._ways.get(len(address), ()):
            if number & mask == network:
                return self._peers.get(gateway)
        return None
