"""What speaks with clients and upstream proxies, one package per protocol.

This table is the index: a component's module is imported when a configuration first names it.
"""

from __future__ import annotations

from ..core.registry import COMPONENTS

HANDLERS = {
    "auto": "gostnet.protocols.auto.handler",
    "dns": "gostnet.protocols.dns.handler",
    "http": "gostnet.protocols.http.handler",
    "socks4": "gostnet.protocols.socks4.handler",
    "socks4a": "gostnet.protocols.socks4.handler",
    "socks": "gostnet.protocols.socks5.handler",
    "socks5": "gostnet.protocols.socks5.handler",
    "relay": "gostnet.protocols.relay.handler",
    "tcp": "gostnet.protocols.forward.handler",
    "udp": "gostnet.protocols.forward.handler",
    "forward": "gostnet.protocols.forward.handler",
    "red": "gostnet.protocols.transparent.handler",
    "redir": "gostnet.protocols.transparent.handler",
    "redirect": "gostnet.protocols.transparent.handler",
    "redu": "gostnet.protocols.transparent.handler",
    "sni": "gostnet.protocols.sni.handler",
    "tap": "gostnet.protocols.tap.handler",
    "tun": "gostnet.protocols.tun.handler",
    "tungo": "gostnet.protocols.transparent.tungo",
}

CONNECTORS = {
    "direct": "gostnet.protocols.forward.connector",
    "forward": "gostnet.protocols.forward.connector",
    "tcp": "gostnet.protocols.forward.connector",
    "virtual": "gostnet.protocols.forward.connector",
    "http": "gostnet.protocols.http.connector",
    "socks4": "gostnet.protocols.socks4.connector",
    "socks4a": "gostnet.protocols.socks4.connector",
    "socks": "gostnet.protocols.socks5.connector",
    "socks5": "gostnet.protocols.socks5.connector",
    "relay": "gostnet.protocols.relay.connector",
    "sni": "gostnet.protocols.sni.connector",
}


def declare() -> None:
    """Tell the registry where the handlers and connectors are."""
    COMPONENTS.handlers.declare(HANDLERS)
    COMPONENTS.connectors.declare(CONNECTORS)
