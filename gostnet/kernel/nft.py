"""nftables without the nft program: pyroute2 frames the messages, the expressions are encoded beside this.

A `Transaction` is all or nothing. A table with the owner flag belongs to the socket of the `Nft` that made it: other
processes cannot change it, and the kernel removes it when that socket closes, also on SIGKILL (Linux 5.12).
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import Any

from pyroute2.netlink import NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST
from pyroute2.netlink.nfnetlink import nfgen_msg, nftsocket

from gostnet.core.errors import KernelError
from gostnet.core.resources import NftChain, NftRule, NftSet

from . import netns
from .errors import kernel_error
from .netlink_attributes import attributes_of
from .nft_expr import NESTED, host, name_attribute, tlv, u32, value

_NETLINK_NETFILTER = 12
_SUBSYSTEM = 10
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_INET = 1
_ANY = 0
_FAMILIES = {1: "inet", 2: "ip", 10: "ip6"}
_GETTABLE, _GETCHAIN, _GETRULE, _GETSETELEM = (_SUBSYSTEM << 8 | number for number in (1, 4, 7, 13))
_ATTEMPTS = 20
_OWNER = 2
_INTERVAL = 4
_HOOKS = {"prerouting": 0, "input": 1, "forward": 2, "output": 3, "postrouting": 4}
_SET_TYPES = {"ipv4_addr": (7, 4), "ipv6_addr": (8, 16), "inet_service": (13, 2), "fib_addrtype": (38, 4)}
_FIB_TYPES = {"unicast": 1, "local": 2, "broadcast": 3, "anycast": 4, "multicast": 5}
_ELEMENTS_A_MESSAGE = 1000  # an attribute holds 64 KiB at most
_ELEMENTS_SHOWN = 64

_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 270, 10, 11
_SO_SNDBUFFORCE = 32
_ERROR, _DONE = 2, 3
_HEADER = struct.Struct("=IHHII")
_CAPPED, _HAS_TEXT = 0x100, 0x200


def _taking_bytes(message: type[Any], *attributes: str) -> Any:
    """Return a message class that takes these attributes as ready bytes."""
    # 20 times faster for expressions and elements, and independent of the gaps in pyroute2's tables.
    table = tuple((name, "cdata" if name in attributes else form) for name, form in message.nla_map)
    return type(message.__name__, (message,), {"nla_map": table})


_OWN_TIMEOUT = 0x10
_ELEMENT_TIMEOUT = 4

Additions = Mapping[str, Sequence[tuple[bytes, float]]]
"""By set: addresses in network order, and the seconds that each stays."""

_TableMessage = _taking_bytes(nftsocket.nft_table_msg, "NFTA_TABLE_USERDATA")
_SetMessage = _taking_bytes(nftsocket.nft_set_msg, "NFTA_SET_USERDATA", "NFTA_SET_FLAGS", "NFTA_SET_DESC")
_RuleMessage = _taking_bytes(nftsocket.nft_rule_msg, "NFTA_RULE_EXPRESSIONS", "NFTA_RULE_USERDATA")
_ElementsMessage = _taking_bytes(nftsocket.nft_set_elem_list_msg, "NFTA_SET_ELEM_LIST_ELEMENTS")


# ---- transactions -------------------------------------------------------------------------------
@dataclass(slots=True)
class Item:
    """One message; `words` are the command of nft(8) for it, "" if another item's say it already."""

    words: str
    message: Any


