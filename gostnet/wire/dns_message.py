"""DNS messages as bytes (RFC 1035 section 4.1): what a forwarder reads of them, and the places that it overwrites.

A forwarder passes on what it does not know, so a message is never taken apart and put together again: only its frame is
read (header, question, and where each record's TTL is), and ids, flags, TTLs and sizes are written in place.

    header    id 2, flags 2, then four counts of 2 bytes: questions, answers, authority, additional
    question  name, type 2, class 2
    record    name, type 2, class 2, TTL 4, length 2, data
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from ..core.errors import ProtocolError

HEADER: Final = 12
QR: Final = 0x8000
OPCODE: Final = 0x7800
AA: Final = 0x0400
TC: Final = 0x0200
RD: Final = 0x0100
RA: Final = 0x0080
AD: Final = 0x0020
CD: Final = 0x0010
RCODE: Final = 0x000F

NOERROR: Final = 0
FORMERR: Final = 1
SERVFAIL: Final = 2
NXDOMAIN: Final = 3
NOTIMP: Final = 4
BADVERS: Final = 16

A: Final = 1
SOA: Final = 6
AAAA: Final = 28
OPT: Final = 41
AXFR: Final = 252
IXFR: Final = 251
IN: Final = 1

DO: Final = 0x8000
"""The flag of the OPT record that asks for signatures (RFC 6891 section 6.1.4)."""
ECS: Final = 8
"""The option that tells a client's network (RFC 7871)."""

MIN_SIZE: Final = 512
"""Bytes that a client without EDNS takes over UDP (RFC 1035 section 4.2.1)."""
MAX_SIZE: Final = 65535

_COUNTS = struct.Struct("!HHHHHH")
_FIXED = struct.Struct("!HHIH")
_SIZES: Final = {A: 4, AAAA: 16}
_POINTER: Final = b"\xc0\x0c"
"""A name that is the one at the beginning of the question."""


class Edns(NamedTuple):
    """What a query's OPT record says; `subnet` is the data of its ECS option, None without one."""

    payload: int
    version: int
    flags: int
    subnet: bytes | None


@dataclass(frozen=True, slots=True)
class Query:
    """A query with one question.

    question    the section's bytes, as they came
    name        the name in lower case, without the final dot; bytes that no host name has as \\DDD
    """

    id: int
    flags: int
    question: bytes
    name: str
    kind: int
    cls: int
    edns: Edns | None

    @property
    def limit(self) -> int:
        """Bytes that the client takes in one datagram."""
        return max(MIN_SIZE, self.edns.payload) if self.edns is not None else MIN_SIZE


# ---- names and records --------------------------------------------------------------------------
def _after_name(data: bytes, position: int, *, pointers: bool = True) -> int:
    """Return where the name at `position` ends. Pointers are not followed. Raise ProtocolError."""
    end = len(data)
    start = position
    while position < end:
        length = data[position]
        if length == 0:
            return position + 1
        if length >= 0xC0 and pointers:
            if position + 2 > end:
                break
            return position + 2
        if length > 63 or position - start > 254:
            raise ProtocolError("a DNS name with a bad label")
        position += length + 1
    raise ProtocolError("a DNS message that ends inside a name")


def _text(name: bytes) -> str:
    labels = []
    position = 0
    while length := name[position]:
        label = name[position + 1 : position + 1 + length]
        position += length + 1
        if label.isalnum() and label.isascii():
            labels.append(label.decode("ascii").lower())
        else:
            known = b"-_*/"
            labels.append(
                "".join(
                    chr(byte).lower()
                    if chr(byte).isascii() and (chr(byte).isalnum() or byte in known)
                    else f"\\{byte:03}"
                    for byte in label
                )
            )
    return ".".join(labels)


class _Record(NamedTuple):
    start: int
    kind: int
    cls: int
    ttl: int
    ttl_at: int
    data_at: int
    end: int


def _records(data: bytes, position: int, count: int) -> Iterator[_Record]:
    for _ in range(count):
        start = position
        position = _after_name(data, position)
        if position + 10 > len(data):
            raise ProtocolError("a DNS message that ends inside a record")
        kind, cls, ttl, length = _FIXED.unpack_from(data, position)
        end = position + 10 + length
        if end > len(data):
            raise ProtocolError("a DNS message that ends inside a record")
        yield _Record(start, kind, cls, ttl, position + 4, position + 10, end)
        position = end


