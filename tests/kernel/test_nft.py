"""The encoding of nftables, and the commands that say the same."""

from __future__ import annotations

import errno
import struct
from dataclasses import replace
from ipaddress import ip_address, summarize_address_range
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.core.resources import NftChain, NftRule, NftSet, NftTable
from gostnet.kernel import nft, nft_expr, nft_table
from gostnet.kernel.errors import kernel_error
from gostnet.kernel.netlink_attributes import attributes_of
from gostnet.policies.networks import Intervals

TABLE = NftTable(
    "t",
    (
        NftSet("s", "ipv4_addr", ("10.0.0.0/8", "192.0.2.1/32")),
        NftChain("base", "prerouting", "nat", -95),
        NftChain("inner"),
        NftRule("inner", *nft_expr.accept(), comment='say "so"\n'),
    ),
    note="slot 0",
)


# ---- words --------------------------------------------------------------------------------------
def test_words_of_a_new_table() -> None:
    assert nft_table.words(TABLE, None) == [
        'nft add table inet t { flags owner; comment "gostnet slot 0"; }',
        "nft add set inet t s { type ipv4_addr; flags interval; elements = { 10.0.0.0/8, 192.0.2.1/32 }; }",
        "nft add chain inet t base { type nat hook prerouting priority -95; policy accept; }",
        "nft add chain inet t inner",
        """nft add rule inet t inner accept comment "say 'so'?\"""",
        f"nft add chain inet t content_{TABLE.digest}",
    ]


def test_words_of_a_change_touch_only_what_differs() -> None:
    content = (
        NftSet("u", "ipv6_addr", ("::/0",)),
        NftChain("base", "prerouting", "nat", -95),
        NftChain("other"),
        NftRule("other", *nft_expr.goto("base")),
    )
    changed = NftTable("t", content, note="slot 0")
    assert nft_table.words(changed, TABLE) == [
        "nft add set inet t u { type ipv6_addr; flags interval; elements = { ::/0 }; }",
        "nft flush table inet t",
        "nft delete chain inet t inner",
        f"nft delete chain inet t content_{TABLE.digest}",
        "nft add chain inet t other",
        f"nft add chain inet t content_{changed.digest}",
        "nft add rule inet t other goto base",
        "nft delete set inet t s",
    ]


@pytest.mark.parametrize(
    "before",
    [
        NftTable("t", note="slot 0", digest="of another process"),
        replace(TABLE, note="slot 1"),
        NftTable("t", owner=False),
    ],
)
def test_table_of_unknown_content_is_made_anew(before: NftTable) -> None:
    words = nft_table.words(TABLE, before)
    assert words[0] == "nft delete table inet t"
    assert words[1:] == nft_table.words(TABLE, None)


def test_sets_come_in_a_transaction_of_their_own() -> None:
    sets, rules = nft_table.transactions(TABLE, None)
    assert [item.words.split()[2] for item in sets.items if item.words] == ["table", "set"]
    assert not any(" set " in item.words for item in rules.items)


# ---- intervals ----------------------------------------------------------------------------------
def intervals(of: NftSet) -> list[tuple[int, bool]]:
    """Return (key, whether an interval is over there) of the elements."""
    found = []
    for element in nft._interval_elements(of):
        attributes = dict(attributes_of(element, 4))
        key = dict(attributes_of(attributes[1], 0))[1]
        found.append((int.from_bytes(key, "big"), attributes.get(3) == b"\0\0\0\1"))
    return found


@pytest.mark.parametrize(
    ("kind", "elements", "expected"),
    [
        ("inet_service", ("80",), [(0, True), (80, False), (81, True)]),
        ("inet_service", ("0-1023", "65535"), [(0, False), (1024, True), (65535, False)]),
        ("inet_service", ("0-65535",), [(0, False)]),
        ("ipv4_addr", ("0.0.0.0/1", "128.0.0.0/1"), [(0, False)]),
        ("ipv4_addr", ("255.255.255.255/32",), [(0, True), (2**32 - 1, False)]),
        ("ipv6_addr", ("::/128",), [(0, False), (1, True)]),
        ("ipv6_addr", (), []),
    ],
)
def test_interval_elements(kind: str, elements: tuple[str, ...], expected: list[tuple[int, bool]]) -> None:
    assert intervals(NftSet("s", kind, elements)) == expected  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(0, 65535), st.integers(0, 300)), max_size=20), st.integers(0, 65535))
def test_interval_elements_hold_what_they_say(spans: list[tuple[int, int]], probe: int) -> None:
    ranges = [(low, min(65535, low + size)) for low, size in spans]
    keys = intervals(NftSet("s", "inet_service", tuple(f"{low}-{high}" for low, high in ranges)))
    assert [key for key, _ in keys] == sorted({key for key, _ in keys}), "ascending, none twice"
    for port in (probe, *(p for pair in ranges for p in pair), *(max(0, low - 1) for low, _ in ranges)):
        before = [over for key, over in keys if key <= port]
        assert (bool(before) and not before[-1]) == any(low <= port <= high for low, high in ranges)


# ---- expressions --------------------------------------------------------------------------------
@given(st.binary(max_size=40), st.integers(0, 0x3FFF))
def test_attributes_are_padded_and_come_back(payload: bytes, kind: int) -> None:
    encoded = nft_expr.tlv(kind, payload)
    assert len(encoded) % 4 == 0
    assert list(attributes_of(encoded + nft_expr.u32(7, 9), 0)) == [(kind, payload), (7, b"\0\0\0\x09")]


