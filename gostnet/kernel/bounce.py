"""The bounce: what the kernel sends into a TUN device comes back in by it, without passing through user space.

TCP and UDP are turned around where they leave, with their checksums still to be filled in and their segments still in
one piece; behind that, rules take them as they take what enters by any other interface. All else goes to whoever reads
the device. Nothing has to be undone: program and filters end with the device, the program with the process as well.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import Literal

from gostnet.core.errors import KernelError
from gostnet.core.resources import MARK_MASK, MARK_OWN

from . import netns
from .bpf import Assembly, At, Direction, Field, Helper, Link, Register, Size, Test, Verdict, attachment_problem, load
from .netlink import RouteSocket
from .nft_expr import tlv

Method = Literal["tcx", "clsact"]

_ETH_IPV4, _ETH_IPV6 = 0x0800, 0x86DD
_TCP, _UDP, _FRAGMENT = 6, 17, 44
_PROTOCOL_AT = {_ETH_IPV4: 9, _ETH_IPV6: 6}
"""Where the header of IP has the number of what is in it (RFC 791 section 3.1, RFC 8200 section 3)."""

_FROM_NETWORK_HEADER = 1
_INGRESS = 1
"""The flag of bpf_redirect that means: as received."""


def program() -> Assembly:
    """Return the program for the egress of the device.

    Sockets of ours are not turned around: their packets are here by a mistake of the configuration, and would be taken
    as a client's, without end. Fragments of IPv6 are UDP as good as always, since TCP avoids them.
    """
    r0, r1, r2, r6, r10 = Register.R0, Register.R1, Register.R2, Register.R6, Register.R10
    code = Assembly()
    code.move(r6, r1)
    code.load(r2, r6, Field.MARK)
    code.bit_and32(r2, MARK_MASK)
    code.jump_if(r2, Test.EQUAL, MARK_OWN, "leave")
    code.load(r2, r6, Field.PROTOCOL)
    code.jump_if(r2, Test.EQUAL, socket.htons(_ETH_IPV4), "ipv4")
    code.jump_if(r2, Test.NOT_EQUAL, socket.htons(_ETH_IPV6), "leave")
    code.move(r2, _PROTOCOL_AT[_ETH_IPV6])
    code.jump("protocol")
    code.label("ipv4")
    code.move(r2, _PROTOCOL_AT[_ETH_IPV4])
    code.label("protocol")
    code.call(Helper.SKB_LOAD_BYTES_RELATIVE, r6, r2, At(r10, -1), 1, _FROM_NETWORK_HEADER)
    code.jump_if(r0, Test.NOT_EQUAL, 0, "leave")
    code.load(r2, r10, -1, Size.BYTE)
    for number in (_TCP, _UDP, _FRAGMENT):
        code.jump_if(r2, Test.EQUAL, number, "bounce")
    code.label("leave")
    code.leave(Verdict.NEXT)
    code.label("bounce")
    code.load(r1, r6, Field.IFINDEX)
    code.call(Helper.REDIRECT, r1, _INGRESS)
    code.leave()
    return code


class Bounce:
    """A device's bounce, which lasts as long as the device; that by tcx also only until `close`."""

    def __init__(self, device: str, method: Method, place: netns.Place = None) -> None:
        """Install it in a namespace, by default the thread's. Raise KernelError."""
        self.method = method
        self._link: Link | None = None
        if method == "tcx":
            with netns.inside(place):
                problem = attachment_problem()
                if problem:
                    raise KernelError(f"bounce by tcx on {device}", errno.EOPNOTSUPP, problem)
                with load(program(), "gostnet_bounce") as loaded:
                    self._link = loaded.attach(device, Direction.EGRESS)
        else:
            with _TrafficControl(place) as kernel, netns.inside(place):
                kernel.bounce(device)

    def close(self) -> None:
        """Take the program off. Idempotent."""
        if self._link is not None:
            self._link.close()


# ---- by clsact ----------------------------------------------------------------------------------
_NEWQDISC, _NEWTFILTER = 36, 44
_CREATE_NEW = 0x400 | 0x200
_TCMSG = struct.Struct("=B3xiIII")  # family, interface, handle, parent, information
_CLSACT, _CLSACT_HANDLE, _EGRESS = 0xFFFFFFF1, 0xFFFF0000, 0xFFFFFFF3
_TCA_KIND, _TCA_OPTIONS = 1, 2
_U32_SEL, _U32_ACT = 5, 7
_TERMINAL = 0x1
_ACT_KIND, _ACT_OPTIONS = 1, 2
_MIRRED_PARMS = 2
_INGRESS_REDIRECT = 3
_STOLEN = 4
_NESTED = 0x8000


class _TrafficControl(RouteSocket):
    """The filters of devices, as tc(8) makes them."""

    __slots__ = ()

    def bounce(self, device: str) -> None:
        """Add the qdisc clsact, and filters of kind u32 with the action mirred. Raise KernelError."""
        try:
            index = socket.if_nametoindex(device)
        except OSError as exc:
            raise KernelError(f"tc qdisc add dev {device} clsact", errno.ENODEV) from exc
        body = _TCMSG.pack(0, index, _CLSACT_HANDLE, _CLSACT, 0) + tlv(_TCA_KIND, b"clsact\0")
        self._request(f"tc qdisc add dev {device} clsact", _NEWQDISC, body, _CREATE_NEW)
        priority = 0
        for ethernet, word in ((_ETH_IPV4, "ip"), (_ETH_IPV6, "ipv6")):
            for number in (_TCP, _UDP, _FRAGMENT) if ethernet == _ETH_IPV6 else (_TCP, _UDP):
                priority += 1
                words = f"tc filter add dev {device} egress protocol {word} prio {priority} u32 match u8 {number} 0xff"
                information = priority << 16 | socket.htons(ethernet)
                body = _TCMSG.pack(0, index, 0, _EGRESS, information) + tlv(_TCA_KIND, b"u32\0")
                body += tlv(_TCA_OPTIONS | _NESTED, _filter(index, _PROTOCOL_AT[ethernet], number))
                redirect = f"at {_PROTOCOL_AT[ethernet]} action mirred ingress redirect dev {device}"
                self._request(f"{words} {redirect}", _NEWTFILTER, body, _CREATE_NEW)


def _filter(index: int, offset: int, number: int) -> bytes:
    """Encode a filter for packets whose byte at `offset` is `number`, and what becomes of them.

    struct tc_u32_sel: flags 1 | shift of offset 1 | number of keys 1 | pad 1 | 2 x 4 | 2 x 2 | 4
    struct tc_u32_key: mask 4 | value 4, both in network order | offset 4, a multiple of 4 | mask of offset 4
    struct tc_mirred:  index 4 | capabilities 4 | verdict 4 | references 4 | bound 4 | what 4 | interface 4
    """
    shift = 8 * (3 - offset % 4)
    selector = struct.pack("=BBBxHHhhI", _TERMINAL, 0, 1, 0, 0, 0, 0, 0)
    key = struct.pack("!II", 0xFF << shift, number << shift) + struct.pack("=ii", offset & ~3, 0)
    mirred = struct.pack("=IIiiiiI", 0, 0, _STOLEN, 0, 0, _INGRESS_REDIRECT, index)
    action = tlv(_ACT_KIND, b"mirred\0")
    action += tlv(_ACT_OPTIONS | _NESTED, tlv(_MIRRED_PARMS, mirred))
    # The actions of a filter are numbered from 1 on.
    return tlv(_U32_SEL, selector + key) + tlv(_U32_ACT | _NESTED, tlv(1 | _NESTED, action))