class Transaction:
    """Changes of family inet that the kernel makes all at once or not at all; each method adds one."""

    __slots__ = ("_sets", "items")

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._sets = 0

    def add_table(self, name: str, *, owner: bool = False, comment: str = "", quiet: bool = False) -> None:
        """Make a table, or nothing if it is there. A comment is kept only by a new one."""
        attributes: list[tuple[str, Any]] = [("NFTA_TABLE_NAME", name)]
        inner = ""
        if owner:
            attributes.append(("NFTA_TABLE_FLAGS", _OWNER))
            inner += "flags owner; "
        if comment:
            attributes.append(("NFTA_TABLE_USERDATA", _user_data(comment)))
            inner += f'comment "{comment}"; '
        words = f"nft add table inet {name}" + (f" {{ {inner}}}" if inner else "")
        self._put("" if quiet else words, _TableMessage, nftsocket.NFT_MSG_NEWTABLE, attributes, NLM_F_CREATE)

    def delete_table(self, name: str) -> None:
        """Remove a table with its content, if it is there."""
        self.add_table(name, quiet=True)  # DESTROYTABLE came with Linux 6.3, so it is made where it is missing
        words = f"nft delete table inet {name}"
        attributes = [("NFTA_TABLE_NAME", name)]
        self._put(words, nftsocket.nft_table_msg, nftsocket.NFT_MSG_DELTABLE, attributes)

    def flush_table(self, table: str) -> None:
        """Remove all rules."""
        words = f"nft flush table inet {table}"
        self._put(words, nftsocket.nft_rule_msg, nftsocket.NFT_MSG_DELRULE, [("NFTA_RULE_TABLE", table)])

    def add_chain(self, table: str, chain: NftChain) -> None:
        """Make a chain."""
        attributes: list[tuple[str, Any]] = [("NFTA_CHAIN_TABLE", table), ("NFTA_CHAIN_NAME", chain.name)]
        words = f"nft add chain inet {table} {chain.name}"
        if chain.hook:
            hook = {"attrs": [("NFTA_HOOK_HOOKNUM", _HOOKS[chain.hook]), ("NFTA_HOOK_PRIORITY", chain.priority)]}
            attributes += [("NFTA_CHAIN_HOOK", hook), ("NFTA_CHAIN_TYPE", chain.type), ("NFTA_CHAIN_POLICY", 1)]
            words += f" {{ type {chain.type} hook {chain.hook} priority {chain.priority}; policy accept; }}"
        self._put(words, nftsocket.nft_chain_msg, nftsocket.NFT_MSG_NEWCHAIN, attributes, NLM_F_CREATE)

    def delete_chain(self, table: str, name: str) -> None:
        """Remove a chain that has no rules and that no rule leads to."""
        attributes = [("NFTA_CHAIN_TABLE", table), ("NFTA_CHAIN_NAME", name)]
        words = f"nft delete chain inet {table} {name}"
        self._put(words, nftsocket.nft_chain_msg, nftsocket.NFT_MSG_DELCHAIN, attributes)

    def add_rule(self, table: str, rule: NftRule) -> None:
        """Append a rule to its chain."""
        attributes: list[tuple[str, Any]] = [
            ("NFTA_RULE_TABLE", table),
            ("NFTA_RULE_CHAIN", rule.chain),
            ("NFTA_RULE_EXPRESSIONS", rule.code),
        ]
        words = f"nft add rule inet {table} {rule.chain} {rule.text}"
        if rule.comment:
            attributes.append(("NFTA_RULE_USERDATA", _user_data(rule.comment)))
            words += f' comment "{_quotable(rule.comment)}"'
        self._put(words, _RuleMessage, nftsocket.NFT_MSG_NEWRULE, attributes, NLM_F_CREATE | NLM_F_APPEND)

    def add_set(self, table: str, of: NftSet) -> None:
        """Make a set with its elements."""
        self._sets += 1
        kind, size = _SET_TYPES[of.type]
        interval = of.type != "fib_addrtype" and not of.timeout
        flags = (_INTERVAL if interval else 0) | (_OWN_TIMEOUT if of.timeout else 0)
        attributes: list[tuple[str, Any]] = [
            ("NFTA_SET_TABLE", table),
            ("NFTA_SET_NAME", of.name),
            ("NFTA_SET_FLAGS", struct.pack("!I", flags)),
            ("NFTA_SET_KEY_TYPE", kind),
            ("NFTA_SET_KEY_LEN", size),
            ("NFTA_SET_ID", self._sets),
            # What order of bytes the keys have, for whoever lists the set: 1 the host's, 2 the network's.
            ("NFTA_SET_USERDATA", struct.pack("=BBI", 0, 4, 1 if of.type == "fib_addrtype" else 2)),
        ]
        inner = f"type {of.type};{' flags interval;' if interval else ''}"
        if of.timeout:
            attributes.append(("NFTA_SET_TIMEOUT", of.timeout * 1000))
            inner += f" flags timeout; timeout {of.timeout}s;"
        if of.size:
            attributes.append(("NFTA_SET_DESC", u32(1, of.size)))
            inner += f" size {of.size};"
        inner += f" elements = {{ {_shown(of)} }};" if of.elements or of.packed else ""
        words = f"nft add set inet {table} {of.name} {{ {inner} }}"
        self._put(words, _SetMessage, nftsocket.NFT_MSG_NEWSET, attributes, NLM_F_CREATE)
        if of.packed:
            encoded = _packed_elements(of)
        else:
            encoded = list(_interval_elements(of)) if interval else [_element(host(_FIB_TYPES[e])) for e in of.elements]
        self._put_elements(table, of.name, encoded)

    def renew_elements(self, table: str, name: str, addresses: Sequence[tuple[bytes, float]]) -> None:
        """Have addresses be in a set with a timeout for so many seconds from now on, whether they are in it or not.

        Before Linux 6.12 an element's timeout cannot be changed, and one that is not there cannot be removed: so each
        is added, removed and added. Whoever looks meanwhile sees the state before.
        """
        plain = [_element(address) for address, _ in addresses]
        timed = [_element(address, seconds=seconds) for address, seconds in addresses]
        self._put_elements(table, name, timed, f"nft add element inet {table} {name}")
        self._put_elements(table, name, plain, f"nft delete element inet {table} {name}", delete=True)
        self._put_elements(table, name, timed)

    def _put_elements(
        self, table: str, name: str, encoded: Sequence[bytes], words: str = "", *, delete: bool = False
    ) -> None:
        kind = nftsocket.NFT_MSG_DELSETELEM if delete else nftsocket.NFT_MSG_NEWSETELEM
        for start in range(0, len(encoded), _ELEMENTS_A_MESSAGE):
            attributes: list[tuple[str, Any]] = [
                ("NFTA_SET_ELEM_LIST_TABLE", table),
                ("NFTA_SET_ELEM_LIST_SET", name),
                ("NFTA_SET_ELEM_LIST_ELEMENTS", b"".join(encoded[start : start + _ELEMENTS_A_MESSAGE])),
            ]
            self._put(words, _ElementsMessage, kind, attributes, 0 if delete else NLM_F_CREATE)

    def delete_set(self, table: str, name: str) -> None:
        """Remove a set that no rule uses."""
        words = f"nft delete set inet {table} {name}"
        attributes = [("NFTA_SET_TABLE", table), ("NFTA_SET_NAME", name)]
        self._put(words, _SetMessage, nftsocket.NFT_MSG_DELSET, attributes)

    def _put(self, words: str, form: Any, kind: int, attributes: list[tuple[str, Any]], flags: int = 0) -> None:
        message = form()
        message["nfgen_family"] = _INET
        message["header"]["type"] = _SUBSYSTEM << 8 | kind
        message["header"]["flags"] = NLM_F_REQUEST | flags
        message["attrs"] = attributes
        self.items.append(Item(words, message))


