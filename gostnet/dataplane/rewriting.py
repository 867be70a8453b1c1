"""TCP from a TUN device turned back into it with other addresses, so that the kernel's own TCP gets it.

The device has an address (`here`), at which a socket listens, and a neighbour who does not exist (`there`). What a
client sends to anybody is given back as if the neighbour had sent it to the socket; what the socket answers to the
neighbour is given back as if that anybody had answered the client. A port of the neighbour stands for one connection.

    client:p -> target:q   becomes   there:n -> here:port        and, of the same connection, the other way
    here:port -> there:n   becomes   target:q -> client:p

Packets may be of any size that the device gives: of a large one to be cut into segments later (virtio_net_hdr with
TSO) only the headers change, and a checksum that is still to be summed up stays so.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address

from ..core.address import Endpoint, IPAddress

FIRST_PORT, LAST_PORT = 1024, 65535

IDLE = 300.0
"""Seconds after which a connection is forgotten: much longer than the keepalive of the sockets that listen here."""

_SWEEP = 60.0
_TCP = 6
_PORT = struct.Struct("!H")
_CHECKSUM_AT = 16
"""Where TCP has its checksum (RFC 9293 section 3.1)."""

_IPV4_ADDRESSES, _IPV6_ADDRESSES = slice(12, 20), slice(8, 40)


@dataclass(slots=True)
class _Turn:
    """What becomes of one direction's packets: new addresses and ports, and what that adds to the sums."""

    addresses: bytes
    ports: bytes
    of_addresses: int
    of_both: int
    connection: _Connection


@dataclass(slots=True)
class _Connection:
    """A connection: its ends, its keys in the table, and when it was last used."""

    client: Endpoint
    target: Endpoint
    keys: tuple[bytes, bytes]
    last: float


class Rewriter:
    """Rewrites packets in place. The caller reads them from the device and writes them back."""

    def __init__(self, pairs: Mapping[int, tuple[IPAddress, IPAddress]], port: int) -> None:
        """`pairs`: `here` and `there` by IP version; `port` is that of the socket."""
        self._pairs = {version: (here.packed, there.packed) for version, (here, there) in pairs.items()}
        self._port = _PORT.pack(port)
        self._turns: dict[bytes, _Turn] = {}
        self._connections: dict[tuple[int, int], _Connection] = {}
        self._next = FIRST_PORT
        self._swept = 0.0

    def __len__(self) -> int:
        return len(self._connections)

    def turn(self, packet: memoryview, partial: bool, now: float) -> bool:
        """Rewrite a TCP packet; False if it is none, a fragment, or nobody's. `partial`: its sum is to be completed."""
        size = len(packet)
        if size < 40:
            return False
        version = packet[0] >> 4
        if version == 4:
            start, where, is_tcp = (packet[0] & 15) * 4, _IPV4_ADDRESSES, packet[9] == _TCP
            is_tcp = is_tcp and not (packet[6] & 0x3F or packet[7])
        else:
            start, where, is_tcp = 40, _IPV6_ADDRESSES, version == 6 and packet[6] == _TCP
        if not is_tcp or start + 20 > size:
            return False
        key = bytes(packet[where]) + bytes(packet[start : start + 4])
        turn = self._turns.get(key)
        if turn is None:
            turn = self._begin(key, version, now) if packet[start + 13] & 0x17 == 0x02 else None
            if turn is None:
                return False
        turn.connection.last = now
        packet[where] = turn.addresses
        packet[start : start + 4] = turn.ports
        if version == 4:
            _add(packet, 10, turn.of_addresses)
        if partial:  # the field has the sum of the pseudo header, not inverted, and nothing of the ports
            place = start + _CHECKSUM_AT
            (field,) = _PORT.unpack_from(packet, place)
            _PORT.pack_into(packet, place, (field + turn.of_addresses) % 0xFFFF)
        else:
            _add(packet, start + _CHECKSUM_AT, turn.of_both)
        return True

    def origin(self, peer: Endpoint) -> tuple[Endpoint, Endpoint] | None:
        """Return client and target of the connection that the socket accepted from `peer`, None for any other."""
        address = peer.ip
        if address is None:
            return None
        pair = self._pairs.get(address.version)
        if pair is None or address.packed != pair[1]:
            return None
        found = self._connections.get((address.version, peer.port))
        return (found.client, found.target) if found is not None else None

    def _begin(self, key: bytes, version: int, now: float) -> _Turn | None:
        pair = self._pairs.get(version)
        if pair is None:
            return None
        here, there = pair
        width = len(here)
        source, destination, ports = key[:width], key[width : 2 * width], key[2 * width :]
        if source == here and destination == there:
            return None  # an answer to a connection that is forgotten
        number = self._free_port(version, now)
        if not number:
            return None
        back_ports = self._port + _PORT.pack(number)
        back = here + there + back_ports
        client = Endpoint(str(ip_address(source)), int.from_bytes(ports[:2], "big"))
        target = Endpoint(str(ip_address(destination)), int.from_bytes(ports[2:], "big"))
        connection = _Connection(client, target, (key, back), now)
        self._connections[version, number] = connection
        inward = _turn_of(key, there + here + back_ports[2:] + back_ports[:2], width, connection)
        self._turns[key] = inward
        self._turns[back] = _turn_of(back, destination + source + ports[2:] + ports[:2], width, connection)
        return inward

    def _free_port(self, version: int, now: float) -> int:
        if now - self._swept > _SWEEP:
            self._swept = now
            for place in [place for place, of in self._connections.items() if now - of.last > IDLE]:
                for key in self._connections.pop(place).keys:
                    self._turns.pop(key, None)
        for _ in range(LAST_PORT - FIRST_PORT + 1):
            number = self._next
            self._next = number + 1 if number < LAST_PORT else FIRST_PORT
            if (version, number) not in self._connections:
                return number
        return 0


def _turn_of(old: bytes, new: bytes, width: int, connection: _Connection) -> _Turn:
    addresses = _sum(new[: 2 * width]) - _sum(old[: 2 * width])
    return _Turn(new[: 2 * width], new[2 * width :], addresses % 0xFFFF, (_sum(new) - _sum(old)) % 0xFFFF, connection)


def _sum(data: bytes) -> int:
    return int.from_bytes(data, "big") % 0xFFFF


def _add(packet: memoryview, place: int, difference: int) -> None:
    """Change an inverted sum by what has been added to its summands (RFC 1624)."""
    (field,) = _PORT.unpack_from(packet, place)
    _PORT.pack_into(packet, place, ((field ^ 0xFFFF) + difference) % 0xFFFF ^ 0xFFFF)
