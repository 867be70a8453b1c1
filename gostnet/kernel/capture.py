"""Captures compiled to kernel resources: one nftables table for an instance, and for tproxy its rules and routes.

What is never captured, whatever the configuration says:

- packets with a mark of ours: own sockets above all, so that the daemon cannot capture itself;
- what goes against the direction in which its connection began: replies to connections that came in from outside;
- TCP connections older than the capture: only a SYN without ACK starts a captured connection, a bit of its conntrack
  mark and the transparent socket that took it keep the later segments together;
- connections whose destination somebody else's rules have changed (published ports of containers, port forwarding);
- destinations that are local, broadcast, multicast, anycast or link-local, and DHCP. Neighbour discovery and all
  other ICMP are not TCP or UDP, so they never get this far.

What a capture goes around (`Around`) is decided when a flow begins: a bit of the conntrack mark keeps datagrams on the
way that their flow has begun, also when a reload decides otherwise about new ones.

All chains are at priority -95, behind the usual one of destination NAT (-100), to see what that has done. TPROXY
needs no sysctl: the rule for a diverted packet names the interface, therefore neither reverse path filtering with
src_valid_mark nor a firewall's own reverse lookup meets it.

An inlet is a device whose packets come back in by it. What is routed into it stands in a table of its own, which only
unmarked packets look up: so sockets of ours keep the way that they would have without it. Forwarded packets that are
on their way into it are taken where they enter, because the kernel drops a forwarded packet for which it has found the
transparent socket already (it does so with the second segment of a connection).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Literal

from gostnet.core.errors import ConfigError
from gostnet.core.resources import (
    CONNECTION_CAPTURED,
    CONNECTION_DIRECT,
    CONNECTION_OWN,
    FIRST_TABLE,
    MAIN_TABLE,
    MARK_DIVERTED,
    MARK_MASK,
    MARK_OWN,
    MARK_RETURNING,
    NAMED_SIZE,
    NAMED_TIMEOUT,
    RULES_A_SLOT,
    SLOTS,
    Around,
    Capture,
    Inlet,
    NftChain,
    NftRule,
    NftSet,
    NftStatement,
    NftTable,
    Ranges,
    Resource,
    Route,
    Rule,
    Sysctl,
    names_set,
    return_table,
    routed_table,
)

from . import nft_expr as nft
from .masquerade import FORWARDING, SOURCE_NAT
from .nft_expr import Term

PRIORITY = -95

_INSTANCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_INTERFACE = re.compile(r"[^\s/\"*]{1,15}")
_NUMBERS = {"tcp": nft.TCP, "udp": nft.UDP}
_DHCP = ((67, 68), (546, 547))
_HERE = "here"
_SET_TYPES: dict[int, Literal["ipv4_addr", "ipv6_addr"]] = {4: "ipv4_addr", 6: "ipv6_addr"}

Place = Literal["interface", "return", "local"]
"""Where a packet is met: entering by an interface; coming back through lo; leaving a process of the host."""


def table_name(instance: str) -> str:
    """Return the name of an instance's table. Raise ConfigError for a name that cannot be one."""
    if not _INSTANCE.fullmatch(instance):
        raise ConfigError("--instance", f"{instance[:64]!r} is not a name of letters, digits and - _ .")
    return f"gostnet-{instance}"


