"""The listener `tap`: a device for Ethernet frames, by itself or in a bridge, handed out as one connection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from ..core.address import Endpoint
from ..core.errors import ConfigError
from ..core.options import CommaList, opt
from ..core.packets import Medium, Setup
from ..core.registry import register
from ..core.resources import Bridge, Port, Resource
from ..pipeline.transport import Listener, ListenerContext
from .device import DEFAULT_MTU, DevicePlan, DeviceSource, addressing, problems_of, setup_of


@dataclass(frozen=True, slots=True, kw_only=True)
class TapOptions:
    """Options of the listener `tap` (transports 10.3)."""

    name: str = opt(
        "", "Name of the device; the kernel chooses one (tap0, tap1, ...) by default.", aliases=("tap.name",)
    )
    net: CommaList = opt(
        [],
        "Addresses with their prefix lengths, IPv4 and IPv6: of the device, or of the bridge that it is a port of.",
        aliases=("tap.net",),
    )
    mtu: int = opt(DEFAULT_MTU, "MTU of the device, bytes.", aliases=("tap.mtu",))
    mac: str = opt(
        "",
        "Hardware address of the device; by default the kernel chooses another one at each start, and neighbours need"
        " up to a minute to notice.",
        aliases=("tap.mac",),
    )
    gw: str = opt("", "Gateway of the routes that name none.", aliases=("tap.gw",))
    route: CommaList = opt([], "Networks that are routed into the device, by way of `gw`.", aliases=("tap.route",))
    routes: CommaList = opt(
        [], "Networks that are routed into the device, each with its gateway behind a blank.", aliases=("tap.routes",)
    )
    bridge: str = opt(
        "",
        "Bridge that the device becomes a port of; one that is not there is made, and goes with the service.",
        aliases=("tap.bridge",),
    )
    ports: CommaList = opt(
        [],
        "Interfaces of this host that become ports of the bridge as well, as long as the service runs.",
        key="bridge.ports",
        aliases=("tap.bridge.ports",),
    )
    component_id: str = opt(
        "", "Accepted for compatibility: GOST uses it on Windows only.", key="componentID", aliases=("tap.componentID",)
    )

    def validate(self) -> Iterator[tuple[str, str]]:
        """Yield what cannot be read, before anything is opened."""
        yield from problems_of(self.name, self.mtu, self.net, self.gw, self.route, self.routes)
        try:
            parse_hardware(self.mac, "")
        except ConfigError as exc:
            yield "mac", exc.reason


def tap_resources(options: TapOptions, setup: Setup, device: str) -> list[Resource]:
    """Return what the kernel shall hold for a device besides its state.

    In a bridge the addresses are the bridge's: those of a port are of no use.
    """
    if not options.bridge:
        return addressing(device, setup)
    ports = dict.fromkeys((device, *options.ports))
    return [
        Bridge(options.bridge),
        *(Port(port, options.bridge) for port in ports),
        *addressing(options.bridge, setup),
    ]


def parse_hardware(text: str, path: str) -> bytes:
    """Return the six bytes of a hardware address, b"" for "". Raise ConfigError."""
    if not text:
        return b""
    parts = text.replace("-", ":").split(":")
    try:
        packed = bytes(int(part, 16) for part in parts)
    except ValueError:
        packed = b""
    if len(packed) != 6:
        raise ConfigError(path, f"{text[:64]!r} is not a hardware address such as 02:00:5e:10:00:01", code="tap.mac")
    if packed[0] & 1:
        raise ConfigError(path, f"{text} is the address of many, not of one device", code="tap.mac")
    return packed


class TapListener:
    """The stack behind the name."""

    Options = TapOptions

    @staticmethod
    def make(address: Endpoint, options: TapOptions, context: ListenerContext) -> Listener:
        """Build a listener. Raise ConfigError."""
        path = f"{context.path}.metadata"
        for name, key in ((options.bridge, "bridge"), *((port, "bridge.ports") for port in options.ports)):
            if len(name.encode()) > 15 or "/" in name or name.split() != ([name] if name else []):
                raise ConfigError(f"{path}.{key}", f"{name[:64]!r} is not the name of an interface", code="tap.bridge")
        if options.ports and not options.bridge:
            raise ConfigError(f"{path}.bridge.ports", "needs `bridge`: ports of what", code="tap.bridge")
        if options.bridge and options.bridge in (options.name, *options.ports):
            raise ConfigError(f"{path}.bridge", f"{options.bridge!r} cannot be its own port", code="tap.bridge")
        setup = setup_of(options.net, options.gw, options.route, options.routes, path, "tap")
        plan = DevicePlan(
            Medium.ETHERNET,
            options.name,
            options.mtu,
            setup,
            partial(tap_resources, options, setup),
            parse_hardware(options.mac, f"{path}.mac"),
        )
        return Listener("tap", DeviceSource(address, plan, context))


register("listener", TapListener, ("tap",))