def _quotable(comment: str) -> str:
    """Return a comment as nft(8) takes it between quotation marks, which it knows no way to escape."""
    return "".join("'" if char == '"' else char if char.isprintable() else "?" for char in comment)


def _user_data(comment: str) -> bytes:
    """Encode a comment as nft(8) reads it: type 0, length, text with its NUL; at most 128 bytes of text."""
    text = _quotable(comment).encode()[:127] + b"\0"
    return bytes((0, len(text))) + text


def _spans(of: NftSet) -> Iterator[tuple[int, int]]:
    for element in of.elements:
        if of.type == "inet_service":
            low, _, high = element.partition("-")
            yield int(low), int(high or low) + 1
        else:
            network = ip_network(element)
            yield int(network.network_address), int(network.broadcast_address) + 1


def _interval_elements(of: NftSet) -> Iterator[bytes]:
    """Yield the keys where an interval begins or (flagged) is over, ascending, adjoining intervals as one.

    The one that ends at the highest possible key has no end; one that begins above 0 has a gap before it.
    """
    size = _SET_TYPES[of.type][1]
    merged: list[list[int]] = []
    for low, high in sorted(_spans(of)):
        if merged and low <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], high)
        else:
            merged.append([low, high])
    if merged and merged[0][0]:
        yield _element(bytes(size), end=True)
    for low, high in merged:
        yield _element(low.to_bytes(size, "big"))
        if high < 1 << size * 8:
            yield _element(high.to_bytes(size, "big"), end=True)