def parse_query(data: bytes) -> Query:
    """Read a query. Raise ProtocolError for what is none, or has not exactly one question."""
    if len(data) < HEADER:
        raise ProtocolError("a DNS message without a header")
    ident, flags, questions, answers, authority, additional = _COUNTS.unpack_from(data)
    if flags & QR:
        raise ProtocolError("a DNS answer instead of a query")
    if questions != 1:
        raise ProtocolError(f"a DNS query with {questions} questions")
    # Nothing comes before the question, so a pointer in it can only be a mistake, or a loop.
    end = _after_name(data, HEADER, pointers=False)
    if end - HEADER > 255 or end + 4 > len(data):
        raise ProtocolError("a DNS message that ends inside its question")
    kind, cls = struct.unpack_from("!HH", data, end)
    edns = None
    for record in _records(data, end + 4, answers + authority + additional):
        if record.kind == OPT:
            if edns is not None:
                raise ProtocolError("a DNS query with several OPT records")
            edns = _edns(data, record)
    return Query(ident, flags, data[HEADER : end + 4], _text(data[HEADER:end]), kind, cls, edns)


def _edns(data: bytes, record: _Record) -> Edns:
    subnet = None
    position = record.data_at
    while position < record.end:
        if position + 4 > record.end:
            raise ProtocolError("an OPT record that ends inside an option")
        code, length = struct.unpack_from("!HH", data, position)
        position += 4
        if position + length > record.end:
            raise ProtocolError("an OPT record that ends inside an option")
        if code == ECS and subnet is None:
            subnet = data[position : position + length]
        position += length
    return Edns(record.cls, record.ttl >> 16 & 0xFF, record.ttl & 0xFFFF, subnet)


# ---- writing ------------------------------------------------------------------------------------
def subnet_option(address: bytes, bits: int) -> bytes:
    """Return the data of an ECS option: family 2, source and scope prefix 1 each, then as many bytes as there are bits.

    `address` is 4 or 16 bytes.
    """
    size = (bits + 7) // 8
    cut = bytearray(address[:size])
    if bits % 8:
        cut[-1] &= 0xFF00 >> bits % 8 & 0xFF
    return struct.pack("!HBB", 1 if len(address) == 4 else 2, bits, 0) + bytes(cut)


def _opt(payload: int, version: int, flags: int, options: bytes = b"", extended: int = 0) -> bytes:
    return b"\0" + struct.pack("!HHBBHH", OPT, payload, extended, version, flags, len(options)) + options


def onward(query: Query, ident: int, subnet: bytes | None = None) -> bytes:
    """Return what to ask an upstream: the question, RD, AD, CD and DO as the client wants them.

    Other EDNS options concern the client and this host only (RFC 6891 section 6.2.6), except ECS, in place of which
    `subnet` is sent if there is one.
    """
    edns = query.edns
    told = subnet if subnet is not None else edns.subnet if edns is not None else None
    opt = b""
    if edns is not None or told is not None:
        options = struct.pack("!HH", ECS, len(told)) + told if told is not None else b""
        opt = _opt(edns.payload if edns else 0, 0, edns.flags & DO if edns else 0, options)
    flags = query.flags & (RD | AD | CD)
    return _COUNTS.pack(ident, flags, 1, 0, 0, 1 if opt else 0) + query.question + opt


def reply(query: Query, rcode: int = NOERROR, answers: Sequence[bytes] = (), *, ttl: int = 0) -> bytes:
    """Return an answer of our own; `answers` are the data of records of the type and class that were asked for."""
    flags = QR | RA | query.flags & (OPCODE | RD | CD) | rcode & RCODE
    opt = _opt(1232, 0, query.edns.flags & DO, b"", rcode >> 4) if query.edns is not None else b""
    records = [_POINTER + _FIXED.pack(query.kind, query.cls, ttl, len(data)) + data for data in answers]
    head = _COUNTS.pack(query.id, flags, 1, len(records), 0, 1 if opt else 0)
    return b"".join((head, query.question, *records, opt))


def refusal(data: bytes, rcode: int) -> bytes | None:
    """Return an answer to what `parse_query` could not read: a header alone. None for what deserves no answer.

    An answer is never answered, so two servers cannot keep each other busy.
    """
    if len(data) < HEADER or data[2] & 0x80:
        return None
    flags = int.from_bytes(data[2:4], "big")
    return data[:2] + _COUNTS.pack(0, QR | RA | flags & (OPCODE | RD) | rcode, 0, 0, 0, 0)[2:]


# ---- answers ------------------------------------------------------------------------------------
def answers(data: bytes, query: bytes) -> bool:
    """Tell whether `data` answers `query`: same id, same question (whatever its case)."""
    if len(data) < HEADER or data[:2] != query[:2] or data[2] & 0xF8 != 0x80:
        return False
    if data[4:6] == b"\0\0":
        return bool(data[3] & RCODE)  # servers that could not read the question do not repeat it
    if data[4:6] != b"\0\1":
        return False
    try:
        end = _after_name(query, HEADER) + 4
    except ProtocolError:
        return False
    asked = query[HEADER:end]
    return data[HEADER : end - 4].lower() == asked[:-4].lower() and data[end - 4 : end] == asked[-4:]


