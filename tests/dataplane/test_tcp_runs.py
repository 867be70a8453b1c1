"""Runs of TCP segments: what is joined and what is not, and that sums of the whole follow from those of the parts."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from itertools import pairwise

import pytest

from gostnet.core.stream import Buffer
from gostnet.dataplane.tcp_runs import MOST_SEGMENTS, PLAIN, join_runs

from .segments import TIMESTAMPS, payload_of, segment, train, valid

VERSIONS = pytest.mark.parametrize("version", [4, 6])


def joined(packets: Sequence[Buffer]) -> list[tuple[bytes, bytes]]:
    """Return (header, packet) of everything that would be written."""
    return [(bytes(pieces[0]), b"".join(map(bytes, pieces[1:]))) for pieces in join_runs(packets)]


@VERSIONS
@pytest.mark.parametrize("sizes", [(1000, 1000), (1348,) * 40, (100, 100, 37), (2, 2, 2, 1)])
@pytest.mark.parametrize("push", [False, True])
def test_a_run_becomes_one_packet_with_right_sums(version: int, sizes: tuple[int, ...], push: bool) -> None:
    packets = train(version, sizes)
    if push:
        packets[-1] = segment(version, payload_of(packets[-1]), 1000 + sum(sizes[:-1]), flags=0x18, identification=77)
    ((header, whole),) = joined([memoryview(packet) for packet in packets])
    kind, length = (1, 52) if version == 4 else (4, 72)
    assert header == struct.pack("=BBHHHH", 0, kind, length, sizes[0], 0, 0)
    assert valid(whole)
    assert payload_of(whole) == b"".join(map(payload_of, packets))
    assert whole[(20 if version == 4 else 40) + 13] == (0x18 if push else 0x10)


@VERSIONS
def test_random_runs_have_right_sums(version: int) -> None:
    """Among them sequence numbers that wrap, and sums on both sides of a carry."""
    chance = random.Random(version)
    for _ in range(300):
        size = 2 * chance.randrange(1, 700)
        sizes = [size] * chance.randrange(1, 10) + [chance.randrange(1, size + 1)]
        packets = train(version, sizes, chance.choice([0, 2**32 - size - 2, 2**32 - 1, chance.randrange(2**32)]))
        written = joined(packets)
        assert all(valid(whole) for _, whole in written)
        assert b"".join(payload_of(whole) for _, whole in written) == b"".join(map(payload_of, packets))


@VERSIONS
@pytest.mark.parametrize("where", range(8))
def test_a_push_ends_a_run(version: int, where: int) -> None:
    packets = train(version, (500,) * 8)
    packets[where] = segment(version, payload_of(packets[where]), 1000 + 500 * where, flags=0x18)
    written = joined(packets)
    assert all(valid(whole) for _, whole in written)
    first = b"".join(map(payload_of, packets[: where + 1] if where else packets[:1]))
    assert payload_of(written[0][1]) == first
    assert b"".join(payload_of(whole) for _, whole in written) == b"".join(map(payload_of, packets))


@VERSIONS
@pytest.mark.parametrize("where", range(1, 8))
def test_one_that_does_not_fit_divides_a_run(version: int, where: int) -> None:
    packets = train(version, (500,) * 8)
    packets[where] = segment(version, payload_of(packets[where]), 1000 + 500 * where, window=1)
    written = joined(packets)
    assert all(valid(whole) for _, whole in written)
    assert payload_of(written[0][1]) == b"".join(map(payload_of, packets[:where]))
    assert written[1] == (PLAIN, packets[where])
    assert b"".join(payload_of(whole) for _, whole in written) == b"".join(map(payload_of, packets))


@VERSIONS
def test_a_damaged_segment_is_not_healed(version: int) -> None:
    for where in (-1, -700, 30, 45):
        packets = train(version, (1000,) * 5)
        spoilt = bytearray(packets[2])
        spoilt[where] ^= 0x10
        packets[2] = bytes(spoilt)
        for header, whole in joined(packets):
            alone = header == PLAIN
            assert valid(whole) == (bytes(spoilt) != whole if alone else payload_of(bytes(spoilt)) not in whole)


def _different(version: int) -> list[tuple[str, list[bytes]]]:
    """Pairs that look like a run but for one thing."""
    first, second = train(version, (100, 100))
    data = payload_of(second)
    again = {
        "a gap": segment(version, data, 1101),
        "an overlap": segment(version, data, 1099),
        "another flow": segment(version, data, 1100, port=1001),
        "another acknowledgement": segment(version, data, 1100, ack=8),
        "another window": segment(version, data, 1100, window=501),
        "other options": segment(version, data, 1100, options=TIMESTAMPS[:-1] + b"\0"),
        "options of another length": segment(version, data, 1100, options=b""),
        "another class": segment(version, data, 1100, tos=8),
        "a larger one": segment(version, data + b"xx", 1100),
        "no payload": segment(version, b"", 1100),
    }
    for flags in (0x11, 0x12, 0x14, 0x30, 0x50, 0x90, 0x00):
        again[f"flags {flags:#x}"] = segment(version, data, 1100, flags=flags)
    pairs = [(name, [first, other]) for name, other in again.items()]
    pairs.append(("pushed at once", [segment(version, data, 1000, flags=0x18), second]))
    pairs.append(("an odd size", train(version, (101, 101))))
    if version == 4:
        fields = (0, 0x2000, 0x4001, 0x6000, 0x0005)
        pairs += [(f"fragment field {field:#x}", train(4, (100, 100), fragment=field)) for field in fields]
        pairs.append(("options of IPv4", [segment(4, data, 1000 + n, ip_options=b"\1\1\1\0") for n in (0, 100)]))
    else:
        extended = [packet[:6] + b"\0" + packet[7:] for packet in (first, second)]
        pairs.append(("an extension header", extended))
    pairs.append(("UDP", [packet[:9] + b"\x11" + packet[10:] if version == 4 else packet[:6] + b"\x11" + packet[7:]
                          for packet in (first, second)]))  # fmt: skip
    pairs.append(("a wrong length", [packet + b"\0\0" for packet in (first, second)]))
    pairs.append(("cut headers", [first[:30], second[:30]]))
    pairs.append(("a data offset of nothing", [_with_offset(packet, version, 0) for packet in (first, second)]))
    pairs.append(
        ("a data offset behind the end", [_with_offset(packet[:-60], version, 15) for packet in (first, second)])
    )
    pairs.append(("nothing", [b"", b""]))
    return pairs


def _with_offset(packet: bytes, version: int, words: int) -> bytes:
    changed = bytearray(packet)
    changed[(20 if version == 4 else 40) + 12] = words << 4
    return bytes(changed)


@pytest.mark.parametrize(
    ("version", "packets"), [pytest.param(v, p, id=f"ipv{v} {name}") for v in (4, 6) for name, p in _different(v)]
)
def test_what_is_no_run_passes_untouched(version: int, packets: list[bytes]) -> None:
    assert joined(packets) == [(PLAIN, packet) for packet in packets]


def test_a_run_is_bounded() -> None:
    for size, most in ((1348, 48), (100, MOST_SEGMENTS), (30000, 2)):
        packets = train(4, (size,) * 100)
        written = joined(packets)
        assert len(written[0][1]) == 52 + most * size
        assert all(len(whole) <= 65535 and valid(whole) for _, whole in written)


def test_no_flow_is_reordered() -> None:
    chance = random.Random(1)
    for _ in range(200):
        flows = [train(chance.choice((4, 6)), (200,) * 12, port=port) for port in range(5)]
        queue: list[bytes] = []
        left = [list(flow) for flow in flows]
        while any(left):
            flow = chance.choice([packets for packets in left if packets])
            count = chance.randrange(1, 5)
            queue += flow[:count]
            del flow[:count]
        written = [whole for _, whole in joined(queue)]
        for port, flow in enumerate(flows):
            mine = [whole for whole in written if _port(whole) == port]
            sequences = [_sequence(whole) for whole in mine]
            assert all(earlier < later for earlier, later in pairwise(sequences))
            assert b"".join(map(payload_of, mine)) == b"".join(map(payload_of, flow))


def _port(packet: bytes) -> int:
    start = 20 if packet[0] >> 4 == 4 else 40
    return int.from_bytes(packet[start : start + 2], "big")


def _sequence(packet: bytes) -> int:
    start = 24 if packet[0] >> 4 == 4 else 44
    return int.from_bytes(packet[start : start + 4], "big")
