"""The kernel of one network namespace as a holder of resources."""

from __future__ import annotations

import errno
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from gostnet.core.errors import KernelError
from gostnet.core.resources import Address, Bridge, Link, NftTable, Port, Resource, Route, Rule, Sysctl

from . import netns, sysctl
from .netlink import RouteNetlink

if TYPE_CHECKING:
    # Loaded when a table is first asked for: it brings pyroute2 along, which the guard never needs.
    from .nft import Additions, Nft, ObservedTable

_OWNER_TIMEOUT = 2.0
"""Seconds to wait for the table of a process that is dying to go: its sockets close one after the other."""


class LiveKernel:
    """Observes and changes the kernel's state in a namespace, by default the thread's at the time of the creation.

    Owns the socket that owner tables belong to: `close` removes them. Works in any thread and never waits for long.
    """

    def __init__(self, place: netns.Place = None) -> None:
        """Open the sockets. Raise KernelError."""
        self.namespace = netns.open_namespace(place)
        self._nft_socket: Nft | None = None
        try:
            self._route = RouteNetlink(self.namespace)
        except BaseException:
            self.namespace.close()
            raise

    def close(self) -> None:
        """Close the sockets, and with them the tables that they own. Idempotent."""
        if self._nft_socket is not None:
            self._nft_socket.close()
        self._route.close()
        self.namespace.close()

    @property
    def _nft(self) -> Nft:
        if self._nft_socket is None:
            from .nft import Nft

            self._nft_socket = Nft(self.namespace)
        return self._nft_socket

    def observe(self, item: Resource) -> Resource | None:
        """Return what is there under the item's key, None for nothing. Raise KernelError."""
        match item:
            case Sysctl():
                with netns.inside(self.namespace):
                    value = sysctl.read(item.name)
                return None if value is None else Sysctl(item.name, value)
            case Link():
                return self._route.link(item.name)
            case Bridge():
                return self._route.bridge(item.name)
            case Port():
                return self._route.port(item.device)
            case Address():
                found = [a for a in self._route.addresses(item.device) if a == item]
                return found[0] if found else None
            case Route():
                routes = self._route.routes(item.version, item.table)
                found_route = next((route for route in routes if route.key == item.key), None)
                if found_route is not None and not item.device and found_route.gateway == item.gateway:
                    return replace(found_route, device="")  # the kernel has found the device by the gateway
                return found_route
            case Rule():
                return item if item in self._route.rules() else None
            case NftTable():
                return self._observe_table(item.name)
            case _:
                raise KernelError(f"observe {item.kind}", errno.EINVAL, "is not a resource of the kernel")

    def put(self, item: Resource, before: Resource | None) -> None:
        """Make the item be there, in place of `before`. Raise KernelError, and have changed nothing then."""
        match item:
            case Sysctl():
                with netns.inside(self.namespace):
                    sysctl.write(item.name, item.value)
            case Bridge():
                self._route.put_bridge(item)
            case Link():
                self._route.put_link(item)
            case Port():
                self._route.put_port(item)
            case Address():
                self._route.put_address(item)
            case Route():
                self._route.put_route(item, replace=before is not None)
            case Rule():
                self._route.put_rule(item)
            case NftTable():
                self._await_release(item.name)
                from . import nft_table

                nft_table.put(self._nft, item, before if isinstance(before, NftTable) else None)
            case _:
                raise KernelError(f"put {item.kind}", errno.EINVAL, "is not a resource of the kernel")

    def drop(self, item: Resource) -> None:
        """Remove it; no error if it is gone. Raise KernelError. Settings of a device cannot be removed: no effect."""
        try:
            match item:
                case Bridge():
                    self._route.drop_bridge(item)
                case Address():
                    self._route.drop_address(item)
                case Route():
                    self._route.drop_route(item)
                case Rule():
                    self._route.drop_rule(item)
                case NftTable():
                    from . import nft_table

                    self._nft.commit(nft_table.removal(item.name))
                case _:
                    pass
        except KernelError as exc:
            if exc.errno not in (errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EADDRNOTAVAIL):
                raise

    def admit(self, table: str, additions: Additions) -> None:
        """Have addresses be in sets of a table that is ours, all or none. Raise KernelError."""
        from .nft import Transaction

        transaction = Transaction()
        for name, addresses in additions.items():
            transaction.renew_elements(table, name, addresses)
        self._nft.commit(transaction)

    def tables(self) -> list[ObservedTable]:
        """List the nftables tables of family inet."""
        return self._nft.tables()

    def rules(self) -> list[Rule]:
        """List the policy rules that are no more than a `Rule` can say."""
        return self._route.rules()

    def routes(self) -> list[Route]:
        """List the routes of all tables and both IP versions."""
        return [*self._route.routes(4), *self._route.routes(6)]

    def has_ipv6(self) -> bool:
        """Tell whether routes of IPv6 through lo can be made."""
        with netns.inside(self.namespace):
            return sysctl.read("net.ipv6.conf.lo.disable_ipv6") == "0"

    def _observe_table(self, name: str) -> NftTable | None:
        from . import nft_table

        for table in self.tables():
            if table.name == name:
                word, _, note = table.comment.partition(" ")
                digest = nft_table.digest_of(self._nft.chains(name)) if word == "gostnet" else ""
                return NftTable(name, owner=table.owner != 0, note=note if digest else "", digest=digest)
        return None

    def _await_release(self, name: str) -> None:
        """Wait while another socket owns the table. Raise KernelError if that lasts."""
        from .nft import owned_by_others

        deadline = time.monotonic() + _OWNER_TIMEOUT
        while owned_by_others(self.tables(), name, self._nft.port):
            if time.monotonic() > deadline:
                raise KernelError(f"nft add table inet {name}", errno.EBUSY, "the table belongs to another process")
            time.sleep(0.01)
