"""The listener `tun`: a TUN device that the kernel routes packets into, handed out as one connection.

What it has in common with other devices is in `ingress.device`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..config.metadata import KERNEL_ROUTER
from ..core.address import Endpoint
from ..core.contracts import Router
from ..core.errors import ConfigError
from ..core.options import CommaList, opt
from ..core.packets import Medium
from ..core.registry import register
from ..core.resources import Masquerade, Resource
from ..pipeline.transport import Listener, ListenerContext
from .device import DEFAULT_MTU, DevicePlan, DeviceSource, addressing, problems_of, set_name_servers, setup_of


@dataclass(frozen=True, slots=True, kw_only=True)
class TunOptions:
    """Options of the listener `tun` (transports 10.1)."""

    name: str = opt(
        "", "Name of the device; the kernel chooses one (tun0, tun1, ...) by default.", aliases=("tun.name",)
    )
    net: CommaList = opt([], "Addresses of the device with their prefix lengths, IPv4 and IPv6.", aliases=("tun.net",))
    mtu: int = opt(DEFAULT_MTU, "MTU of the device, bytes.", aliases=("tun.mtu",))
    peer: str = opt("", "Accepted for compatibility: GOST uses it on macOS only.", aliases=("tun.peer",))
    gw: str = opt("", "Gateway of the routes that name none.", aliases=("tun.gw",))
    route: CommaList = opt([], "Networks that are routed into the device, by way of `gw`.", aliases=("tun.route",))
    routes: CommaList = opt(
        [], "Networks that are routed into the device, each with its gateway behind a blank.", aliases=("tun.routes",)
    )
    router: str = opt(
        "",
        "Name of a router whose routes choose among peers; `kernel` is the kernel's routing, unless one has that name.",
        aliases=("tun.router",),
    )
    dns: CommaList = opt([], "Name servers of the device, for systemd-resolved.", aliases=("tun.dns",))
    guid: str = opt("", "Accepted for compatibility: GOST uses it on Windows only.", aliases=("tun.guid",))
    masquerade: bool = opt(
        False,
        "Forward what peers send to other networks, with this host's address as its source.",
        aliases=("tun.masquerade",),
    )
    backend: str = opt(
        "ioctl",
        "What opens the device: gostnet itself, or python-pytun.",
        key="tun.backend",
        choices=("ioctl", "pytun"),
    )

    def validate(self) -> Iterator[tuple[str, str]]:
        """Yield what cannot be read, before anything is opened."""
        return problems_of(self.name, self.mtu, self.net, self.gw, self.route, self.routes)


def plan_of(options: TunOptions, context: ListenerContext) -> DevicePlan:
    """Return what the options make of a device. Raise ConfigError."""
    path = f"{context.path}.metadata"
    setup = setup_of(options.net, options.gw, options.route, options.routes, path, "tun")
    if context.forwards and not setup.addresses:
        # GOST: the client gives up at once, since it would have nothing to register.
        raise ConfigError(f"{path}.net", "a client needs at least one address of its own", code="tun.net")
    if options.masquerade and not setup.addresses:
        raise ConfigError(f"{path}.masquerade", "needs `net`: its networks are what is masqueraded", code="tun.net")
    router: Router | Literal["kernel"] | None = context.router(options.router) if options.router else None
    if router is None and options.router == KERNEL_ROUTER:
        router = "kernel"

    def resources(name: str) -> list[Resource]:
        found = addressing(name, setup)
        if options.masquerade:
            networks = dict.fromkeys(str(address.network) for address in setup.addresses)
            found.append(Masquerade(context.service, name, tuple(networks)))
        return found

    async def furnish(name: str) -> None:
        await set_name_servers(name, options.dns, context.log)

    return DevicePlan(
        Medium.IP,
        options.name,
        options.mtu,
        setup,
        resources,
        router=router,
        offload=True,
        backend="pytun" if options.backend == "pytun" else "ioctl",
        furnish=furnish,
    )


class TunListener:
    """The stack behind the name."""

    Options = TunOptions

    @staticmethod
    def make(address: Endpoint, options: TunOptions, context: ListenerContext) -> Listener:
        """Build a listener. Raise ConfigError."""
        return Listener("tun", DeviceSource(address, plan_of(options, context), context))


register("listener", TunListener, ("tun",))
