"""An assembler for BPF: each method appends an instruction, labels name places to jump to.

RFC 9669 has the instruction set. An instruction takes 8 bytes, or 16 with a constant of 64 bits:

    opcode 1 | source 4 bits, destination 4 bits | offset 2, signed | constant 4, signed      all in the host's order

Registers by convention: R0 is what a helper or the program returns, R1 to R5 carry the arguments of a helper and are
lost by calling it, R6 to R9 are kept, R10 points to the end of a stack of 512 bytes. A program starts with its context
in R1; that of a traffic control program is the packet, with the fields of `Field`.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Protocol, TypeAlias

_INSTRUCTION = struct.Struct("=BBhi")

_LD, _LDX, _ST, _STX, _ALU32, _JMP, _JMP32, _ALU64 = range(8)
_MEM, _ATOMIC = 0x60, 0xC0
_FROM_REGISTER = 0x08
_JUMP, _CALL, _EXIT = 0x00, 0x80, 0x90
_MAP_DESCRIPTOR = 1


class Register(Enum):
    """The eleven registers, of 64 bits each."""

    R0 = 0
    R1 = 1
    R2 = 2
    R3 = 3
    R4 = 4
    R5 = 5
    R6 = 6
    R7 = 7
    R8 = 8
    R9 = 9
    R10 = 10


class Size(Enum):
    """How much a load or store moves; what is loaded is widened with zeros."""

    WORD = 0x00
    HALF = 0x08
    BYTE = 0x10
    DOUBLE = 0x18


class Test(Enum):
    """What a conditional jump asks; unsigned unless it says signed. SET: the two have a bit in common."""

    __test__ = False  # not for pytest

    EQUAL = 0x10
    GREATER = 0x20
    GREATER_OR_EQUAL = 0x30
    SET = 0x40
    NOT_EQUAL = 0x50
    SIGNED_GREATER = 0x60
    SIGNED_GREATER_OR_EQUAL = 0x70
    LESS = 0xA0
    LESS_OR_EQUAL = 0xB0
    SIGNED_LESS = 0xC0
    SIGNED_LESS_OR_EQUAL = 0xD0


class Helper(IntEnum):
    """Functions of the kernel that a program may call (bpf-helpers(7) has their arguments)."""

    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    MAP_DELETE_ELEM = 3
    KTIME_GET_NS = 5
    GET_PRANDOM_U32 = 7
    SKB_STORE_BYTES = 9
    L3_CSUM_REPLACE = 10
    L4_CSUM_REPLACE = 11
    CLONE_REDIRECT = 13
    REDIRECT = 23
    SKB_LOAD_BYTES = 26
    CSUM_DIFF = 28
    SKB_CHANGE_PROTO = 31
    SKB_CHANGE_TYPE = 32
    GET_HASH_RECALC = 34
    SKB_CHANGE_TAIL = 38
    SKB_PULL_DATA = 39
    CSUM_UPDATE = 40
    SET_HASH_INVALID = 41
    SKB_CHANGE_HEAD = 43
    GET_SOCKET_COOKIE = 46
    SKB_ADJUST_ROOM = 50
    SKB_LOAD_BYTES_RELATIVE = 68
    FIB_LOOKUP = 69
    SK_LOOKUP_TCP = 84
    SK_LOOKUP_UDP = 85
    SK_RELEASE = 86
    SKC_LOOKUP_TCP = 99
    SK_ASSIGN = 124
    CSUM_LEVEL = 135
    REDIRECT_NEIGH = 152
    REDIRECT_PEER = 155


class Field(IntEnum):
    """Where the context of a traffic control program (struct __sk_buff) has what; words but TSTAMP (a double).

    PROTOCOL is in network order, as it stands in a frame. A program may write MARK, PRIORITY, QUEUE_MAPPING, TC_INDEX,
    TSTAMP and the five words at CB.
    """

    LEN = 0
    PKT_TYPE = 4
    MARK = 8
    QUEUE_MAPPING = 12
    PROTOCOL = 16
    VLAN_PRESENT = 20
    VLAN_TCI = 24
    VLAN_PROTO = 28
    PRIORITY = 32
    INGRESS_IFINDEX = 36
    IFINDEX = 40
    TC_INDEX = 44
    CB = 48
    HASH = 68
    TC_CLASSID = 72
    DATA = 76
    DATA_END = 80
    NAPI_ID = 84
    DATA_META = 140
    TSTAMP = 152
    WIRE_LEN = 160
    GSO_SEGS = 164
    GSO_SIZE = 176


class HasDescriptor(Protocol):
    """What a map is for a program: its descriptor."""

    @property
    def fd(self) -> int: ...


Operand: TypeAlias = Register | int
"""A register, or a constant: of 32 bits signed, or written as the unsigned number that has the same bits."""


@dataclass(frozen=True, slots=True)
class At:
    """An address: so many bytes behind what a register points to."""

    base: Register
    offset: int


_ARGUMENTS = (Register.R1, Register.R2, Register.R3, Register.R4, Register.R5)


class Assembly:
    """A program that is being written. `build` returns its bytes; an Assembly may be built once.

    Arithmetic is of 64 bits; what is named `..32` works on the lower half and clears the upper one.
    """

    def __init__(self) -> None:
        self._code: list[bytes] = []
        self._labels: dict[str, int] = {}
        self._jumps: list[tuple[int, str]] = []

    def __len__(self) -> int:
        """Return how many instructions there are; one with a constant of 64 bits counts twice."""
        return len(self._code)

    # -- arithmetic --
    def move(self, to: Register, value: Operand) -> None:
        """Set a register; a constant is extended by its sign."""
        self._alu(_ALU64, 0xB0, to, value)

    def move32(self, to: Register, value: Operand) -> None:
        """Set the lower half of a register and clear the upper one."""
        self._alu(_ALU32, 0xB0, to, value)

    def move64(self, to: Register, constant: int) -> None:
        """Set a register to a constant of 64 bits."""
        self._wide(to, constant & 0xFFFFFFFFFFFFFFFF, 0)

    def load_map(self, to: Register, of: HasDescriptor) -> None:
        """Set a register to a map, as helpers want it; the loaded program keeps the map alive."""
        self._wide(to, of.fd, _MAP_DESCRIPTOR)

    def add(self, to: Register, value: Operand) -> None:
        """Add."""
        self._alu(_ALU64, 0x00, to, value)

    def subtract(self, to: Register, value: Operand) -> None:
        """Subtract."""
        self._alu(_ALU64, 0x10, to, value)

    def bit_and(self, to: Register, value: Operand) -> None:
        """Keep bits; a constant is extended by its sign."""
        self._alu(_ALU64, 0x50, to, value)

    def bit_and32(self, to: Register, value: Operand) -> None:
        """Keep bits of the lower half and clear the upper one."""
        self._alu(_ALU32, 0x50, to, value)

    def bit_xor(self, to: Register, value: Operand) -> None:
        """Flip bits."""
        self._alu(_ALU64, 0xA0, to, value)

    def shift_right(self, to: Register, value: Operand) -> None:
        """Shift, zeros in."""
        self._alu(_ALU64, 0x70, to, value)

    def negate(self, to: Register) -> None:
        """Change the sign."""
        self._append(0x80 | _ALU64, to, None, 0, 0)

    def swap(self, to: Register, bits: int) -> None:
        """Convert the lower 16, 32 or 64 bits between the host's and the network's order, clearing the rest."""
        if bits not in (16, 32, 64):
            raise ValueError(f"{bits} bits cannot be swapped")
        self._append(0xD0 | _ALU32 | _FROM_REGISTER, to, None, 0, bits)

    # -- memory --
    def load(self, to: Register, base: Register, offset: int = 0, size: Size = Size.WORD) -> None:
        """Set a register to what `offset` bytes behind `base` holds: the context, the stack, a map's value."""
        self._append(_LDX | _MEM | size.value, to, base, offset, 0)

    def store(self, base: Register, offset: int, value: Operand, size: Size = Size.WORD) -> None:
        """Write a register's lower part, or a constant, `offset` bytes behind `base`."""
        if isinstance(value, Register):
            self._append(_STX | _MEM | size.value, base, value, offset, 0)
        else:
            self._append(_ST | _MEM | size.value, base, None, offset, _constant(value))

    def store_bytes(self, base: Register, offset: int, data: bytes) -> None:
        """Write constant bytes, in as few instructions as their alignment allows; the offset has to be aligned."""
        position = 0
        while position < len(data):
            left = len(data) - position
            width = next(w for w in (4, 2, 1) if w <= left and (offset + position) % w == 0)
            number = int.from_bytes(data[position : position + width], sys.byteorder)
            self.store(base, offset + position, number, _WIDTHS[width])
            position += width

    def add_atomically(self, base: Register, offset: int, value: Register, size: Size = Size.DOUBLE) -> None:
        """Add a register to a word or double in memory that other processors add to as well."""
        if size not in (Size.WORD, Size.DOUBLE):
            raise ValueError("only words and doubles are added to atomically")
        self._append(_STX | _ATOMIC | size.value, base, value, offset, 0)

    # -- control --
    def label(self, name: str) -> None:
        """Name the place of the next instruction."""
        if name in self._labels:
            raise ValueError(f"label {name!r} stands twice")
        self._labels[name] = len(self._code)

    def jump(self, label: str) -> None:
        """Go on at a label."""
        self._jump(_JMP | _JUMP, Register.R0, 0, label)

    def jump_if(self, left: Register, test: Test, right: Operand, label: str) -> None:
        """Go on at a label if the test holds; a constant is extended by its sign."""
        self._jump(_JMP | test.value, left, right, label)

    def jump_if32(self, left: Register, test: Test, right: Operand, label: str) -> None:
        """Go on at a label if the test holds for the lower halves."""
        self._jump(_JMP32 | test.value, left, right, label)

    def call(self, helper: Helper, *arguments: Operand | At | HasDescriptor) -> None:
        """Call a helper with R1 to R5; R0 is the answer, R1 to R5 are lost.

        `arguments` are put there first, in their order: a register that is one of the five may only stay in its place.
        """
        for to, value in zip(_ARGUMENTS, arguments, strict=False):
            if isinstance(value, At):
                self.move(to, value.base)
                self.add(to, value.offset)
            elif isinstance(value, (Register, int)):
                if value is not to:
                    self.move(to, value)
            else:
                self.load_map(to, value)
        self._append(_JMP | _CALL, Register.R0, None, 0, int(helper))

    def leave(self, value: Operand | None = None) -> None:
        """End the program; R0, set to `value` unless it is None, is its answer."""
        if value is not None:
            self.move(Register.R0, value)
        self._append(_JMP | _EXIT, Register.R0, None, 0, 0)

    def build(self) -> bytes:
        """Resolve the jumps and return the program. Raise ValueError for a label that does not exist."""
        for place, name in self._jumps:
            if name not in self._labels:
                raise ValueError(f"label {name!r} does not exist")
            opcode, registers, _, constant = _INSTRUCTION.unpack(self._code[place])
            self._code[place] = _INSTRUCTION.pack(opcode, registers, self._labels[name] - place - 1, constant)
        self._jumps.clear()
        return b"".join(self._code)

    # -- pieces --
    def _alu(self, width: int, operation: int, to: Register, value: Operand) -> None:
        if isinstance(value, Register):
            self._append(width | operation | _FROM_REGISTER, to, value, 0, 0)
        else:
            self._append(width | operation, to, None, 0, _constant(value))

    def _jump(self, opcode: int, left: Register, right: Operand, label: str) -> None:
        self._jumps.append((len(self._code), label))
        if isinstance(right, Register):
            self._append(opcode | _FROM_REGISTER, left, right, 0, 0)
        else:
            self._append(opcode, left, None, 0, _constant(right))

    def _wide(self, to: Register, constant: int, source: int) -> None:
        lower, upper = struct.unpack("=ii", struct.pack("=Q", constant))
        if sys.byteorder == "big":
            lower, upper = upper, lower
        self._code.append(_INSTRUCTION.pack(_LD | Size.DOUBLE.value, _registers(to.value, source), 0, lower))
        self._code.append(_INSTRUCTION.pack(0, 0, 0, upper))

    def _append(self, opcode: int, to: Register, source: Register | None, offset: int, constant: int) -> None:
        registers = _registers(to.value, source.value if source is not None else 0)
        try:
            self._code.append(_INSTRUCTION.pack(opcode, registers, offset, constant))
        except struct.error as exc:
            raise ValueError(f"an offset of {offset} does not fit") from exc


_WIDTHS = {4: Size.WORD, 2: Size.HALF, 1: Size.BYTE}


def _registers(to: int, source: int) -> int:
    """Pack two registers: the destination lies in the lower bits of the byte, on big endian in the upper ones."""
    return source << 4 | to if sys.byteorder == "little" else to << 4 | source


def _constant(value: int) -> int:
    """Return a constant as the signed number of its 32 bits. Raise ValueError for one that has more."""
    if not -(1 << 31) <= value < 1 << 32:
        raise ValueError(f"{value} has more than 32 bits")
    return value - (1 << 32) if value >= 1 << 31 else value
