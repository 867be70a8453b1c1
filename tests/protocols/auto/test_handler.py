"""One port for SOCKS5, SOCKS4 and HTTP."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.errors import ConfigError, ProtocolError
from gostnet.core.flow import Flow
from gostnet.core.options import bind_options, json_schema, markdown, opt, option_keys
from gostnet.core.registry import COMPONENTS
from gostnet.core.tasks import run
from gostnet.pipeline.handler import HandlerContext
from gostnet.protocols import declare
from gostnet.protocols.auto import handler as module
from gostnet.protocols.auto.handler import AutoHandler, merged
from gostnet.testing import stream_pair
from gostnet.testing.memory import Trickle

from ..vectors import Peer, echo_server, router, served


@pytest.fixture(autouse=True)
def _declared() -> None:
    declare()


class Users:
    """Knows u:p, and the user id u."""

    def authenticate(self, username: str, password: str, client: Endpoint) -> str | None:
        return username if (username, password) in (("u", "p"), ("u", "")) else None


def auto(metadata: dict[str, Any] | None = None, **context: Any) -> AutoHandler:
    made = HandlerContext(metadata=metadata or {}, **context)
    return AutoHandler(bind_options(AutoHandler.Options, made.metadata), made)


def dialogues(port: int, *, user: bool) -> dict[str, list[tuple[bytes, int]]]:
    """Return, by protocol, what a client says and how many bytes it then waits for."""
    at = bytes((127, 0, 0, 1))
    number = port.to_bytes(2, "big")
    socks5 = [(b"\x05\x01\x02", 2), (b"\x01\x01u\x01p", 2)] if user else [(b"\x05\x01\x00", 2)]
    authorization = b"Proxy-Authorization: Basic dTpw\r\n" if user else b""
    http = b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n%b\r\n" % (port, port, authorization)
    return {
        "socks5": [*socks5, (b"\x05\x01\x00\x01" + at + number, 10)],
        "socks4": [(b"\x04\x01" + number + at + (b"u" if user else b"") + b"\0", 8)],
        "http": [(http, len(b"HTTP/1.1 200 Connection established\r\n"))],
    }


@pytest.mark.parametrize("protocol", ["socks5", "socks4", "http"])
@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize("piece", [1, 1000])
def test_the_first_byte_decides(protocol: str, user: bool, piece: int) -> None:
    async def main() -> None:
        async with echo_server() as port, served(auto(authenticator=Users() if user else None)) as address:
            with await Peer.connect(address) as peer:
                for said, wanted in dialogues(port, user=user)[protocol]:
                    for start in range(0, len(said), piece):
                        await peer.send(said[start : start + piece])
                    reply = await peer.exactly(wanted)
                    assert len(reply) == wanted
                if protocol == "http":
                    assert b" 200 " in reply
                    while not reply.endswith(b"\r\n\r\n"):
                        reply += await peer.exactly(1)
                await peer.send(b"hello")
                assert await peer.exactly(5) == b"hello"
                peer.shut()
                assert await peer.rest() == b""

    run(main())


@pytest.mark.parametrize("metadata", [{}, {"UDP": True}])
def test_every_handler_is_bound_to_the_same_metadata(metadata: dict[str, Any]) -> None:
    async def main() -> None:
        async with served(auto(metadata)) as address, echo_server():
            with await Peer.connect(address) as peer:
                await peer.send(bytes.fromhex("050100" + "05f30001000000000000"))
                assert (await peer.exactly(4))[:4] == bytes.fromhex("0500" + ("0500" if metadata else "0502"))

    run(main())


def test_a_client_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.02)

    async def main() -> None:
        _, right = stream_pair()
        with pytest.raises(ProtocolError, match=r"nothing within 0.02s"):
            await auto().handle(Flow(), right, router())

    run(main())


def test_a_client_that_closes_at_once_is_no_error() -> None:
    async def main() -> None:
        left, right = stream_pair()
        await left.send_eof()
        await auto().handle(Flow(), right, router())
        assert right.sent == 0

    run(main())


def test_what_was_looked_at_is_not_lost() -> None:
    async def main() -> None:
        async with echo_server() as port:
            left, right = stream_pair()
            ((request, _),) = dialogues(port, user=False)["socks4"]
            await left.send(request + b"hello")
            await left.send_eof()
            flow = Flow()
            await auto().handle(flow, Trickle(right, 3), router())
            assert flow.meter.up == flow.meter.down == 5
            assert await left.receive(8) == b"\0\x5a" + bytes(6)
            assert await left.receive() == b"hello"

    run(main())


# ---- options ------------------------------------------------------------------------------------
def test_the_options_are_those_of_all_handlers() -> None:
    made = COMPONENTS.options("handler", "auto")
    assert made is AutoHandler.Options is COMPONENTS.options("handler", "auto")
    keys = set(option_keys(made))
    for name in ("http", "socks4", "socks5"):
        assert keys >= set(option_keys(COMPONENTS.handlers.get(name).Options))
    assert len(keys) == len(option_keys(made))
    assert "| `readTimeout` |" in markdown(made)
    assert "notls" in json_schema(made)["properties"]


def test_a_wrong_value_is_one_error() -> None:
    problems: list[Any] = []
    bind_options(AutoHandler.Options, {"readTimeout": "soon"}, "services[0].handler.metadata", None, problems)
    assert [str(problem) for problem in problems] == [
        "services[0].handler.metadata.readTimeout: 'soon' is not a duration such as 10s"
    ]
    with pytest.raises(ConfigError):
        auto({"readTimeout": "soon"})


@dataclass(frozen=True, slots=True, kw_only=True)
class First:
    """Options of a handler."""

    shared: int = opt(1, "Known to both.")
    names: list[str] = opt([], "Only here.")

    def validate(self) -> Iterable[tuple[str, str]]:
        if self.shared > 9:
            yield "shared", "too large"


@dataclass(frozen=True, slots=True, kw_only=True)
class Second:
    """Options of another one."""

    shared: int = opt(2, "Known to both.")
    own: str = opt("", "Only here.", key="its.own")

    def validate(self) -> Iterable[tuple[str, str]]:
        if self.shared > 9:
            yield "shared", "too large"
        if self.own == "bad":
            yield "its.own", "bad"


def test_merged_options_check_what_each_of_them_checks() -> None:
    made = merged([First, Second])
    assert option_keys(made) == ["shared", "names", "its.own"]
    bound = bind_options(made, {"shared": 3, "Its.Own": "x"})
    assert (bound.shared, bound.names, bound.own) == (3, [], "x")
    problems: list[Any] = []
    bind_options(made, {"shared": 10, "its.own": "bad"}, "", None, problems)
    assert [str(problem) for problem in problems] == ["shared: too large", "its.own: bad"]