def test_mark_sits_in_the_register_as_the_host_orders_bytes() -> None:
    term = nft_expr.mark(0x01000000, 0x03000000)
    assert term.text == "meta mark & 0x03000000 == 0x01000000"
    assert struct.pack("=I", 0x03000000) in term.code
    assert struct.pack("=I", 0x01000000) in term.code


def test_setting_a_mark_keeps_the_bits_of_others() -> None:
    term = nft_expr.set_mark(0xFFFFFFFF, 0x03000000)
    assert term.text == "meta mark set meta mark & 0xfcffffff | 0x03000000"
    assert struct.pack("=I", 0xFCFFFFFF) in term.code


def test_terms_in_a_row() -> None:
    first, second = nft_expr.ip_version(4), nft_expr.accept()
    assert nft_expr.compose(first, second) == ("meta nfproto ipv4 accept", first.code + second.code)


# ---- answers ------------------------------------------------------------------------------------
def error_message(number: int, *, capped: bool, text: bytes = b"") -> bytes:
    """Build NLMSG_ERROR: error, header of the request (sequence 77), the request unless capped, attributes."""
    request = struct.pack("=IHHII", 16 + 8, 2560, 5, 77, 0)
    body = struct.pack("=i", -number) + request + (b"" if capped else bytes(8))
    flags = 0x100 * capped
    if text:
        body += nft_expr.tlv(1, text + b"\0")
        flags |= 0x200
    return struct.pack("=IHHII", 16 + len(body), 2, flags, 77, 0) + body


@pytest.mark.parametrize("capped", [True, False])
@pytest.mark.parametrize("text", [b"", b"Could not process rule"])
def test_refusal_tells_number_statement_and_words(capped: bool, text: bytes) -> None:
    message = error_message(errno.ENOENT, capped=capped, text=text)
    assert nft._verdict(message) == (errno.ENOENT, 77, text.decode())
    assert nft._verdict(error_message(0, capped=capped)) == (0, 77, "")


@given(st.binary(max_size=200))
def test_any_answer_is_split_or_left(data: bytes) -> None:
    for _, message in nft._messages(data):
        dict(attributes_of(message, 0))
    nft._comment(data)


def test_comment_as_nft_writes_it() -> None:
    assert nft._comment(nft._user_data("gostnet slot 0")) == "gostnet slot 0"
    assert nft._user_data("ab") == b"\x00\x03ab\x00"
    assert len(nft._user_data("x" * 500)) == 130
    assert nft._comment(b"\x05\x01a") == ""


def test_missing_privilege_names_the_capability() -> None:
    error = kernel_error("nft add table inet t", errno.EPERM, "why")
    assert str(error) == "nft add table inet t: Operation not permitted (needs CAP_NET_ADMIN): why"
    assert "CAP_NET_ADMIN" in error.hint
    assert kernel_error("x", errno.EINVAL).hint == ""


@given(
    st.sampled_from([4, 16]),
    st.lists(st.integers(0, 2**32 - 1), max_size=12, unique=True),
    st.booleans(),
)
def test_ranges_that_are_packed_already_are_encoded_as_others_are(size: int, ends: list[int], edges: bool) -> None:
    ends = sorted({*ends, 0, 2**32 - 1} if edges else ends)
    both = Intervals(zip(ends[::2], ends[1::2], strict=False))  # those that touch as one
    pairs = list(both)
    shift = 96 if size == 16 else 0
    spans = [(low << shift, (high + 1 << shift) - 1) for low, high in pairs]
    packed = b"".join(number.to_bytes(size, "big") for span in spans for number in span)
    kind: Any = "ipv4_addr" if size == 4 else "ipv6_addr"
    networks = tuple(
        str(network)
        for low, high in spans
        for network in summarize_address_range(*(ip_address(n.to_bytes(size, "big")) for n in (low, high)))
    )
    if packed:
        expected = list(nft._interval_elements(NftSet("s", kind, networks)))
        assert nft._packed_elements(NftSet("s", kind, (), packed)) == expected


def test_a_plan_shows_the_first_of_many_ranges() -> None:
    transaction = nft.Transaction()
    packed = b"".join(struct.pack("!II", n << 8, (n << 8) + n % 2) for n in range(100))
    transaction.add_set("t", NftSet("s", "ipv4_addr", (), packed))
    words = transaction.items[0].words
    assert "elements = { 0.0.0.0, 0.0.1.0-0.0.1.1, 0.0.2.0, " in words
    assert words.endswith("... 36 more }; }")


# ---- sets with timeouts -------------------------------------------------------------------------
def test_words_of_a_set_whose_elements_come_and_go() -> None:
    table = NftTable("t", (NftSet("n", "ipv6_addr", (), timeout=3600, size=100),), note="slot 0")
    words = "nft add set inet t n { type ipv6_addr; flags timeout; timeout 3600s; size 100; }"
    assert words in nft_table.words(table, None)
    assert not any("add set" in text or "delete set" in text for text in nft_table.words(table, table))


def test_addresses_are_renewed_whether_they_are_there_or_not() -> None:
    transaction = nft.Transaction()
    addresses = [(ip_address(f"192.0.2.{number}").packed, 30.0 + number) for number in range(3)]
    transaction.renew_elements("t", "n", addresses)
    kinds = [item.message["header"]["type"] & 0xFF for item in transaction.items]
    assert kinds == [12, 14, 12]
    encoded = [dict(item.message["attrs"])["NFTA_SET_ELEM_LIST_ELEMENTS"] for item in transaction.items]
    assert encoded[0] == encoded[2]
    assert struct.pack("!Q", 31_000) in encoded[0]
    assert struct.pack("!Q", 31_000) not in encoded[1]
    assert all(address in each for each in encoded for address, _ in addresses)
