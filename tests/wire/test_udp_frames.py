"""Datagram framings: UDP-tun and length frames, SOCKS5 datagrams."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.core.address import Endpoint
from gostnet.core.errors import ProtocolError
from gostnet.wire.udp_frames import (
    MAX_DATA,
    MAX_TUN_FRAME,
    LengthFrames,
    TunFrames,
    decode_datagram,
    encode_datagram,
    encode_length_frames,
    encode_tun_frames,
)

PEER = Endpoint("127.0.0.1", 7007)
NAME = Endpoint("dns.example", 53)
SIX = Endpoint("2001:db8::1", 53)

GOLDEN = bytes.fromhex("0007ff017f0000011b5f") + b"dgram-1"
"""As gost 3.3.0 writes it."""


def test_frames_are_those_of_gost() -> None:
    assert encode_tun_frames([(b"dgram-1", PEER)]) == GOLDEN
    assert TunFrames().feed(GOLDEN) == [(b"dgram-1", PEER)]
    assert encode_length_frames([b"hello"]) == b"\0\5hello"
    assert encode_datagram(b"dgram-1", PEER) == bytes.fromhex("000000017f0000011b5f") + b"dgram-1"


BATCH = [(b"one", PEER), (b"x" * MAX_DATA, NAME), (b"3", SIX), (b"four" * 300, PEER)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 1448, 4096, 65536, 1 << 20])
def test_tun_frames_survive_any_cut(size: int) -> None:
    batch = BATCH if size > 1000 else [(data[:40], peer) for data, peer in BATCH]
    stream = encode_tun_frames(batch)
    frames = TunFrames()
    got = [frame for start in range(0, len(stream), size) for frame in frames.feed(stream[start : start + size])]
    assert got == batch
    assert frames.pending == 0
    assert frames.error is None


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1448, 65536])
def test_length_frames_survive_any_cut(size: int) -> None:
    batch = [b"", b"one", b"", b"x" * (MAX_DATA if size > 1000 else 40), b"4"]
    stream = encode_length_frames(batch)
    frames = LengthFrames()
    got = [frame for start in range(0, len(stream), size) for frame in frames.feed(stream[start : start + size])]
    assert got == batch
    assert frames.pending == 0


def test_a_frame_that_is_not_complete_is_held_and_nothing_more() -> None:
    whole = encode_tun_frames([(b"x" * MAX_DATA, Endpoint("n" * 255, 1))])
    assert len(whole) == MAX_TUN_FRAME
    frames = TunFrames()
    for start in range(0, len(whole) - 1, 1000):
        assert frames.feed(whole[start : min(start + 1000, len(whole) - 1)]) == []
        assert frames.pending <= MAX_TUN_FRAME
    assert frames.feed(whole[-1:] + GOLDEN[:4]) == [(b"x" * MAX_DATA, Endpoint("n" * 255, 1))]
    assert frames.pending == 4


def test_empty_datagrams_are_read_and_never_written_as_tun_frames() -> None:
    empty = bytes.fromhex("0000ff017f0000011b5f")
    assert TunFrames().feed(empty + GOLDEN) == [(b"", PEER), (b"dgram-1", PEER)]
    assert encode_tun_frames([(b"", PEER), (b"dgram-1", PEER), (b"", PEER)]) == GOLDEN


def test_what_no_frame_can_carry_is_left_out() -> None:
    batch = [(b"x" * (MAX_DATA + 1), PEER), (b"y", Endpoint("n" * 256, 1)), (b"dgram-1", PEER)]
    assert encode_tun_frames(batch) == GOLDEN
    assert encode_length_frames([b"x" * (MAX_DATA + 1), b"hello"]) == b"\0\5hello"


def test_a_bad_name_costs_its_own_datagram_only() -> None:
    bad = b"\0\1\xff\x03\x03a\nb\0\x35Z"
    frames = TunFrames()
    assert frames.feed(bad + GOLDEN + bad) == [(b"dgram-1", PEER)]
    assert frames.error is None


def test_an_unknown_address_type_ends_the_stream_after_what_came_before() -> None:
    frames = TunFrames()
    assert frames.feed(GOLDEN + b"\0\1\xff\x07\0\0\0" + GOLDEN) == [(b"dgram-1", PEER)]
    assert "address type 7" in str(frames.error)


@pytest.mark.parametrize("frag", [0, 1, 0x7F, 0x80, 0xFF])
def test_the_fragment_number_is_not_looked_at(frag: int) -> None:
    assert TunFrames().feed(GOLDEN[:2] + bytes((frag,)) + GOLDEN[3:]) == [(b"dgram-1", PEER)]
    packet = bytes((0, 0, frag)) + GOLDEN[3:]
    assert decode_datagram(packet) == (b"dgram-1", PEER)


@pytest.mark.parametrize("peer", [PEER, NAME, SIX])
def test_a_datagram_is_cut_nowhere_in_its_header(peer: Endpoint) -> None:
    packet = encode_datagram(b"", peer)
    assert decode_datagram(packet) == (b"", peer)
    for size in range(len(packet)):
        with pytest.raises(ProtocolError):
            decode_datagram(packet[:size])


peers = st.one_of(
    st.ip_addresses(v=4).map(str), st.sampled_from(["a", "dns.example", "n" * 255, "2001:db8::1", "::"])
).flatmap(lambda host: st.integers(0, 65535).map(lambda port: Endpoint(host, port)))


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=200), peers), max_size=8), st.data())
def test_reading_gives_back_what_was_written(batch: list[tuple[bytes, Endpoint]], data: st.DataObject) -> None:
    stream = encode_tun_frames(batch)
    frames = TunFrames()
    got = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        got += frames.feed(stream[:size])
        stream = stream[size:]
    assert got == batch


@given(st.lists(st.binary(min_size=1, max_size=64), max_size=20))
def test_any_bytes_are_frames_or_an_error(pieces: list[bytes]) -> None:
    frames = TunFrames()
    for piece in pieces:
        frames.feed(piece)
        assert frames.pending <= MAX_TUN_FRAME
    whole = TunFrames()
    whole.feed(b"".join(pieces))
    assert str(whole.error) == str(frames.error)


@given(st.binary(max_size=64))
def test_any_packet_is_a_datagram_or_an_error(packet: bytes) -> None:
    try:
        data, peer = decode_datagram(packet)
    except ProtocolError:
        return
    assert packet.endswith(data)
    assert 0 <= peer.port <= 65535