def _packed_elements(of: NftSet) -> list[bytes]:
    """Return what `_interval_elements` yields for the ranges of `of.packed`, which are in order already.

    One element is at hand for each of its two forms, and only the key is put in: lists have 100,000 networks.
    """
    size = _SET_TYPES[of.type][1]
    key, highest, packed = bytes(size), b"\xff" * size, of.packed
    # Three headers stand before the key: of the element, of the key's attribute, and of the data in it.
    begin, end, end_tail = _element(key)[:12], _element(key, end=True)[:12], _element(key, end=True)[12 + size :]
    found = [] if packed[:size] == key else [_element(key, end=True)]
    for place in range(0, len(packed), 2 * size):
        last = packed[place + size : place + 2 * size]
        found.append(begin + packed[place : place + size])
        if last != highest:
            found.append(end + (int.from_bytes(last, "big") + 1).to_bytes(size, "big") + end_tail)
    return found


def _shown(of: NftSet) -> str:
    """Return the elements in the words of nft(8), of many only the first ones."""
    if not of.packed:
        return ", ".join(of.elements)
    size = _SET_TYPES[of.type][1]
    form = IPv4Address if size == 4 else IPv6Address
    count = len(of.packed) // (2 * size)
    words = []
    for place in range(0, min(count, _ELEMENTS_SHOWN) * 2 * size, 2 * size):
        first, last = form(of.packed[place : place + size]), form(of.packed[place + size : place + 2 * size])
        words.append(str(first) if first == last else f"{first}-{last}")
    if count > len(words):
        words.append(f"... {count - len(words)} more")
    return ", ".join(words)


def _element(key: bytes, *, end: bool = False, seconds: float = 0.0) -> bytes:
    timeout = tlv(_ELEMENT_TIMEOUT, struct.pack("!Q", max(1, int(seconds * 1000)))) if seconds else b""
    return tlv(NESTED | 1, value(1, key) + (u32(3, 1) if end else b"") + timeout)


# ---- the socket ---------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class ObservedTable:
    """A table of family inet as the kernel lists it; `owner` is the netlink port that owns it, 0 for none."""

    name: str
    owner: int
    comment: str


@dataclass(frozen=True, slots=True)
class ObservedChain:
    """A chain of the filter type as the kernel lists it.

    drops   its policy is to drop, or its last rule refuses whatever comes to it
    """

    family: str
    table: str
    name: str
    drops: bool

    @property
    def words(self) -> str:
        """How people find it."""
        return f"chain {self.name} of the nftables table {self.family} {self.table}"


