"""The verb `doctor`: what this host can do, what the configuration needs of it, and what is in the way."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from ..config.argv import Invocation
from ..config.load import Loader
from ..config.names import listen_network
from ..core.errors import GostnetError
from ..core.netns import inside
from ..core.resources import Capture, Inlet, Masquerade, PortForward, Resource
from ..kernel import sysctl
from ..kernel.capabilities import Finding, examine, first_open_port
from ..kernel.forwarding import closed_chains
from ..kernel.recovery import leftovers
from ..pipeline.service import Service
from .check_workers import as_lines
from .checking import passes
from .direct import DirectWays
from .kernel import wanted_by
from .preview import preview

Needs = dict[str, list[str]]
"""The services that cannot do without a capability, by its name."""

_CAPTURE: Final = ("net-admin", "pidfd", "nft-owner", "nft-sets", "nft-conntrack", "nft-fib")
_TPROXY: Final = ("transparent", "nft-tproxy", "policy-routing")


@dataclass(slots=True)
class Report:
    """What has been found.

    needs         by capability; empty without a configuration
    leftovers     of dead instances
    hindrances    settings of the host that are in the configuration's way
    workers       who of several serves what
    """

    findings: list[Finding]
    needs: Needs = field(default_factory=dict)
    leftovers: list[str] = field(default_factory=list)
    hindrances: list[str] = field(default_factory=list)
    workers: list[str] = field(default_factory=list)
    configured: bool = False

    @property
    def missing(self) -> list[Finding]:
        """What the configuration needs and is not known to be there."""
        return [
            finding for finding in self.findings if finding.state != "yes" and finding.capability.name in self.needs
        ]

    @property
    def healthy(self) -> bool:
        """Whether the configuration has what it needs, and, without one, whether nothing is broken."""
        return not self.missing if self.configured else not self.leftovers


def doctor(invocation: Invocation) -> int:
    """Print what this host can do; return 0 unless something that is needed is missing, or something is broken."""
    report = Report([], configured=bool(invocation.configs or invocation.services))
    if report.configured:
        loaded = Loader(invocation).load()
        if not passes(loaded, invocation):
            return 1
        try:
            assembly, late = preview(loaded, invocation)
            report.needs = needs_of(assembly.services)
            report.workers = list(as_lines(loaded.config))
            report.hindrances = [*hindrances(assembly.services), *late]
        except GostnetError as exc:
            print(f"gostnet: error: {exc} [{exc.code}]", file=sys.stderr)
            return 1
    report.findings = examine()
    try:
        report.leftovers = leftovers()
    except GostnetError:
        pass  # who may not look at the rules can have left none
    print(as_json(report) if invocation.json else as_text(report))
    return 0 if report.healthy else 1


# ---- what a configuration needs -----------------------------------------------------------------
def needs_of(services: Mapping[str, Service]) -> Needs:
    """Return what services need, as far as nothing else can take its place. Raise ConfigError."""
    needs: Needs = {}
    wanted = DirectWays(services).added_to(wanted_by(services.values()))
    resources: dict[str, list[Resource]] = {}
    for items in wanted.values():
        for item in items:
            resources.setdefault(getattr(item, "service", ""), []).append(item)
    for name, service in services.items():
        for capability in dict.fromkeys(_needs(service, resources.get(name, []))):
            needs.setdefault(capability, []).append(name)
    return needs


def _needs(service: Service, resources: Iterable[Resource]) -> Iterator[str]:
    kind = service.listener.name
    if service.listener.netns:
        yield "namespaces"
    if kind in ("tun", "tungo"):
        yield from ("net-admin", "pidfd", "tun")
    if kind == "tap":
        yield from ("net-admin", "pidfd", "tap")
    if kind in ("redu", "tungo"):
        yield from ("raw-sockets", "transparent")
    for item in resources:
        match item:
            case Capture():
                yield from _CAPTURE
                yield from _TPROXY if item.method == "tproxy" else ("nft-redirect",)
                if item.method == "tproxy" and item.protocol == "tcp":
                    yield "nft-socket"
                if item.around is not None and item.around.forwarded:
                    yield "nft-masquerade"
                if item.around is not None and item.around.names:
                    yield "nft-timeouts"
            case Inlet():
                yield from (*_CAPTURE, *_TPROXY, "nft-socket")
            case Masquerade():
                yield from (*_CAPTURE, "nft-masquerade", "nft-clamp")
            case PortForward():
                yield from (*_CAPTURE, "nft-dnat", "nft-masquerade")
            case _:
                pass
    address = service.listener.source.address
    if listen_network(kind) in ("tcp", "udp") and 0 < address.port < first_open_port():
        yield "low-ports"
    host = address.host
    if ":" in host and host != "::":
        yield "ipv6"


def hindrances(services: Mapping[str, Service]) -> Iterator[str]:
    """Yield settings of the host that are in the way of services, each with what is to be done."""
    for name, service in services.items():
        with inside(service.listener.netns or None):
            yield from _hindrances(name, service)


def _hindrances(name: str, service: Service) -> Iterator[str]:
    kind = service.listener.name
    resources = service.listener.source.resources()
    forwarded = _forwarded(service, resources)
    if forwarded:
        for chain in closed_chains():
            yield (
                f"service {name}: {forwarded} is forwarded by this host, and {chain.words} drops what none of its rules"
                f" accepts; accept it there, and what comes back"
            )
    captures = [item for item in resources if isinstance(item, Capture)]
    if captures and sysctl.read("net.ipv6.conf.lo.disable_ipv6") == "1":
        yield f"service {name}: net.ipv6.conf.lo.disable_ipv6 is 1: captured IPv6 is dropped; set it to 0"
    for interface in dict.fromkeys(each for item in captures for each in item.interfaces):
        if sysctl.read(f"net.ipv4.conf.{interface.replace('.', '/')}.forwarding") is None:
            yield f"service {name}: there is no interface {interface!r} yet; it is captured when it appears"
    if kind in ("tun", "tap") and not any(isinstance(item, Masquerade) for item in resources):
        if sysctl.read("net.ipv4.ip_forward") == "0":
            yield f"service {name}: net.ipv4.ip_forward is 0: peers reach this host only; set it to 1 or masquerade"
        if sysctl.read("net.ipv4.conf.all.rp_filter") == "1":
            yield (
                f"service {name}: net.ipv4.conf.all.rp_filter is 1: packets of networks that are not routed into"
                " the device are dropped; set it to 2, or route them into it"
            )


def _forwarded(service: Service, resources: Iterable[Resource]) -> str:
    """Return what of a service passes through this host without ending here, "" for nothing."""
    for item in resources:
        if isinstance(item, Masquerade):
            return f"what peers send to other networks (it comes by {item.device or 'the device'})"
        if isinstance(item, Capture) and item.direct == "kernel" and item.interfaces:
            return f"direct traffic that enters by {', '.join(item.interfaces)}"
    if getattr(service.handler, "engine", "user") == "kernel":
        return f"what comes to port {service.listener.source.address.port}"
    return ""


# ---- what is printed ----------------------------------------------------------------------------
def as_text(report: Report) -> str:
    """Return a line for each capability, then what else was found."""
    words = {"yes": "yes", "no": "no ", "unknown": "?  "}
    width = max(len(finding.capability.name) for finding in report.findings)
    lines = []
    for finding in report.findings:
        of = finding.capability
        needed = f" [needed by {', '.join(report.needs[of.name])}]" if of.name in report.needs else ""
        line = f"{words[finding.state]}  {of.name:{width}}  {of.uses}{needed}"
        if finding.state == "yes":
            lines.append(line + (f" ({finding.detail})" if finding.detail else ""))
        else:
            lines.append(f"{line}: {finding.detail}; without it: {of.without}; to get it: {of.get}")
    lines += [f"left by a dead instance: {text} (gostnet rollback removes it)" for text in report.leftovers]
    lines += report.hindrances
    lines += report.workers
    if report.missing:
        lines.append(f"missing for this configuration: {', '.join(each.capability.name for each in report.missing)}")
    elif report.configured:
        lines.append("this configuration has what it needs")
    return "\n".join(lines)


def as_json(report: Report) -> str:
    """Return the same for programs."""
    data = {
        "ok": report.healthy,
        "capabilities": [
            {
                "name": finding.capability.name,
                "state": finding.state,
                "detail": finding.detail,
                "uses": finding.capability.uses,
                "without": finding.capability.without,
                "get": finding.capability.get,
                "neededBy": report.needs.get(finding.capability.name, []),
            }
            for finding in report.findings
        ],
        "leftovers": report.leftovers,
        "hindrances": report.hindrances,
        "workers": report.workers,
    }
    return json.dumps(data, indent=2, ensure_ascii=False)