def compile_captures(
    captures: Sequence[Capture],
    inlets: Sequence[Inlet] = (),
    *,
    instance: str = "default",
    slot: int = 0,
    ipv6: bool = True,
) -> tuple[Resource, ...]:
    """Return what the kernel has to hold so that the captures happen, () for none.

    Of captures that want the same packet the first one gets it. Without `ipv6` there are no routes and rules of it;
    its packets are still captured, and dropped until it is there. Raise ConfigError for a capture that makes no
    sense, such as one that could loop.
    """
    if not captures and not inlets:
        return ()
    for capture in captures:
        _check(capture)
    resources: list[Resource] = []
    returning = _return_device(captures)
    ways = _ways(captures, inlets, returning)
    versions: tuple[Literal[4, 6], ...] = (4, 6) if ipv6 else (4,)
    for version in versions:
        everything = "0.0.0.0/0" if version == 4 else "::/0"
        number, back = FIRST_TABLE + slot, return_table(slot)
        if ways:
            resources.append(Route(everything, number, "local", "lo"))
            resources += [Rule(version, number, number, mark, MARK_MASK, name) for name, mark in ways]
        if returning:
            resources.append(Route(everything, back, device=returning))
            resources.append(Rule(version, number, back, MARK_RETURNING, MARK_MASK, "lo"))
        resources += _routed(inlets, version, slot)
        if any(_forwards(capture) and capture.around.has(version) for capture in captures if capture.around):
            resources.append(Sysctl(FORWARDING[version], "1"))
    content = tuple(_Table(captures, inlets).build())
    resources.append(NftTable(table_name(instance), content, note=f"slot {slot}"))
    return tuple(resources)


def _forwards(capture: Capture) -> bool:
    """Tell whether the host forwards something instead of capturing it."""
    return capture.around is not None and capture.around.forwarded and bool(capture.interfaces)


def _return_device(captures: Sequence[Capture]) -> str:
    """Return the device that the host's own captured traffic goes through, "" for lo. Raise ConfigError."""
    local = [capture for capture in captures if capture.method == "tproxy" and capture.local]
    devices = {capture.device for capture in local}
    if len(devices) > 1:
        last = next(capture for capture in reversed(local) if capture.device != local[0].device)
        raise ConfigError(last.service, f"local is captured by {local[0].service} already, in another way")
    return devices.pop() if devices else ""


def _ways(captures: Sequence[Capture], inlets: Sequence[Inlet], returning: str) -> list[tuple[str, int]]:
    """Return by what packets come that shall end at this host, and the mark that they have then."""
    diverted = [capture for capture in captures if capture.method == "tproxy"]
    names = {name for capture in diverted for name in capture.interfaces} | {i.device for i in inlets if i.tcp}
    ways = [(name, MARK_DIVERTED) for name in sorted(names)]
    if not returning and any(capture.local for capture in diverted):
        ways.append(("lo", MARK_RETURNING))
    return ways


