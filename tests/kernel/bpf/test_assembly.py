"""The bytes of instructions (RFC 9669), and how labels and constants become numbers."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable

import pytest

from gostnet.kernel.bpf import Assembly, At, Field, Helper, Register, Size, Test

R0, R1, R2, R6, R10 = Register.R0, Register.R1, Register.R2, Register.R6, Register.R10

pytestmark = pytest.mark.skipif(sys.byteorder == "big", reason="the expected bytes are those of little endian")


class _Map:
    fd = 9


@pytest.mark.parametrize(
    ("write", "code"),
    [
        (lambda a: a.move(R6, R1), "bf16000000000000"),
        (lambda a: a.move(R2, -1), "b7020000ffffffff"),
        (lambda a: a.move(R2, 0xFFFFFFFF), "b7020000ffffffff"),
        (lambda a: a.move32(R2, 7), "b402000007000000"),
        (lambda a: a.add(R2, -8), "07020000f8ffffff"),
        (lambda a: a.bit_and(R1, 0xFF), "57010000ff000000"),
        (lambda a: a.shift_right(R1, R2), "7f21000000000000"),
        (lambda a: a.swap(R1, 16), "dc01000010000000"),
        (lambda a: a.negate(R1), "8701000000000000"),
        (lambda a: a.load(R2, R1, Field.IFINDEX), "6112280000000000"),
        (lambda a: a.load(R2, R1, 3, Size.BYTE), "7112030000000000"),
        (lambda a: a.store(R10, -8, R0, Size.DOUBLE), "7b0af8ff00000000"),
        (lambda a: a.store(R10, -2, 0x1234, Size.HALF), "6a0afeff34120000"),
        (lambda a: a.add_atomically(R0, 0, R1), "db10000000000000"),
        (lambda a: a.call(Helper.REDIRECT), "8500000017000000"),
        (lambda a: a.leave(), "9500000000000000"),
        (lambda a: a.leave(2), "b7000000020000009500000000000000"),
        (lambda a: a.move64(R1, 0x1122334455667788), "18010000887766550000000044332211"),
        (lambda a: a.load_map(R1, _Map()), "18110000090000000000000000000000"),
        (lambda a: a.store_bytes(R10, -6, b"\x01\x02\x03\x04\x05\x06"), "6a0afaff01020000620afcff03040506"),
    ],
)
def test_instruction(write: Callable[[Assembly], None], code: str) -> None:
    assembly = Assembly()
    write(assembly)
    assert assembly.build().hex() == code
    assert len(assembly) == len(code) // 16


def test_jumps_count_from_the_instruction_behind_them() -> None:
    code = Assembly()
    code.label("again")
    code.jump_if(R1, Test.EQUAL, 0, "out")
    code.move64(R2, 1)
    code.jump_if32(R1, Test.SIGNED_LESS, R2, "again")
    code.jump("out")
    code.label("out")
    code.leave()
    offsets = [struct.unpack_from("=BBhi", code.build(), 8 * n)[2] for n in (0, 3, 4)]
    assert offsets == [4, -4, 0]


def test_what_cannot_be_written_down() -> None:
    code = Assembly()
    code.label("here")
    with pytest.raises(ValueError, match="'here' stands twice"):
        code.label("here")
    with pytest.raises(ValueError, match="more than 32 bits"):
        code.move(R1, 1 << 32)
    with pytest.raises(ValueError, match="24 bits cannot be swapped"):
        code.swap(R1, 24)
    with pytest.raises(ValueError, match="only words and doubles"):
        code.add_atomically(R1, 0, R2, Size.HALF)
    with pytest.raises(ValueError, match="an offset of 40000 does not fit"):
        code.load(R1, R2, 40000)
    code.jump("nowhere")
    with pytest.raises(ValueError, match="'nowhere' does not exist"):
        code.build()


def test_arguments_of_a_helper_are_put_where_it_wants_them() -> None:
    short, long = Assembly(), Assembly()
    short.call(Helper.SKB_LOAD_BYTES, _Map(), R2, At(R10, -8), 4)
    long.load_map(R1, _Map())
    long.move(Register.R3, R10)
    long.add(Register.R3, -8)
    long.move(Register.R4, 4)
    long.call(Helper.SKB_LOAD_BYTES)
    assert short.build() == long.build()
