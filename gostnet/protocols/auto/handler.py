"""The handler `auto`: SOCKS5, SOCKS4, HTTP and TLS on one port, told apart by the first byte."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, field, fields, make_dataclass, replace
from typing import Any, ClassVar, Final, get_type_hints

from ...core.contracts import Handler
from ...core.egress import Egress
from ...core.errors import AuthDenied, ProtocolError
from ...core.flow import Flow
from ...core.options import Validated, bind_options
from ...core.registry import COMPONENTS, component
from ...core.stream import Stream
from ...core.tasks import deadline
from ...pipeline.handler import HandlerContext, forward
from ...pipeline.sniffing import Sniffer, named

PATIENCE: Final = 15.0
"""Seconds for the first byte: GOST waits for ever."""

_CHUNK: Final = 4096
"""Bytes of the first read: a whole request of any of the protocols, as a rule."""

PARTS: Final[Mapping[int, str]] = {4: "socks4", 5: "socks5"}
"""Handlers by the first byte, which is the version of SOCKS."""

OTHERWISE: Final = "http"

TLS: Final = 22
"""The first byte of a handshake record."""


class _Options:
    """Makes the class of options when it is first asked for: the handlers are known then, and not before."""

    def __init__(self) -> None:
        self._made: type[Any] | None = None

    def __get__(self, instance: object, owner: type[Any]) -> type[Any]:
        if self._made is None:
            self._made = merged([_class(name).Options for name in (OTHERWISE, *PARTS.values())])
        return self._made


@component("handler", "auto")
class AutoHandler:
    """Hands each connection to the handler of the protocol that it begins with.

    Every one of them is bound to the same metadata, of which it takes what it knows.
    """

    accepts: ClassVar[tuple[type[Any], ...]] = (Stream,)
    Options = _Options()

    def __init__(self, options: Any, context: HandlerContext) -> None:
        """Build the handlers from `context.metadata`, of which `options` is the checked form."""
        self._context = context
        made = {name: _build(name, context) for name in (OTHERWISE, *PARTS.values())}
        self._by_version = {version: made[name] for version, name in PARTS.items()}
        self._otherwise = made[OTHERWISE]

    async def handle(self, flow: Flow, conn: Stream, egress: Egress) -> None:
        """Look at the first byte. A client that says nothing in time, or closes at once, gets no answer."""
        try:
            with deadline(PATIENCE):
                first = await conn.receive(_CHUNK)
        except TimeoutError as exc:
            raise ProtocolError(f"nothing within {PATIENCE:g}s") from exc
        if not first:
            return
        conn.unread(first)
        if first[0] == TLS:
            await self._pass_on(flow, conn, egress)
        else:
            await self._by_version.get(first[0], self._otherwise).handle(flow, conn, egress)

    async def _pass_on(self, flow: Flow, conn: Stream, egress: Egress) -> None:
        """Relay TLS, unopened, to the server that its hello names; its port is 443."""
        if self._context.authenticator is not None:
            # GOST: lets everybody through here, credentials or not.
            raise AuthDenied("TLS on a port that asks for credentials, which it cannot carry")
        found = await Sniffer(PATIENCE).look(flow, conn)
        if found is None or not found.host:
            raise ProtocolError("TLS that does not name its server")
        flow.target = named(found)
        await forward(flow, conn, egress)


def _class(name: str) -> Any:
    return COMPONENTS.handlers.get(name)


def _build(name: str, context: HandlerContext) -> Handler[Stream]:
    kind = _class(name)
    handler: Handler[Stream] = kind(
        bind_options(kind.Options, context.metadata), replace(context, log=context.log.bind(handler=name))
    )
    return handler


def merged(classes: Sequence[type[Any]]) -> type[Any]:
    """Return one class of options with the keys of all: what a configuration is checked against and described by.

    A field that several have is taken from the first. Values are checked as each of the classes does.
    """
    columns: dict[str, tuple[str, Any, Any]] = {}
    for options in classes:
        hints = get_type_hints(options, include_extras=True)
        for item in fields(options):
            if item.name in columns:
                continue
            made: Any
            if item.default_factory is not MISSING:
                made = field(default_factory=item.default_factory, metadata=item.metadata)
            else:
                made = field(default=item.default, metadata=item.metadata)
            columns[item.name] = (item.name, hints[item.name], made)

    def validate(self: Any) -> Iterable[tuple[str, str]]:
        problems: dict[tuple[str, str], None] = {}
        for options in classes:
            part = options(**{item.name: getattr(self, item.name) for item in fields(options)})
            if isinstance(part, Validated):
                problems.update(dict.fromkeys(part.validate()))
        return list(problems)

    return make_dataclass(
        "Options",
        list(columns.values()),
        namespace={"__doc__": "Options of `auto`: those of all its handlers.", "validate": validate},
        frozen=True,
        slots=True,
        kw_only=True,
    )
