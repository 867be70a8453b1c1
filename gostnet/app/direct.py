"""Direct traffic stays in the kernel: what a service would send out directly is not captured in the first place.

Only where nobody could tell the difference: a service whose policies want to see every connection, or whose handler
looks into them, gets them all. What is compared with the bypass is what the handler would compare: an address and a
port. Names in a bypass decide nothing here, as they decide nothing about a captured connection that is not looked into,
unless the capture asks for it (`direct.names`): then they decide what `direct_names` lets go.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

from ..core.address import Endpoint
from ..core.errors import ConfigError, GostnetError, KernelError
from ..core.flow import Network
from ..core.log import Logger, quiet
from ..core.resources import MARK_MASK, Around, Capture, Key, PortForward, Ranges, Resource, names_set
from ..core.tasks import in_thread
from ..pipeline.chain import Chain, ChainGroup
from ..pipeline.chain import Router as ChainRouter
from ..pipeline.direct import Direct
from ..pipeline.hop import Hop
from ..pipeline.router import ServiceRouter
from ..pipeline.service import Service
from ..policies.bounds import EVERYTHING, NOTHING, Bounds, bounds_of, lists_of
from ..policies.bypass import PatternBypass, Patterns
from ..policies.networks import V4, Intervals
from .direct_names import Admits, DirectNames, Names, Target, direct_names
from .forwards import forward_of
from .kernel import Kernel, Wanted

if TYPE_CHECKING:
    from ..kernel.plan import Step

SETTLE: Final = 0.2
"""Seconds that changes have to settle: several lists are often read at the same time."""

SNIFFS: Final = "sniffing looks into every connection"

PORT_GROUPS: Final = 32
"""How many different combinations of ports the kernel is asked to compare; what is beyond stays in user space."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was decided about a capture: the destinations, None for none; and the reason for what is not there.

    target    of the addresses of names that go directly
    """

    around: Around | None = None
    reason: str = ""
    target: Target | None = None


@dataclass(slots=True)
class DirectWays:
    """Decides for the services of one configuration, and remembers what it made of lists that are still the same."""

    services: Mapping[str, Service]
    names: DirectNames = field(default_factory=DirectNames)
    """What is kept from one configuration to the next."""
    log: Logger = field(default_factory=quiet)
    verdicts: dict[tuple[str, str], Verdict] = field(default_factory=dict)
    """The last ones, by service and network."""
    forwards: list[PortForward] = field(default_factory=list)
    """The last ones."""
    _known: dict[tuple[str, str], tuple[Sequence[Patterns], Bounds]] = field(default_factory=dict)
    _turn: Lock = field(default_factory=Lock)
    _gave_way: str = ""
    """Why the kernel has not taken the last sets, "" if it has."""

    def apply(self, kernel: Kernel, wanted: Wanted, *, yields: bool = False) -> list[Step]:
        """Make the kernel hold `wanted`, its captures knowing what to go around. Raise as that and `added_to` do.

        Where the kernel does not take what they go around, they go around nothing, unless one of them demands it;
        with `yields` even then.

        For a thread; who comes second sees the lists as they are when it is its turn.
        """
        with self._turn:
            made = self.added_to(wanted)
            targets = [verdict.target for verdict in self.verdicts.values() if verdict.target is not None]
            if targets and not isinstance(kernel, Admits):
                raise _no_names(targets[0].service, "with workers, another process holds the sets of addresses")
            try:
                steps = self.names.change(kernel, targets, self.log, lambda: kernel.apply(made))
            except KernelError as exc:
                steps = self._apply_without(kernel, made, exc, yields)
                targets = []
            else:
                self._gave_way = ""
            for handler in self._answering():
                handler.answered = self.names.answered if targets else None
            return steps

    def _apply_without(self, kernel: Kernel, made: Wanted, exc: KernelError, yields: bool) -> list[Step]:
        """Have captures go around nothing; the daemon gets it all. Raise `exc` if that is no better, or not wanted."""
        around = [item for items in made.values() for item in items if isinstance(item, Capture) and item.around]
        if not around or (not yields and any(item.direct == "kernel" for item in around)):
            raise exc
        bare = {
            netns: [replace(item, around=None) if isinstance(item, Capture) else item for item in items]
            for netns, items in made.items()
        }
        try:
            steps = self.names.change(kernel, (), self.log, lambda: kernel.apply(bare))
        except KernelError:
            raise exc from None
        for item in around:
            self.verdicts[item.service, item.protocol] = Verdict(reason=f"the kernel does not take the sets ({exc})")
        if str(exc) != self._gave_way:
            self._gave_way = str(exc)
            self.log.warn(f"engine kernel gives way to user: direct traffic: {exc}")
        return steps

    def before(self, kernel: Kernel) -> Kernel:
        """Return what holds resources as `apply` does while the daemon runs: it yields."""
        return _Before(self, kernel)

    def added_to(self, wanted: Wanted) -> dict[str, Sequence[Resource]]:
        """Return `wanted` with the captures knowing what to go around.

        Takes a second for a long list, so call it in a thread. Raise ConfigError where a capture demands more than
        can be.
        """
        made: dict[str, list[Resource]] = {
            netns: [self._of(item, netns) for item in resources] for netns, resources in wanted.items()
        }
        self.forwards = []
        for service in self.services.values():
            forward = forward_of(service, obstacle(service))
            if forward is not None:
                made.setdefault(service.listener.netns, []).append(forward)
                self.forwards.append(forward)
        return dict(made)

    def lists(self) -> list[PatternBypass]:
        """Return the lists that the decisions depend on."""
        found = {id(each): each for service in self.services.values() for each in _lists(service)}
        return list(found.values())

    def _of(self, item: Resource, netns: str) -> Resource:
        if not isinstance(item, Capture) or item.service not in self.services:
            return item
        service = self.services[item.service]
        verdict = self._decide(item, service)
        if item.names:
            verdict = self._with_names(item, service, netns, verdict)
        self.verdicts[item.service, item.protocol] = verdict
        return replace(item, around=verdict.around)

    def _answering(self) -> list[Any]:
        """Return the handlers that tell what names are answered with."""
        return [each.handler for each in self.services.values() if hasattr(each.handler, "answered")]

    def _with_names(self, capture: Capture, service: Service, netns: str, verdict: Verdict) -> Verdict:
        """Add to what was decided by address what is decided by name. Raise ConfigError where nothing can be."""
        reason = next((each for each in obstacles(service) if each != SNIFFS), "")
        router = service.egress
        names: Names | None = None
        if hasattr(service.handler, "targets"):
            reason = "its handler sends on to targets of its own"
        elif not reason and isinstance(router, ServiceRouter):
            if router.chains is None:
                reason = "everything goes directly, as there is no chain"
            elif router.bypass is not None:
                reason = "the service's own bypass may refuse what a name's address is let go for"
            elif not self._answering():
                reason = "no service of the handler dns answers names"
            elif not capture.local and capture.direct != "kernel":
                reason = "what enters by interfaces would have to be forwarded: set direct: kernel as well"
            else:
                names = direct_names(router.chains, capture.protocol)
                reason = "no list of the first hop's bypass has names that go directly (a whitelist has others)"
        if names is None:
            raise _no_names(service.name, reason)
        proxied = (
            tuple(each for each in _lists_of(router) if each.whitelist) if isinstance(router, ServiceRouter) else ()
        )
        target = Target(service.name, netns, names, proxied)
        around = verdict.around or Around(forwarded=capture.direct == "kernel", local=True)
        return replace(verdict, around=replace(around, names=target.word), target=target)

    def _decide(self, capture: Capture, service: Service) -> Verdict:
        if capture.direct == "user":
            return Verdict(reason="the configuration says so")
        reason = obstacle(service)
        if reason == SNIFFS and capture.names:
            return Verdict(reason=f"{reason}: addresses are decided there")
        if hasattr(service.handler, "targets"):
            reason = "its handler sends on to targets of its own"
        if reason:
            if capture.direct == "kernel":
                raise ConfigError(
                    f"service {service.name}: listener.metadata.direct",
                    f"direct traffic cannot stay in the kernel: {reason}",
                    code="capture.direct",
                )
            return Verdict(reason=reason)
        router = service.egress
        if not isinstance(router, ServiceRouter) or router.chains is None:
            return Verdict()  # everything is direct, and nobody has asked for anything else
        forwarded = capture.direct == "kernel"
        if capture.interfaces and not forwarded:
            reason = f"what enters by {', '.join(capture.interfaces)} would have to be forwarded (direct: kernel does)"
            if not capture.local:
                return Verdict(reason=reason)
        bounds = self._bounds(service.name, capture.protocol, router)
        around = Around(
            _packed(bounds.certain),
            tuple((ports, _packed(ranges)) for ports, ranges in list(bounds.ports.items())[:PORT_GROUPS]),
            forwarded=forwarded,
            local=True,
        )
        return Verdict(around, reason)

    def _bounds(self, name: str, network: Network, router: ServiceRouter) -> Bounds:
        assert router.chains is not None
        patterns = [each.patterns for each in _lists_of(router)]
        known = self._known.get((name, network))
        if known is not None and [id(one) for one in known[0]] == [id(one) for one in patterns]:
            return known[1]
        bounds = _direct(router.chains, network)
        if router.bypass is not None:  # what the service refuses is nobody's
            bounds = bounds & ~bounds_of(router.bypass, network)
        self._known[name, network] = patterns, bounds
        return bounds


class _Before:
    """A kernel that is told what captures go around."""

    def __init__(self, ways: DirectWays, kernel: Kernel) -> None:
        self._ways = ways
        self._kernel = kernel
        self.recover = kernel.recover
        self.claim = kernel.claim
        self.rollback = kernel.rollback

    @property
    def left_out(self) -> dict[Key, KernelError]:
        return self._kernel.left_out

    def apply(self, wanted: Wanted) -> list[Step]:
        return self._ways.apply(self._kernel, wanted, yields=True)


def obstacle(service: Service) -> str:
    """Return why every connection has to come to the service, "" if none has to that goes out directly."""
    return next(obstacles(service), "")


def obstacles(service: Service) -> Iterator[str]:
    """Yield all that is in the way of connections that do not come to the service."""
    policies, router, handler = service.policies, service.egress, service.handler
    sniffs = getattr(handler, "sniffs", None)
    if sniffs is None:
        yield "its handler does more than to send on"
        return
    if not isinstance(router, ServiceRouter) or not isinstance(router.direct, Direct):
        yield "its way out is not this host's"
        return
    options = router.direct.options
    for found, what in (
        (sniffs, SNIFFS),
        (policies.admissions, "an admission decides about clients"),
        (policies.connections, "climiter counts connections"),
        (policies.requests, "rlimiter counts connections"),
        (policies.quotas, "quotas count bytes"),
        (policies.books, "connections are counted or recorded (recorders, observer or enableStats)"),
        (router.traffic, "a limiter bounds the bandwidth"),
        (router.hosts, "hosts may have another address for a destination"),
        (service.listener.preface, "clients announce themselves by the PROXY protocol"),
        (options.interface, f"outgoing connections leave by {options.interface}"),
        (options.mark & ~MARK_MASK, f"outgoing packets have the mark {options.mark & ~MARK_MASK:#x}"),
        (options.netns != service.listener.netns, "outgoing connections leave from another network namespace"),
    ):
        if found:
            yield what


def _no_names(service: str, reason: str) -> ConfigError:
    return ConfigError(
        f"service {service}: listener.metadata.direct.names",
        f"names cannot be decided in the kernel: {reason}",
        code="capture.direct",
    )


def _direct(router: ChainRouter, network: Network) -> Bounds:
    """Return which destinations leave a chain before its first hop."""
    match router:
        case Chain():
            return _around(router.hops[0], network) if router.hops else EVERYTHING
        case ChainGroup():
            if not router.entries or all(entry.matcher is not None for entry in router.entries):
                return NOTHING  # a flow that no chain is for fails
            return reduce(Bounds.__and__, (_direct(entry.chain, network) for entry in router.entries))
        case _:
            return NOTHING


def _around(hop: Hop, network: Network) -> Bounds:
    found = bounds_of(hop.bypass, network) if hop.bypass is not None else NOTHING
    bypasses = [node.bypass for node in hop.nodes]
    if any(bypass is None for bypass in bypasses) or hop.selective:
        return found
    return found | reduce(Bounds.__and__, (bounds_of(each, network) for each in bypasses if each), EVERYTHING)


def _lists(service: Service) -> Iterator[PatternBypass]:
    if isinstance(service.egress, ServiceRouter):
        yield from _lists_of(service.egress)


def _lists_of(router: ServiceRouter) -> Iterator[PatternBypass]:
    yield from lists_of(router.bypass)
    chains: list[Chain] = []
    if isinstance(router.chains, Chain):
        chains.append(router.chains)
    elif isinstance(router.chains, ChainGroup):
        chains += [entry.chain for entry in router.chains.entries]
    for chain in chains:
        for hop in chain.hops[:1]:
            yield from lists_of(hop.bypass)
            for node in hop.nodes:
                yield from lists_of(node.bypass)


def _packed(ranges: Intervals) -> Ranges:
    v4, v6 = bytearray(), bytearray()
    pair = struct.Struct("!II").pack
    for first, last in ranges:
        if first < V4:
            v6 += first.to_bytes(16, "big") + min(last, V4 - 1).to_bytes(16, "big")
        if last >= V4:
            v4 += pair(max(first, V4) - V4, last - V4)
    return Ranges(bytes(v4), bytes(v6))


# ---- what is told -------------------------------------------------------------------------------
def notes(ways: DirectWays) -> list[str]:
    """Return a sentence for each capture about which there is something to say."""
    found = []
    for (name, network), verdict in ways.verdicts.items():
        around = verdict.around
        parts = []
        if around is not None:
            count = len(around.ranges) + sum(len(ranges) for _, ranges in around.ports)
            if count or verdict.target is None:
                parts.append(f"{count} ranges of addresses stay in the kernel")
        if verdict.target is not None:
            sets = " and ".join(names_set(version, verdict.target.word) for version in (4, 6))
            parts.append(f"addresses that names are answered with come into the sets {sets} for as long as they hold")
        if verdict.reason:
            parts.append(f"user space decides: {verdict.reason}" if around is None else verdict.reason)
        if parts:
            found.append(f"service {name}: direct {network} traffic: {'; '.join(parts)}")
    forwards = (
        f"{of.service}: the kernel forwards {of.protocol} to {Endpoint(of.target, of.to)}" for of in ways.forwards
    )
    return [*found, *(f"service {text}" for text in forwards)]


class DirectKeeper:
    """Brings the kernel up to date when a bypass has been read again."""

    def __init__(self, kernel: Kernel, log: Logger) -> None:
        self._kernel = kernel
        self._log = log
        self._told: list[str] = []

    async def run(self, ways: DirectWays, wanted: Callable[[], Wanted]) -> None:
        """Keep what `wanted()` and the lists say in the kernel until cancelled; return where no list is asked."""
        self._tell(ways)
        lists = ways.lists()
        if not lists or all(verdict.around is None for verdict in ways.verdicts.values()):
            return
        changed = asyncio.Event()
        with ExitStack() as stack:
            for each in lists:
                each.changed.append(changed.set)
                stack.callback(each.changed.remove, changed.set)
            changed.set()  # something may have happened since they were applied
            while True:
                await changed.wait()
                changed.clear()
                await asyncio.sleep(SETTLE)
                try:
                    await in_thread(partial(ways.apply, self._kernel, wanted(), yields=True))
                except GostnetError as exc:
                    self._log.error(f"direct traffic: {exc}; what was there stays until a list changes again")
                    continue
                self._tell(ways)

    def _tell(self, ways: DirectWays) -> None:
        for note in notes(ways):
            if note not in self._told:
                self._log.debug(note)
        self._told = notes(ways)