def _routed(inlets: Sequence[Inlet], version: Literal[4, 6], slot: int) -> Iterator[Resource]:
    """Yield routes into devices, and rules by which they count as if they stood among the host's own.

    For every length of a prefix, longest first: the host's routes that are longer, then those into devices that are
    not shorter. With all priorities in use the shortest ones are taken together.
    """
    lengths = set()
    table = routed_table(slot)
    for inlet in inlets:
        for destination, gateway in inlet.ways:
            network = ip_network(destination)
            if network.version == version:
                lengths.add(network.prefixlen)
                yield Route(destination, table, device=inlet.device, gateway=gateway)
    if not lengths:
        return
    priority = FIRST_TABLE + SLOTS + slot
    # What enters by any interface and is taken on its way into a device. A lookup of the way back to a source is one
    # of the host itself, as if by lo, and must not end here.
    yield Rule(version, priority, MAIN_TABLE, MARK_DIVERTED, MARK_MASK, "lo")
    yield Rule(version, priority + SLOTS, FIRST_TABLE + slot, MARK_DIVERTED, MARK_MASK)
    ordered = sorted(lengths, reverse=True)[: RULES_A_SLOT // 2 - 2]
    for length in ordered:
        priority += 2 * SLOTS
        yield Rule(version, priority, MAIN_TABLE, 0, MARK_MASK, suppress=length)
        last = length == ordered[-1]
        yield Rule(version, priority + SLOTS, table, 0, MARK_MASK, suppress=-1 if last else length - 1)


def _check(capture: Capture) -> None:
    """Raise ConfigError for what cannot be captured or would capture itself."""
    path = capture.service
    if capture.protocol == "udp" and capture.method != "tproxy":
        raise ConfigError(path, "udp can only be captured by tproxy")
    if not 0 < capture.port < 65536:
        raise ConfigError(path, f"a capture needs a listener with a port, not {capture.port}")
    if capture.device in capture.interfaces and capture.device:
        raise ConfigError(path, f"{capture.device!r} is the device itself: what comes by it is taken anyway")
    if not capture.interfaces and not capture.local:
        raise ConfigError(path, "a capture names interfaces, local, or both")
    for name in capture.interfaces:
        if name == "lo":
            raise ConfigError(path, "'lo' cannot be captured, as what is captured goes through it; write local")
        if not _INTERFACE.fullmatch(name) or name in (".", "..") or len(name.encode()) > 15:
            raise ConfigError(path, f"{name[:64]!r} is not the name of an interface")
    for low, high in capture.ports:
        if not 0 < low <= high < 65536:
            raise ConfigError(path, f"'{low}-{high}' is not a range of ports such as 8000-8100")
    if capture.address:
        try:
            address = ip_address(capture.address)
        except ValueError:
            raise ConfigError(path, f"{capture.address!r} is not an address") from None
        if address.is_loopback and capture.method == "redirect" and capture.interfaces:
            message = f"a redirected packet cannot reach {address} from outside; listen on :{capture.port}"
            raise ConfigError(path, message, hint="or set tproxy: true")


def _networks(texts: Iterable[str], path: str) -> dict[int, tuple[str, ...]]:
    """Return the networks by IP version, without those that others hold already."""
    found: dict[int, list[tuple[int, int]]] = {4: [], 6: []}
    for text in texts:
        try:
            network = ip_network(text, strict=False)
        except ValueError:
            raise ConfigError(path, f"{text!r} is not a network such as 192.0.2.0/24") from None
        found[network.version].append((int(network.network_address), network.prefixlen))
    return {version: tuple(_maximal(networks, version)) for version, networks in found.items()}


def _maximal(networks: list[tuple[int, int]], version: int) -> Iterator[str]:
    """Yield the networks that no other one holds, ascending. (`collapse_addresses` takes seconds for a long list.)"""
    width, form = (32, IPv4Address) if version == 4 else (128, IPv6Address)
    beyond = 0
    for first, length in sorted(networks):
        if first >= beyond:
            beyond = first + (1 << width - length)
            yield f"{form(first)}/{length}"


def _ranges(ports: Iterable[tuple[int, int]]) -> tuple[str, ...]:
    """Return the ranges ascending, those that touch as one."""
    merged: list[list[int]] = []
    for low, high in sorted(ports):
        if merged and low <= merged[-1][1] + 1:
            merged[-1][1] = max(merged[-1][1], high)
        else:
            merged.append([low, high])
    return tuple(str(low) if low == high else f"{low}-{high}" for low, high in merged)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


class _Table:
    """Collects sets, chains and rules; a chain exists as soon as it is named, before a rule jumps to it."""

    def __init__(self, captures: Sequence[Capture], inlets: Sequence[Inlet] = ()) -> None:
        self.captures = list(enumerate(captures))
        self.inlets = list(enumerate(inlets))
        self.exclude = {c: _networks(c.exclude, c.service) for c in captures}
        self.sources = {c: _networks(c.sources, c.service) for c in captures}
        self.sets: list[NftSet] = [NftSet(_HERE, "fib_addrtype", ("local", "broadcast", "anycast", "multicast"))]
        self.chains: list[NftChain] = []
        self.rules: list[NftRule] = []

    def build(self) -> list[NftStatement]:
        """Return the statements in an order in which the kernel takes them: sets, chains, rules."""
        self._never()
        redirected = [(n, c) for n, c in self.captures if c.method == "redirect"]
        diverted = [(n, c) for n, c in self.captures if c.method == "tproxy"]
        if any(c.interfaces for _, c in redirected):
            self._redirect_from_interfaces([(n, c) for n, c in redirected if c.interfaces])
        if any(c.local for _, c in redirected):
            self._redirect_local([(n, c) for n, c in redirected if c.local])
        if diverted or self.inlets:
            self._divert(diverted)
        if any(inlet.ways or not inlet.tcp for _, inlet in self.inlets):
            self._keep_away()
        forwarding = [c for _, c in self.captures if _forwards(c)]
        if forwarding:
            self._hide(forwarding)
        return [*self.sets, *self.chains, *self.rules]

    # -- pieces --
    def _chain(self, name: str) -> str:
        self.chains.append(NftChain(name))
        return name

    def _base(self, name: str, hook: Literal["prerouting", "output"], kind: Literal["filter", "nat", "route"]) -> str:
        self.chains.append(NftChain(name, hook, kind, PRIORITY))
        return name

    def _rule(self, chain: str, *terms: Term, comment: str = "") -> None:
        text, code = nft.compose(*terms)
        self.rules.append(NftRule(chain, text, code, comment))

    def _set(
        self, word: str, kind: Literal["ipv4_addr", "ipv6_addr", "inet_service"], elements: tuple[str, ...]
    ) -> str:
        """Return the name of a set with this content, which is part of the name: see `nft_table`."""
        name = f"{word}_{_digest(' '.join(elements).encode())}"
        if all(of.name != name for of in self.sets):
            self.sets.append(NftSet(name, kind, elements))
        return name

    def _range_set(self, ranges: Ranges, version: int) -> str:
        """Return the name of the set of the ranges of one IP version, "" for none."""
        packed = ranges.v4 if version == 4 else ranges.v6
        name = f"direct{version}_{_digest(packed)}" if packed else ""
        if packed and all(of.name != name for of in self.sets):
            self.sets.append(NftSet(name, _SET_TYPES[version], (), packed))
        return name

    def _never(self) -> None:
        """Accept, as it is, what no capture takes."""
        chain = self._chain("never")
        self._rule(chain, nft.reply(), nft.accept())
        self._rule(chain, nft.translated(), nft.accept())
        self._rule(chain, nft.address_type_in(_HERE), nft.accept())
        for network in ("169.254.0.0/16", "fe80::/10"):
            self._rule(chain, nft.destination_within(network), nft.accept())
        for low, high in _DHCP:
            self._rule(chain, nft.udp_between(low, high), nft.accept())

    def _conditions(self, chain: str, capture: Capture, place: Place) -> None:
        """Leave the chain for what a capture does not want."""
        if capture.address:
            other = 10 - ip_address(capture.address).version
            self._rule(chain, nft.ip_version(other), nft.back())
        exclude, sources = self.exclude[capture], self.sources[capture]
        for version, kind in _SET_TYPES.items():
            if exclude[version]:
                name = self._set(f"exclude{version}", kind, exclude[version])
                self._rule(chain, nft.address_in("daddr", version, name), nft.back())
            if place != "interface" or not capture.sources:
                continue
            if sources[version]:
                name = self._set(f"sources{version}", kind, sources[version])
                self._rule(chain, nft.address_in("saddr", version, name, negate=True), nft.back())
            else:
                self._rule(chain, nft.ip_version(version), nft.back())
        if capture.ports:
            name = self._set("ports", "inet_service", _ranges(capture.ports))
            self._rule(chain, nft.port_in(_NUMBERS[capture.protocol], name, negate=True), nft.back())
        around = capture.around
        if around is not None and ((place == "interface" and around.forwarded) or (place == "local" and around.local)):
            self._go_around(chain, capture, around)

    def _go_around(self, chain: str, capture: Capture, around: Around) -> None:
        """Let go what would go out directly: it is decided, so no other capture gets it either."""
        number, comment = _NUMBERS[capture.protocol], f"{capture.service}: direct"
        note = nft.set_connection_mark(CONNECTION_DIRECT)
        if capture.protocol == "tcp":
            begins = nft.first_segment()
        else:
            begins = nft.connection_mark(CONNECTION_CAPTURED, negate=True)
            known = nft.protocol(number), nft.connection_mark(CONNECTION_DIRECT)
            self._rule(chain, *known, nft.count(), nft.accept(), comment=comment)
        for ports, ranges in (((), around.ranges), *around.ports):
            where = []
            if ports:
                where.append(nft.port_in(number, self._set("ports", "inet_service", _ranges(ports))))
            elif capture.protocol == "udp":
                where.append(nft.protocol(number))
            for version in _SET_TYPES:
                name = self._range_set(ranges, version)
                if name:
                    terms = begins, nft.address_in("daddr", version, name), *where
                    self._rule(chain, *terms, note, nft.count(), nft.accept(), comment=comment)
        for version in _SET_TYPES if around.names else ():
            name = names_set(version, around.names)
            of = NftSet(name, _SET_TYPES[version], (), timeout=NAMED_TIMEOUT, size=NAMED_SIZE)
            if of not in self.sets:
                self.sets.append(of)
            terms = begins, nft.address_in("daddr", version, name)
            udp = [nft.protocol(number)] if capture.protocol == "udp" else []
            self._rule(chain, *terms, *udp, note, nft.count(), nft.accept(), comment=comment)

    def _hide(self, captures: Sequence[Capture]) -> None:
        """Give what this host forwards instead of capturing the host's own address, as the service would."""
        self.chains.append(NftChain("direct_masquerade", "postrouting", "nat", SOURCE_NAT))
        for name in sorted({name for capture in captures for name in capture.interfaces}):
            terms = nft.enters_by(name), nft.connection_mark(CONNECTION_DIRECT), nft.count(), nft.masquerade()
            self._rule("direct_masquerade", *terms)

    def _dispatch(
        self, chain: str, captures: Sequence[tuple[int, Capture]], place: Place, action: Callable[[Capture], Term]
    ) -> None:
        """Try the captures in their order: conditions, then the action, which ends the matter."""
        for number, capture in captures:
            own = self._chain(f"{place}_{number}")
            if place == "interface":
                for name in capture.interfaces:
                    self._rule(chain, nft.enters_by(name), nft.jump(own))
            else:
                self._rule(chain, nft.jump(own))
            self._conditions(own, capture, place)
            parts = [nft.protocol(_NUMBERS[capture.protocol])]
            if capture.address:
                parts.append(nft.ip_version(ip_address(capture.address).version))
            self._rule(own, *parts, action(capture), comment=capture.service)

    # -- redirect --
    def _redirect_from_interfaces(self, captures: Sequence[tuple[int, Capture]]) -> None:
        base, new = self._base("redirect_in", "prerouting", "nat"), self._chain("redirect_in_new")
        self._rule(base, nft.mark(0, MARK_MASK, negate=True), nft.accept())
        for name in sorted({name for _, capture in captures for name in capture.interfaces}):
            self._rule(base, nft.enters_by(name), nft.first_segment(), nft.goto(new))
        self._rule(new, nft.jump("never"))
        self._dispatch(new, captures, "interface", self._redirect)

    def _redirect_local(self, captures: Sequence[tuple[int, Capture]]) -> None:
        base, new = self._base("redirect_out", "output", "nat"), self._chain("redirect_out_new")
        self._rule(base, nft.mark(0, MARK_MASK, negate=True), nft.accept())
        self._rule(base, nft.leaves_by("lo"), nft.accept())
        self._rule(base, nft.first_segment(), nft.goto(new))
        self._rule(new, nft.jump("never"))
        self._dispatch(new, captures, "local", self._redirect)

    @staticmethod
    def _redirect(capture: Capture) -> Term:
        return nft.compose(nft.count(), nft.redirect(capture.port, capture.address))

    # -- tproxy --
    def _divert(self, captures: Sequence[tuple[int, Capture]]) -> None:
        base = self._base("tproxy_in", "prerouting", "filter")
        if any(inlet.ways for _, inlet in self.inlets):
            # The way back to the source is looked up with this mark where src_valid_mark is set, and is that of our
            # socket then; without it, a strict check of the reverse path would expect the packet from the device.
            ours = nft.reply(), nft.connection_mark(CONNECTION_OWN)
            self._rule(base, nft.mark(0, MARK_MASK), *ours, nft.set_mark(MARK_OWN, MARK_MASK), nft.accept())
        local = [(n, c) for n, c in captures if c.local]
        by_lo = [(n, c) for n, c in local if not c.device]
        if by_lo:
            returning = self._chain("tproxy_return")
            self._rule(base, nft.enters_by("lo"), nft.mark(MARK_RETURNING, MARK_MASK), nft.goto(returning))
            self._dispatch(returning, by_lo, "return", self._hand_over)
        for number, inlet in self.inlets:
            if inlet.tcp:
                self._rule(base, nft.enters_by(inlet.device), nft.goto(self._take_all(number, inlet)))
        self._rule(base, nft.mark(0, MARK_MASK, negate=True), nft.accept())
        entering = [(n, c) for n, c in captures if c.interfaces]
        if entering:
            by_protocol = self._divert_from_interfaces(entering)
            for name in sorted({name for _, capture in entering for name in capture.interfaces}):
                for protocol, chain in by_protocol.items():
                    self._rule(base, nft.enters_by(name), nft.protocol(_NUMBERS[protocol]), nft.goto(chain))
        for number, inlet in self.inlets:
            if inlet.ways and inlet.tcp:
                self._divert_forwarded(base, number, inlet)
        if local:
            self._divert_local(local)

    # -- inlets --
    def _take_all(self, number: int, inlet: Inlet) -> str:
        """Return the chain of what has come back in: it is handed over or dropped, for it would come again."""
        chain = self._chain(f"inlet_{number}")
        self._rule(chain, nft.mark(MARK_OWN, MARK_MASK), nft.drop())
        self._rule(chain, *_transparent())
        self._rule(chain, nft.address_type_in(_HERE), nft.drop())
        self._take(chain, inlet)
        self._rule(chain, nft.drop())
        return chain

    def _divert_forwarded(self, base: str, number: int, inlet: Inlet) -> None:
        """Take where it enters what would be forwarded into the device."""
        chain = self._chain(f"forwarded_{number}")
        self._rule(base, nft.enters_by("lo", negate=True), nft.routed_into(inlet.device), nft.goto(chain))
        self._rule(chain, *_transparent())
        self._rule(chain, nft.jump("never"))
        self._take(chain, inlet)

    def _take(self, chain: str, inlet: Inlet) -> None:
        """Hand over what begins a flow of TCP or belongs to a captured one, and all UDP."""
        diverted = nft.set_mark(MARK_DIVERTED, MARK_MASK)
        follow = nft.set_connection_mark(CONNECTION_CAPTURED)
        tcp = follow, diverted, nft.count(), nft.hand_over(inlet.tcp), nft.accept()
        self._rule(chain, nft.first_segment(), *tcp, comment=inlet.service)
        self._rule(chain, nft.protocol(nft.TCP), _known(), *tcp, comment=inlet.service)
        udp = diverted, nft.count(), nft.hand_over(inlet.udp), nft.accept()
        self._rule(chain, nft.protocol(nft.UDP), *udp, comment=inlet.service)

    def _keep_away(self) -> None:
        """Send past the devices what is never captured: replies to others, and TCP that is older than the start."""
        base, out = self._base("inlet_out", "output", "route"), self._chain("inlet_out_new")
        for _, inlet in self.inlets:
            if not inlet.tcp:  # user space sees no marks, so it cannot tell what is ours
                for peer in inlet.peers:
                    self._rule(base, nft.leaves_by(inlet.device), nft.destination_within(peer), nft.accept())
                self._rule(base, nft.leaves_by(inlet.device), nft.mark(MARK_OWN, MARK_MASK), nft.drop())
        self._rule(base, nft.mark(MARK_OWN, MARK_MASK), nft.set_connection_mark(CONNECTION_OWN), nft.accept())
        self._rule(base, nft.mark(0, MARK_MASK, negate=True), nft.accept())
        for _, inlet in self.inlets:
            if inlet.ways:
                self._rule(base, nft.leaves_by(inlet.device), nft.goto(out))
        past = nft.compose(nft.set_mark(MARK_OWN, MARK_MASK), nft.accept())
        self._rule(out, nft.reply(), past)
        self._rule(out, nft.first_segment(), nft.set_connection_mark(CONNECTION_CAPTURED), nft.accept())
        self._rule(out, nft.protocol(nft.TCP), _known(), nft.accept())
        self._rule(out, nft.protocol(nft.TCP), past)

    def _divert_from_interfaces(self, captures: Sequence[tuple[int, Capture]]) -> dict[str, str]:
        """Return for each protocol the chain that takes what came in by a captured interface."""
        chains = {}
        for protocol in ("tcp", "udp"):
            mine = [(n, c) for n, c in captures if c.protocol == protocol]
            if not mine:
                continue
            chain, new = self._chain(f"tproxy_in_{protocol}"), self._chain(f"tproxy_in_{protocol}_new")
            chains[protocol] = chain
            if protocol == "tcp":
                # The socket knows its connection even when conntrack does not (any more), and whatever a reload
                # has made of the conditions.
                self._rule(chain, *_transparent())
            self._rule(chain, nft.jump("never"))
            self._begin(chain, protocol, nft.goto(new))
            self._dispatch(new, mine, "interface", self._divert_and_hand_over)
        return chains

    def _divert_local(self, captures: Sequence[tuple[int, Capture]]) -> None:
        base = self._base("tproxy_out", "output", "route")
        self._rule(base, nft.mark(0, MARK_MASK, negate=True), nft.accept())
        self._rule(base, nft.leaves_by("lo"), nft.accept())
        for protocol in ("tcp", "udp"):
            mine = [(n, c) for n, c in captures if c.protocol == protocol]
            if not mine:
                continue
            chain, new = self._chain(f"tproxy_out_{protocol}"), self._chain(f"tproxy_out_{protocol}_new")
            self._rule(base, nft.protocol(_NUMBERS[protocol]), nft.goto(chain))
            self._rule(chain, nft.jump("never"))
            mark = nft.set_mark(MARK_RETURNING, MARK_MASK)
            self._begin(chain, protocol, nft.goto(new), known=nft.compose(mark, nft.accept()))
            self._dispatch(new, mine, "local", self._return)

    def _begin(self, chain: str, protocol: str, new: Term, known: Term | None = None) -> None:
        """Of TCP take what opens a connection and what belongs to a captured one, of UDP everything."""
        if protocol == "tcp":
            self._rule(chain, nft.first_segment(), new)
            self._rule(chain, nft.protocol(nft.TCP), nft.connection_mark(CONNECTION_CAPTURED), known or new)
        else:
            self._rule(chain, new)

    @staticmethod
    def _hand_over(capture: Capture) -> Term:
        return nft.compose(nft.hand_over(capture.port, capture.address), nft.accept())

    @staticmethod
    def _divert_and_hand_over(capture: Capture) -> Term:
        # Marked first: without a socket to hand over to, the packet ends at this host instead of going on uncaptured.
        parts = [nft.set_mark(MARK_DIVERTED, MARK_MASK), nft.count()]
        parts += [nft.hand_over(capture.port, capture.address), nft.accept()]
        return nft.compose(*_followed(capture), *parts)

    @staticmethod
    def _return(capture: Capture) -> Term:
        return nft.compose(*_followed(capture), nft.set_mark(MARK_RETURNING, MARK_MASK), nft.count(), nft.accept())


def _transparent() -> tuple[Term, ...]:
    """Return a rule for what belongs to a connection that a transparent socket has."""
    diverted = nft.set_mark(MARK_DIVERTED, MARK_MASK)
    return nft.protocol(nft.TCP), nft.transparent_connection(), diverted, nft.accept()


def _known() -> Term:
    return nft.connection_mark(CONNECTION_CAPTURED)


def _followed(capture: Capture) -> list[Term]:
    follows = capture.protocol == "tcp" or capture.around is not None
    return [nft.set_connection_mark(CONNECTION_CAPTURED)] if follows else []