class Nft:
    """A netlink socket for nftables in one network namespace.

    Nothing here waits: the kernel has worked a request off before `send` returns. A context manager; closing it
    removes the tables that it owns.
    """

    __slots__ = ("_sequence", "_socket", "port")

    def __init__(self, place: netns.Place = None) -> None:
        """Open a socket in a namespace, by default the thread's. Raise KernelError."""
        sock = netns.socket_in(place, socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        sock.bind((0, 0))
        sock.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        sock.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        self._socket = sock
        self._sequence = 0
        self.port = int(sock.getsockname()[0])
        """The number by which the kernel names the owner of our tables."""

    def close(self) -> None:
        """Close the socket; the kernel removes what it owns before this returns. Idempotent."""
        self._socket.close()

    def __enter__(self) -> Nft:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def commit(self, transaction: Transaction) -> None:
        """Have a transaction done. Raise KernelError that names the refused statement; nothing is changed then."""
        items = transaction.items
        if not items:
            return
        messages = [_batch_edge(_BATCH_BEGIN), *(item.message for item in items), _batch_edge(_BATCH_END)]
        messages[-2]["header"]["flags"] |= NLM_F_ACK  # success answers once, each failure answers by itself
        first = self._sequence + 2
        request = bytearray()
        for message in messages:
            self._sequence += 1
            message["header"]["sequence_number"] = self._sequence
            message.reset()
            message.encode()
            request += message.data
        # A refusal of the batch as a whole (missing privilege) answers to its begin.
        words = [item.words for item in items]
        whole = next((text for text in words if text), "nft")
        self._send(request, whole)
        acknowledged, failure = False, None
        for number, sequence, text in self._answers():
            if number == 0:
                acknowledged = True
            elif failure is None:
                place = sequence - first
                while 0 < place < len(words) and not words[place]:
                    place -= 1
                statement = words[place] if 0 <= place < len(words) else ""
                failure = kernel_error(statement or whole, number, text)
        if failure is not None:
            raise failure
        if not acknowledged:
            raise KernelError(whole, errno.EIO, "the kernel did not answer")

    def tables(self) -> list[ObservedTable]:
        """List the tables of family inet. Raise KernelError."""
        found = []
        for of in self._dump("nft list tables", _GETTABLE):
            owner = int.from_bytes(of.get(7, b""), "big")  # NFTA_TABLE_OWNER
            found.append(ObservedTable(_text(of[1]), owner, _comment(of.get(6, b""))))
        return found

    def chains(self, table: str) -> list[str]:
        """List the names of a table's chains, [] if there is no such table. Raise KernelError."""
        return [_text(of[3]) for of in self._dump("nft list chains", _GETCHAIN) if _text(of[1]) == table]

    def forwarding(self) -> list[ObservedChain]:
        """List the chains of all families and tables that forwarded packets pass. Raise KernelError."""
        found = []
        for of in self._dump("nft list chains", _GETCHAIN, family=_ANY):
            hook = dict(attributes_of(of.get(4, b""), 0))  # NFTA_CHAIN_HOOK
            forward = int.from_bytes(hook.get(1, b"\xff"), "big") == _HOOKS["forward"]
            if not forward or of[0][0] not in _FAMILIES or _text(of.get(7, b"")) != "filter":  # NFTA_CHAIN_TYPE
                continue
            policy = int.from_bytes(of.get(5, b"\0\0\0\1"), "big")  # NFTA_CHAIN_POLICY; accept by default
            found.append(ObservedChain(_FAMILIES[of[0][0]], _text(of[1]), _text(of[3]), policy == 0))
        return [replace(chain, drops=chain.drops or self._ends_in_refusal(chain)) for chain in found]

    def _ends_in_refusal(self, chain: ObservedChain) -> bool:
        """Tell whether the last rule of a chain refuses whatever comes to it."""
        family = next(number for number, name in _FAMILIES.items() if name == chain.family)
        which = name_attribute(1, chain.table) + name_attribute(2, chain.name)
        rules = self._dump("nft list chain", _GETRULE, which, family)
        rules = [of for of in rules if (_text(of[1]), _text(of[2])) == (chain.table, chain.name)]
        if not rules:
            return False
        terms = []
        for _, element in attributes_of(rules[-1].get(4, b""), 0):  # NFTA_RULE_EXPRESSIONS
            of = dict(attributes_of(element, 0))
            terms.append((_text(of.get(1, b"")), of.get(2, b"")))
        others = [name for name, _ in terms if name not in ("counter", "log")]
        if others == ["reject"]:
            return True
        if others != ["immediate"]:
            return False
        (data,) = (data for name, data in terms if name == "immediate")
        verdict = dict(attributes_of(dict(attributes_of(data, 0)).get(2, b""), 0)).get(2, b"")  # NFTA_DATA_VERDICT
        return dict(attributes_of(verdict, 0)).get(1) == b"\0\0\0\0"  # NF_DROP

    def elements(self, table: str, name: str) -> list[bytes]:
        """List the keys of a set that are not over yet. Raise KernelError."""
        which = name_attribute(1, table) + name_attribute(2, name)
        found: list[bytes] = []
        for of in self._dump("nft list set", _GETSETELEM, which):
            for kind, element in attributes_of(of.get(3, b""), 0):  # NFTA_SET_ELEM_LIST_ELEMENTS
                key = dict(attributes_of(element, 0)).get(1, b"")  # NFTA_SET_ELEM_KEY
                found += [data for inner, data in attributes_of(key, 0) if kind == inner == 1]
        return found

    def _dump(self, operation: str, kind: int, which: bytes = b"", family: int = _INET) -> list[dict[int, bytes]]:
        """Return the attributes of each answer, with the family as the one of number 0.

        A dump that a change interrupted is asked for again.
        """
        for _ in range(_ATTEMPTS):
            self._sequence += 1
            body = struct.pack("=BBH", family, 0, 0)
            size = _HEADER.size + len(body) + len(which)
            request = _HEADER.pack(size, kind, NLM_F_REQUEST | NLM_F_DUMP, self._sequence, 0)
            self._send(bytearray(request + body + which), operation)
            found, interrupted = [], False
            for number, message in self._parts(operation):
                if _HEADER.unpack_from(message)[2] & NLM_F_DUMP_INTR:
                    interrupted = True
                if number == _ERROR:
                    raise kernel_error(operation, -int(struct.unpack_from("=i", message, _HEADER.size)[0]))
                if number == _DONE:
                    break
                of = dict(attributes_of(message, _HEADER.size + len(body)))
                of[0] = message[_HEADER.size : _HEADER.size + 1]
                found.append(of)
            if not interrupted:
                return found
        raise KernelError(operation, errno.EAGAIN, "the state keeps changing")

    def _parts(self, operation: str) -> Iterator[tuple[int, bytes]]:
        # The first part of a dump is ready when send() returns, and each recv() makes the kernel prepare the next.
        while True:
            try:
                data = self._socket.recv(1 << 17)
            except OSError as exc:
                raise kernel_error(operation, exc.errno or errno.EIO) from exc
            yield from _messages(data)

    def _send(self, request: bytearray, operation: str) -> None:
        # The whole transaction has to go in one piece. Without CAP_NET_ADMIN in the first user namespace the buffer
        # can only be enlarged up to net.core.wmem_max.
        size = max(len(request) + 65536, 1 << 20)
        for option in (_SO_SNDBUFFORCE, socket.SO_SNDBUF):
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, option, size)
                break
            except PermissionError:
                continue
        try:
            self._socket.send(request)
        except OSError as exc:
            raise kernel_error(operation, exc.errno or errno.EIO) from exc

    def _answers(self) -> Iterator[tuple[int, int, str]]:
        while True:
            try:
                data = self._socket.recv(1 << 17)
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno != errno.ENOBUFS:  # more errors than the buffer holds: those that came tell enough
                    raise kernel_error("nft", exc.errno or errno.EIO) from exc
                continue
            for kind, message in _messages(data):
                if kind == _ERROR:
                    yield _verdict(message)


