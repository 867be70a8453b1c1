"""Maps, programs and links against the running kernel; skipped where it lets nobody use bpf()."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from gostnet.core.errors import KernelError
from gostnet.kernel import netns
from gostnet.kernel.bpf import (
    Assembly,
    Direction,
    Field,
    Helper,
    Map,
    MapKind,
    Program,
    Register,
    Size,
    Test,
    Verdict,
    attached,
    attachment_problem,
    load,
    loading_problem,
    objects,
)

R0, R1, R2, R3, R4, R6, R10 = (getattr(Register, f"R{n}") for n in (0, 1, 2, 3, 4, 6, 10))

pytestmark = pytest.mark.skipif(bool(loading_problem()), reason=loading_problem() or "bpf is usable")

FRAME = bytes(12) + b"\x08\x00" + b"\x45" + bytes(19) + b"payload"


def word(number: int) -> bytes:
    return struct.pack("=I", number)


@pytest.fixture
def elsewhere() -> Iterator[netns.Namespace]:
    with netns.anonymous() as namespace:
        yield namespace


def passing() -> Program:
    code = Assembly()
    code.leave(Verdict.NEXT)
    return load(code, "pass")


def test_hash_map() -> None:
    with Map(MapKind.HASH, 4, 8, 2, "a-hash map") as table:
        assert table.lookup(word(1)) is None
        table.update(word(1), b"abcdefgh")
        table.update(word(2), b"ABCDEFGH")
        table.update(word(2), b"12345678")
        assert dict(table.items()) == {word(1): b"abcdefgh", word(2): b"12345678"}
        with pytest.raises(KernelError, match="a-hash map: it is full") as caught:
            table.update(word(3), bytes(8))
        assert caught.value.errno == errno.E2BIG
        assert table.delete(word(1))
        assert not table.delete(word(1))
        assert table.keys() == [word(2)]
        with pytest.raises(ValueError, match="a key of 3 bytes instead of 4"):
            table.lookup(b"abc")
        with pytest.raises(ValueError, match="a value of 3 bytes instead of 8"):
            table.update(word(1), b"abc")


def test_array_has_all_its_elements() -> None:
    with Map(MapKind.ARRAY, 4, 2, 3) as table:
        table.update(word(1), b"xy")
        assert list(table.items()) == [(word(0), bytes(2)), (word(1), b"xy"), (word(2), bytes(2))]
        with pytest.raises(KernelError):
            table.update(word(3), b"xy")
        with pytest.raises(KernelError):
            table.delete(word(1))


def test_prefixes_longest_first() -> None:
    with Map(MapKind.LPM_TRIE, 8, 4, 4) as table:
        table.update(word(8) + b"\x0a\0\0\0", b"wide")
        table.update(word(24) + b"\x0a\x01\x02\0", b"near")
        assert table.lookup(word(32) + b"\x0a\x01\x02\x03") == b"near"
        assert table.lookup(word(32) + b"\x0a\x09\x02\x03") == b"wide"
        assert table.lookup(word(32) + b"\x0b\x09\x02\x03") is None


def test_counters_of_each_processor_add_up() -> None:
    with Map(MapKind.PERCPU_ARRAY, 4, 8, 1, "counts") as counts:
        code = Assembly()
        code.store(R10, -4, 0)
        code.load_map(R1, counts)
        code.move(R2, R10)
        code.add(R2, -4)
        code.call(Helper.MAP_LOOKUP_ELEM)
        code.jump_if(R0, Test.EQUAL, 0, "none")
        code.move(R1, 1)
        code.add_atomically(R0, 0, R1)
        code.label("none")
        code.leave(Verdict.NEXT)
        with load(code, "count") as program:
            for _ in range(3):
                assert program.run(FRAME)[0] == Verdict.NEXT
        assert counts.total(word(0)) == 3
        assert len(counts.lookup_each(word(0))) == counts.processors
        counts.update(word(0), struct.pack("=Q", 5))
        assert counts.total(word(0)) == 5 * counts.processors


def test_program_changes_a_frame() -> None:
    code = Assembly()
    code.move(R6, R1)
    code.load(R2, R6, Field.LEN)
    code.jump_if(R2, Test.LESS, len(FRAME), "short")
    code.move(R2, 14)
    code.move(R3, R10)
    code.add(R3, -1)
    code.move(R4, 1)
    code.call(Helper.SKB_LOAD_BYTES)
    code.load(R3, R10, -1, Size.BYTE)
    code.jump_if(R3, Test.NOT_EQUAL, 0x45, "short")
    code.store_bytes(R10, -4, b"PAYL")
    code.move(R1, R6)
    code.move(R2, len(FRAME) - 7)
    code.move(R3, R10)
    code.add(R3, -4)
    code.move(R4, 4)
    code.move(Register.R5, 0)
    code.call(Helper.SKB_STORE_BYTES)
    code.leave(Verdict.PASS)
    code.label("short")
    code.leave(Verdict.DROP)
    with load(code) as program:
        assert program.run(FRAME) == (Verdict.PASS, FRAME[:-7] + b"PAYLoad")
        assert program.run(FRAME[:-1]) == (Verdict.DROP, FRAME[:-1])


def test_refused_program_says_why() -> None:
    code = Assembly()
    code.load(R0, R2)  # R2 has no value yet
    code.leave()
    with pytest.raises(KernelError, match=r"(?s)load BPF program wrong: .*the verifier says: .*R2 !read_ok") as caught:
        load(code, "wrong")
    assert caught.value.errno == errno.EACCES


@pytest.mark.skipif(bool(attachment_problem()), reason=attachment_problem() or "tcx is there")
def test_link_lasts_as_long_as_its_descriptor(elsewhere: netns.Namespace) -> None:
    with netns.inside(elsewhere):
        index = socket.if_nametoindex("lo")
        assert attached(index, Direction.EGRESS) == []
        program = passing()
        with program, program.attach("lo", Direction.EGRESS) as link:
            assert not os.get_inheritable(link.fd)
            program.close()
            assert len(attached(index, Direction.EGRESS)) == 1
            assert attached(index, Direction.INGRESS) == []
        assert attached(index, Direction.EGRESS) == []
        assert (program.fd, link.fd) == (-1, -1)
        with passing() as program:
            program.attach(index, Direction.INGRESS)  # nobody keeps it
        assert attached(index, Direction.INGRESS) == []


@pytest.mark.skipif(bool(attachment_problem()), reason=attachment_problem() or "tcx is there")
def test_attaching_to_a_device_that_is_not_there() -> None:
    with (
        passing() as program,
        pytest.raises(KernelError, match="program pass to the egress of nowhere: No such device"),
    ):
        program.attach("nowhere", Direction.EGRESS)


def test_reasons_why_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [errno.EPERM, errno.ENOSYS]
    real = objects._call

    def refuse(command: int, attributes: object) -> int:
        raise OSError(numbers[0], os.strerror(numbers[0]))

    monkeypatch.setattr(objects, "_call", refuse)
    assert "not permitted (needs CAP_BPF and CAP_NET_ADMIN outside of any user namespace)" in loading_problem()
    numbers.pop(0)
    assert "the kernel is without bpf" in attachment_problem()

    def no_tcx(command: int, attributes: bytes) -> int:
        if command == objects._PROG_QUERY:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(command, attributes)

    monkeypatch.setattr(objects, "_call", no_tcx)
    assert "the kernel has no tcx" in attachment_problem()
    assert attached(1, Direction.EGRESS) == []