class Lifetime(NamedTuple):
    """Seconds that an answer holds by itself, and whether it says that there is nothing."""

    seconds: int
    negative: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with the places that change.

    wire        the message
    ttls        (offset, TTL) of each record but OPT
    lifetime    None where nothing says how long it holds, or where it must not be kept
    opt         the bytes from..to of the OPT record, None without one
    bare        ends with the OPT record, so that it can be left out
    """

    wire: bytes
    ttls: tuple[tuple[int, int], ...]
    lifetime: Lifetime | None
    opt: tuple[int, int] | None
    bare: bool

    @property
    def rcode(self) -> int:
        """The code, its EDNS half included."""
        upper = self.wire[self.opt[0] + 5] << 4 if self.opt is not None else 0
        return upper | self.wire[3] & RCODE

    @property
    def truncated(self) -> bool:
        """Whether something was left out."""
        return bool(self.wire[2] & TC >> 8)

    def for_client(self, query: Query, age: float = 0.0, fixed: int = 0) -> bytes:
        """Return it as the answer to `query`, `age` seconds later.

        TTLs are counted down to 1 at least; with `fixed` they all are that. The OPT record is left out for a client
        that sent none (RFC 6891 section 7). Where the question is the query's own, so is the case of its letters.
        """
        out = bytearray(self.wire)
        out[0:2] = query.id.to_bytes(2, "big")
        end = HEADER + len(query.question)
        if out[4:6] == b"\0\1":
            out[HEADER:end] = query.question
        passed = int(age + 0.999)
        if fixed or passed:
            for offset, ttl in self.ttls:
                left = fixed or max(1, ttl - passed)
                out[offset : offset + 4] = left.to_bytes(4, "big")
        if query.edns is None and self.opt is not None and self.bare:
            del out[self.opt[0] :]
            out[10:12] = (int.from_bytes(out[10:12], "big") - 1).to_bytes(2, "big")
        return bytes(out)


def parse_answer(data: bytes) -> Answer:
    """Read the frame of an answer. Raise ProtocolError."""
    if len(data) < HEADER:
        raise ProtocolError("a DNS message without a header")
    _, flags, questions, count, authority, additional = _COUNTS.unpack_from(data)
    position = HEADER
    for _ in range(questions):
        position = _after_name(data, position) + 4
    if position > len(data):
        raise ProtocolError("a DNS message that ends inside its question")
    ttls: list[tuple[int, int]] = []
    seconds: list[int] = []
    negative: int | None = None
    opt = None
    end = position
    for index, record in enumerate(_records(data, position, count + authority + additional)):
        end = record.end
        if record.kind == OPT:
            opt = (record.start, record.end)
            continue
        ttl = record.ttl if record.ttl < 1 << 31 else 0  # RFC 2181 section 8
        ttls.append((record.ttl_at, ttl))
        if index < count:
            seconds.append(ttl)
        elif record.kind == SOA and index < count + authority and record.end - record.data_at >= 22:
            minimum = int.from_bytes(data[record.end - 4 : record.end], "big")
            negative = min(ttl, minimum)
    lifetime = None
    if not flags & TC and flags & RCODE in (NOERROR, NXDOMAIN):
        if negative is not None:
            lifetime = Lifetime(min(*seconds, negative) if seconds else negative, True)
        elif seconds and flags & RCODE == NOERROR:
            lifetime = Lifetime(min(seconds), False)
    return Answer(data, tuple(ttls), lifetime, opt, opt is not None and opt[1] == end == len(data))


def addresses_of(data: bytes, kind: int) -> tuple[list[bytes], int]:
    """Return the addresses (records of type A or AAAA) that a message answers with, and the least TTL of the answer.

    ([], 0) for an error, for what is truncated or cannot be read. The TTLs of the names on the way (CNAME) count.
    """
    found: list[bytes] = []
    ttls: list[int] = []
    try:
        _, flags, questions, count, _, _ = _COUNTS.unpack_from(data)
        if flags & (RCODE | TC):
            return [], 0
        position = HEADER
        for _ in range(questions):
            position = _after_name(data, position) + 4
        for record in _records(data, position, count):
            ttls.append(record.ttl if record.ttl < 1 << 31 else 0)
            if record.kind == kind and record.cls == IN and record.end - record.data_at == _SIZES[kind]:
                found.append(data[record.data_at : record.end])
    except (ProtocolError, struct.error):
        return [], 0
    return found, min(ttls, default=0)


def truncate(wire: bytes, query: Query) -> bytes:
    """Return an answer that says that it did not fit: the header with TC and the question (RFC 2181 section 9)."""
    flags = int.from_bytes(wire[2:4], "big") | TC
    opt = _opt(1232, 0, query.edns.flags & DO) if query.edns is not None else b""
    return _COUNTS.pack(query.id, flags, 1, 0, 0, 1 if opt else 0) + query.question + opt
