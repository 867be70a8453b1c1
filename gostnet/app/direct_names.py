"""Names that go out directly: what they are answered with stays in the kernel for as long as the answer holds.

A captured connection has an address and no name. But whoever asks our own name service first tells the name, and the
addresses of the answer can be let go before the client has them: into sets with a timeout, which stand beside the
networks that go directly (`kernel.capture`). Whatever is removed from a list, or changed by a reload, has other sets;
those of before go with all they hold, and what still is direct is put into the new ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from socket import AF_INET, AF_INET6, inet_ntop
from threading import Lock
from typing import TYPE_CHECKING, Final, Protocol, TypeVar, runtime_checkable

from ..core.address import Endpoint
from ..core.contracts import Bypass
from ..core.errors import KernelError
from ..core.flow import Network
from ..core.log import Logger, quiet
from ..core.resources import NAMED_SIZE, NAMED_TIMEOUT, names_set
from ..core.sockets import is_own_address
from ..core.tasks import in_thread
from ..pipeline.chain import Chain, ChainGroup
from ..pipeline.chain import Router as ChainRouter
from ..pipeline.hop import Hop
from ..policies.bypass import BypassGroup, PatternBypass
from ..policies.networks import V4, Intervals, parse_network

if TYPE_CHECKING:
    from ..kernel.nft import Additions

T = TypeVar("T")

LEAST: Final = 30.0
"""Seconds that an address stays at least: a client that has just been answered needs a moment to connect."""

SLACK: Final = 15.0
"""Seconds by which an address may go before its answer does; so often is the kernel told of it again, and no more."""

MOST: Final = NAMED_SIZE // 2
"""Pairs of a name and an address that are held at a time; what is beyond is left to the daemon."""

NOBODYS: Final = Intervals(
    pair
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.168.0.0/16", "224.0.0.0/3", "::/80", "fc00::/7", "fe80::/10", "ff00::/8"),
    )
    if (pair := parse_network(text)) is not None
)
"""Private, loopback, link-local and multicast addresses: no answer from outside may open a way to them."""


# ---- which names --------------------------------------------------------------------------------
class Names(Protocol):
    """A set of names that goes out directly, at any port."""

    @property
    def key(self) -> str:
        """What stands for its content of this moment; takes a while for a long list that is new."""

    def __contains__(self, name: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class _Listed:
    """The names that match the patterns for any port of a list, as it is at the moment; none of a whitelist."""

    bypass: PatternBypass

    @property
    def key(self) -> str:
        return self.bypass.patterns.digest

    def __contains__(self, name: str) -> bool:
        return self.bypass.patterns.matches(Endpoint(name, 0))


@dataclass(frozen=True, slots=True)
class _Any:
    parts: tuple[Names, ...]

    @property
    def key(self) -> str:
        return f"({'|'.join(part.key for part in self.parts)})"

    def __contains__(self, name: str) -> bool:
        return any(name in part for part in self.parts)


@dataclass(frozen=True, slots=True)
class _All:
    parts: tuple[Names, ...]

    @property
    def key(self) -> str:
        return f"({'&'.join(part.key for part in self.parts)})"

    def __contains__(self, name: str) -> bool:
        return bool(self.parts) and all(name in part for part in self.parts)


_NONE: Final = _Any(())


def direct_names(router: ChainRouter, network: Network) -> Names | None:
    """Return the names that leave a chain before its first hop, None where no list can have any."""
    found = _of_router(router, network)
    return None if found == _NONE else found


def _of_router(router: ChainRouter, network: Network) -> Names:
    match router:
        case Chain():
            return _of_hop(router.hops[0], network) if router.hops else _NONE
        case ChainGroup():
            if not router.entries or all(entry.matcher is not None for entry in router.entries):
                return _NONE
            return _both([_of_router(entry.chain, network) for entry in router.entries])
        case _:
            return _NONE


def _of_hop(hop: Hop, network: Network) -> Names:
    found = [_of_bypass(hop.bypass, network)]
    if hop.nodes and not hop.selective:
        found.append(_both([_of_bypass(node.bypass, network) for node in hop.nodes]))
    return _either(found)


def _of_bypass(bypass: Bypass | None, network: Network) -> Names:
    match bypass:
        case PatternBypass():
            fits = not bypass.whitelist and bypass.network in ("", network)
            return _Listed(bypass) if fits else _NONE
        case BypassGroup():
            return _either([_of_bypass(member, network) for member in bypass.members])
        case _:
            return _NONE


def _either(parts: Iterable[Names]) -> Names:
    some = tuple(part for part in parts if part != _NONE)
    return some[0] if len(some) == 1 else _Any(some)


def _both(parts: Sequence[Names]) -> Names:
    if any(part == _NONE for part in parts):
        return _NONE
    return parts[0] if len(parts) == 1 else _All(tuple(parts))


# ---- what they are answered with ----------------------------------------------------------------
@runtime_checkable
class Admits(Protocol):
    """A kernel that takes addresses."""

    def admit(self, netns: str, additions: Additions) -> None:
        """Have addresses be in sets of a namespace for a while, all or none. Raise KernelError."""


@dataclass(frozen=True, slots=True)
class Target:
    """A pair of sets, one for each IP version.

    names     what belongs there
    proxied   lists of what goes by the proxy, whatever name it has: whitelists
    """

    service: str
    netns: str
    names: Names
    proxied: tuple[PatternBypass, ...] = ()
    word: str = field(init=False)

    def __post_init__(self) -> None:
        # Captures that decide alike have one pair.
        parts = [self.names.key, *(of.patterns.digest for of in self.proxied)]
        object.__setattr__(self, "word", sha256(repr(parts).encode()).hexdigest()[:12])

    def takes(self, name: str, address: bytes) -> bool:
        """Tell whether an address that a name was answered with goes directly."""
        return name in self.names and not any(_lists(of, _number(address)) for of in self.proxied)


class DirectNames:
    """Puts addresses into the sets of the present targets, and knows which are there."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._targets: Sequence[Target] = ()
        self._kernel: Admits | None = None
        self._log: Logger = quiet()
        self._known: dict[bytes, dict[str, float]] = {}
        """By address: the names that were answered with it, and when it is over."""
        self._count = 0
        self._turn = Lock()
        self._full = False
        self.given_up = ""
        """Why the kernel gets no more addresses, "" as long as it does."""

    def __len__(self) -> int:
        """Pairs of an address and a name that are known; some of them may be over."""
        return self._count

    def change(self, kernel: object, targets: Sequence[Target], log: Logger, apply: Callable[[], T]) -> T:
        """Have `apply` make the sets of `targets`, and put into them what is known and belongs there; for a thread.

        Raise what `apply` does, and have changed nothing then.
        """
        with self._turn:
            made = apply()
            self._kernel = kernel if isinstance(kernel, Admits) else None
            self._targets, self._log = targets, log
            self.given_up, self._full = "", False
            now = self._clock()
            self._forget(now)
            self._admit(self._known, now)
            return made

    async def answered(self, name: str, addresses: Sequence[bytes], ttl: int) -> None:
        """Let the addresses of an answer go before the client has it, if the name is one that does.

        Nothing is raised: who fails here leaves the traffic to the daemon.
        """
        if self.given_up or not any(name in target.names for target in self._targets):
            return
        until = self._clock() + min(max(float(ttl), LEAST), NAMED_TIMEOUT)
        wanted = [
            address
            for address in addresses
            if self._known.get(address, {}).get(name, 0.0) < until - SLACK and not _is_nobodys(address)
        ]
        if wanted:
            await in_thread(self._take, name, wanted, until)

    def _take(self, name: str, addresses: Sequence[bytes], until: float) -> None:
        with self._turn:
            now = self._clock()
            try:
                places = {target.netns for target in self._targets if name in target.names}
                wanted = [a for a in addresses if not any(is_own_address(_shown(a), place) for place in places)]
            except KernelError as exc:  # no descriptor is left, or the namespace is gone
                self._give_up(exc)
                return
            if self.given_up or not wanted or not self._has_room(len(wanted), now):
                return
            merged = {a: {**self._known.get(a, {}), name: until} for a in wanted}
            if self._admit(merged, now):
                self._count += sum(name not in self._known.get(a, {}) for a in wanted)
                self._known.update(merged)
                shown = ", ".join(map(_shown, wanted))
                self._log.debug(f"{name}: {shown}: directly, by the kernel, for {until - now:.0f}s")

    def _has_room(self, count: int, now: float) -> bool:
        if self._count + count > MOST:
            self._forget(now)
        if self._count + count <= MOST:
            return True
        if not self._full:
            self._full = True
            self._log.warn(f"direct.names: {MOST} addresses are in the kernel; what is beyond goes through the daemon")
        return False

    def _forget(self, now: float) -> None:
        """Forget what is over."""
        left = {a: {n: until for n, until in names.items() if until > now} for a, names in self._known.items()}
        self._known = {address: names for address, names in left.items() if names}
        self._count = sum(map(len, self._known.values()))

    def _admit(self, wanted: Mapping[bytes, Mapping[str, float]], now: float) -> bool:
        """Put what belongs there into the sets, in one transaction for each namespace; give up where that fails.

        An address stays as long as the last of its names in the set holds.
        """
        by_place: dict[str, dict[str, list[tuple[bytes, float]]]] = {}
        for target in {(target.netns, target.word): target for target in self._targets}.values():
            for address, names in wanted.items():
                until = max((until for name, until in names.items() if target.takes(name, address)), default=0.0)
                if until > now:
                    set_name = names_set(4 if len(address) == 4 else 6, target.word)
                    by_place.setdefault(target.netns, {}).setdefault(set_name, []).append((address, until - now))
        for netns, additions in by_place.items():
            try:
                assert self._kernel is not None
                self._kernel.admit(netns, additions)
            except KernelError as exc:
                self._give_up(exc)
                return False
        return bool(by_place)

    def _give_up(self, exc: KernelError) -> None:
        if not self.given_up:
            self.given_up = str(exc)
            self._log.warn(f"engine kernel gives way to user: direct.names: {exc}")


def _number(address: bytes) -> int:
    value = int.from_bytes(address, "big")
    return V4 | value if len(address) == 4 else value


def _is_nobodys(address: bytes) -> bool:
    return _number(address) in NOBODYS


def _lists(of: PatternBypass, number: int) -> bool:
    """Tell whether a list has an address at any port, or might have it as a text."""
    patterns = of.patterns
    return patterns.textual or number in patterns.ranges or number in patterns.addresses


def _shown(address: bytes) -> str:
    return inet_ntop(AF_INET if len(address) == 4 else AF_INET6, address)