def _batch_edge(kind: int) -> Any:
    message = nfgen_msg()
    message["res_id"] = _SUBSYSTEM
    message["header"]["type"], message["header"]["flags"] = kind, NLM_F_REQUEST
    return message


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + _HEADER.size <= len(data):
        size, kind = struct.unpack_from("=IH", data, position)
        if size < _HEADER.size:
            return
        yield kind, data[position : position + size]
        position += (size + 3) & ~3


def _verdict(message: bytes) -> tuple[int, int, str]:
    """Return errno (0 for success), sequence number and the kernel's own words, "" for none."""
    _, _, flags, _, _ = _HEADER.unpack_from(message)
    number = -int(struct.unpack_from("=i", message, _HEADER.size)[0])
    copied, _, _, sequence, _ = _HEADER.unpack_from(message, _HEADER.size + 4)
    start = 2 * _HEADER.size + 4 + (0 if flags & _CAPPED else copied - _HEADER.size)
    text = ""
    if flags & _HAS_TEXT:
        text = _text(dict(attributes_of(message, start)).get(1, b""))
    return number, sequence, text


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="backslashreplace")


def _comment(user_data: bytes) -> str:
    position = 0
    while position + 2 <= len(user_data):
        kind, size = user_data[position], user_data[position + 1]
        if kind == 0:
            return _text(user_data[position + 2 : position + 2 + size])
        position += 2 + size
    return ""


def owned_by_others(tables: Sequence[ObservedTable], name: str, port: int) -> bool:
    """Tell whether a table of this name belongs to another socket than the one with this port."""
    return any(table.name == name and table.owner not in (0, port) for table in tables)
