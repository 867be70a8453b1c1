"""What a listener captures, as its options say it, turned into the kernel resource that it declares."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Literal, cast

from ..core.address import Endpoint
from ..core.errors import ConfigError
from ..core.options import CommaList, opt
from ..core.resources import Capture


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureOptions:
    """The keys that make a listener install its own rules."""

    capture: CommaList = opt([], "Interfaces whose traffic is taken, and `local` for the host's own.")
    exclude: CommaList = opt([], "Destinations (networks or addresses) that are left alone.", key="capture.exclude")
    sources: CommaList = opt([], "Only traffic from these networks; does not concern `local`.", key="capture.sources")
    ports: CommaList = opt([], "Only these destination ports, such as 80,443,8000-8100.", key="capture.ports")
    direct: str = opt(
        "auto",
        "Whether destinations that bypasses send out directly stay in the kernel: where nobody can tell the difference"
        " (auto), always (kernel), never (user).",
        choices=("auto", "kernel", "user"),
    )
    names: bool = opt(
        False,
        "What bypasses send out directly by name stays in the kernel as well, once the handler dns has answered the"
        " name. Other names at the same address go with it.",
        key="direct.names",
    )


@dataclass(frozen=True, slots=True)
class CaptureRequest:
    """Capture options that have been checked."""

    interfaces: tuple[str, ...] = ()
    local: bool = False
    exclude: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    ports: tuple[tuple[int, int], ...] = field(default=())
    direct: Literal["auto", "kernel", "user"] = "auto"
    names: bool = False

    @classmethod
    def of(cls, options: CaptureOptions, path: str) -> CaptureRequest | None:
        """Check `options`; None when nothing is to be captured. Raise ConfigError below `path`."""
        wanted = [word for word in options.capture if word]
        if not wanted:
            for key, value in (("exclude", options.exclude), ("sources", options.sources), ("ports", options.ports)):
                if value:
                    raise ConfigError(f"{path}.capture.{key}", "says nothing without `capture`", code="capture.unused")
            if options.direct != "auto":
                raise ConfigError(f"{path}.direct", "says nothing without `capture`", code="capture.unused")
            if options.names:
                raise ConfigError(f"{path}.direct.names", "says nothing without `capture`", code="capture.unused")
            return None
        if options.names and options.direct == "user":
            raise ConfigError(f"{path}.direct.names", "says nothing with `direct: user`", code="capture.unused")
        for name in wanted:
            if len(name.encode()) > 15 or "/" in name or name.split() != [name]:
                raise ConfigError(f"{path}.capture", f"{name!r} is not an interface name", code="capture.interface")
        return cls(
            tuple(name for name in wanted if name != "local"),
            "local" in wanted,
            _networks(options.exclude, f"{path}.capture.exclude"),
            _networks(options.sources, f"{path}.capture.sources"),
            tuple(_port_range(text, f"{path}.capture.ports") for text in options.ports),
            cast(Literal["auto", "kernel", "user"], options.direct),
            options.names,
        )

    def resource(
        self,
        service: str,
        protocol: Literal["tcp", "udp"],
        method: Literal["redirect", "tproxy"],
        listening: Endpoint,
        device: str = "",
    ) -> Capture:
        """Return the resource of a listener that is bound to `listening`; `local` goes through `device`."""
        address = "" if listening.host in ("", "::", "0.0.0.0") else listening.host
        return Capture(
            service,
            protocol,
            method,
            listening.port,
            self.interfaces,
            self.local,
            self.exclude,
            self.sources,
            self.ports,
            address,
            device,
            self.direct,
            names=self.names,
        )


def _networks(texts: list[str], path: str) -> tuple[str, ...]:
    found = []
    for text in texts:
        try:
            found.append(str(ip_network(text, strict=False)))
        except ValueError as exc:
            raise ConfigError(path, f"{text!r} is not a network such as 10.0.0.0/8", code="network") from exc
    return tuple(found)


def _port_range(text: str, path: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    try:
        low, high = int(first), int(last or first)
    except ValueError:
        low, high = 0, 0
    if not 1 <= low <= high <= 65535:
        raise ConfigError(path, f"{text!r} is not a port or range such as 8000-8100", code="port")
    return low, high
