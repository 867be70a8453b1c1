"""Which engine is chosen and why, and to whom packets go from the kernel."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gostnet.core.address import ANY, Endpoint, IPAddress
from gostnet.core.datagrams import Datagrams
from gostnet.core.errors import KernelError
from gostnet.core.flow import Flow, Shapers
from gostnet.core.log import Logger
from gostnet.core.tasks import run
from gostnet.core.udp_socket import UdpSocket, listen_udp
from gostnet.kernel.tun_engine import TunEngine
from gostnet.protocols.tun import codec
from gostnet.protocols.tun import engine as module
from gostnet.protocols.tun.engine import Choice, KernelPath, start
from gostnet.testing.memory import MemoryDevice, datagrams_pair

from .kit import setup

ONE, TWO = Endpoint("192.0.2.1", 1000), Endpoint("192.0.2.2", 1000)
SEVENTH = Endpoint("192.0.2.1", 7)
UDP_NO_CHECK6_RX = 102
ADDRESSES = [ip_address("192.168.0.2")]


class Engine:
    """Serves every peer but those with port 7, and notes what it was told last."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.peers: dict[Endpoint, bool] = {}
        self.pending = (0, 0)
        self.closed = False
        self.reason = ""
        self.broken = ""
        self.refuses: KernelError | None = None
        self.said: list[Endpoint] = []

    def learn(
        self, addresses: Sequence[IPAddress], peer: Endpoint, *, takes: bool, anyway: bool = False, source: str = ""
    ) -> bool:
        if self.refuses is not None:
            raise self.refuses
        self.reason = "it has the port 7" if peer.port == 7 else ""
        if self.reason:
            self.peers.pop(peer, None)
            return False
        self.peers[peer] = takes or anyway
        return True

    def forget(self, address: IPAddress) -> None:
        if self.refuses is not None:
            raise self.refuses

    def say(self, peer: Endpoint, data: bytes) -> None:
        assert data == codec.OFFER
        self.said.append(peer)

    def moved(self) -> tuple[int, int]:
        if self.refuses is not None:
            raise self.refuses
        moved, self.pending = self.pending, (0, 0)
        return moved

    def problem(self) -> str:
        return self.broken

    def close(self) -> None:
        self.closed = True


class Said(Logger):
    """A logger whose lines are kept."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, message: str, **_: Any) -> None:
        self.lines.append(f"info {message}")

    def warn(self, message: str, **_: Any) -> None:
        self.lines.append(f"warn {message}")


@dataclass
class Fixture:
    """A path over an engine of ours."""

    kernel: KernelPath
    engine: Engine
    flow: Flow
    log: Said

    def offers(self) -> int:
        """Return how many offers have been made to the one peer since the last call."""
        said, self.engine.said = self.engine.said, []
        assert set(said) <= {ONE}
        return len(said)


@contextmanager
def path(*, always: bool = False) -> Iterator[Fixture]:
    engine, flow, log = Engine(), Flow("", ANY), Said()
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as ours:
        ours.bind(("::", 0))
        carrier = cast(UdpSocket, SimpleNamespace(sock=ours))
        kernel = KernelPath(cast(TunEngine, engine), always, flow, "tun9", carrier, log)
        assert ours.getsockopt(socket.IPPROTO_UDP, UDP_NO_CHECK6_RX)
        yield Fixture(kernel, engine, flow, log)


def test_a_peer_is_sent_packets_from_the_kernel_as_long_as_its_offers_are_confirmed() -> None:
    with path() as it:
        kernel, engine = it.kernel, it.engine
        kernel.registered(ADDRESSES, ONE)
        assert engine.peers == {ONE: False}
        assert it.offers() == 0
        kernel.offered(ONE)
        assert engine.peers == {ONE: False}  # ours may not arrive
        assert it.offers() == 1
        for _ in range(3):
            kernel.offered(ONE)
            assert engine.peers == {ONE: True}
            assert it.offers() == 0
            kernel.registered(ADDRESSES, ONE)
            assert engine.peers == {ONE: True}
            kernel.offered(ONE)
            assert it.offers() == 1
        # A second registration without a confirmation between: somebody else, or the same one with the pump.
        kernel.registered(ADDRESSES, ONE)
        assert engine.peers == {ONE: False}
        kernel.offered(ONE)
        kernel.offered(ONE)
        kernel.refresh()
        assert engine.peers == {ONE: True}


def test_a_client_sends_from_the_kernel_as_long_as_the_server_returns_its_offers() -> None:
    with path() as it:
        kernel, engine = it.kernel, it.engine
        answer = codec.encode_answer("127.0.0.1")
        assert not kernel.answered(answer)
        assert kernel.talk_to(ONE, "127.0.0.1")
        kernel.offer()
        assert it.offers() == 1
        assert not kernel.answered(answer)
        assert it.offers() == 0
        assert kernel.answered(codec.OFFER)
        assert it.offers() == 1  # to confirm
        assert not kernel.answered(codec.OFFER)
        assert it.offers() == 0
        assert kernel.talk_to(ONE, "127.0.0.1")
        assert engine.peers == {ONE: True}
        assert not kernel.answered(answer)
        assert kernel.answered(answer)
        assert kernel.talk_to(ONE, "127.0.0.1")
        assert engine.peers == {ONE: False}


def test_offers_of_strangers_and_to_peers_that_are_not_served_mean_nothing() -> None:
    with path() as it:
        kernel, engine = it.kernel, it.engine
        kernel.offered(TWO)
        assert engine.peers == {}
        kernel.registered(ADDRESSES, SEVENTH)
        kernel.offered(SEVENTH)
        assert engine.peers == {}
        assert it.log.lines == [f"info tun9: engine pump for {SEVENTH}: it has the port 7"]
        kernel.registered(ADDRESSES, TWO)
        assert engine.peers == {TWO: False}


def test_every_peer_takes_packets_where_that_is_said() -> None:
    with path(always=True) as it:
        it.kernel.registered(ADDRESSES, ONE)
        assert it.kernel.talk_to(TWO, "192.0.2.9")
        assert it.engine.peers == {ONE: True, TWO: True}


def test_what_the_kernel_moves_is_on_the_flows_meter_to_the_last() -> None:
    with path() as it:
        it.flow.meter.up = 5
        it.engine.pending = (10, 20)
        assert it.kernel.count(it.flow) == (10, 20)
        it.engine.pending = (1, 2)
        it.kernel.close(it.flow)
        assert (it.flow.meter.up, it.flow.meter.down) == (16, 22)
        assert it.engine.closed


REFUSED = KernelError("change BPF map gn_tun_routes", 1, "not permitted")
FAILURES: dict[str, Callable[[Fixture], object]] = {
    "registered": lambda it: it.kernel.registered(ADDRESSES, ONE),
    "offered": lambda it: it.kernel.offered(ONE),
    "refresh": lambda it: it.kernel.refresh(),
    "forget": lambda it: it.kernel.forget(ADDRESSES[0]),
    "talk_to": lambda it: it.kernel.talk_to(ONE, "192.0.2.9"),
    "count": lambda it: it.kernel.count(it.flow),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_an_engine_that_fails_is_given_up_with_one_line(failure: str) -> None:
    with path() as it:
        it.flow.labels = {"engine": "kernel"}
        it.kernel.registered(ADDRESSES, ONE)
        it.engine.refuses = REFUSED
        for _ in range(2):
            FAILURES[failure](it)
        assert it.log.lines == [f"warn tun9: engine pump from now on: {REFUSED}"]
        assert it.engine.closed
        assert it.flow.labels["engine"] == "pump"
        # Nobody is told any more that packets go this way.
        it.offers()
        it.kernel.offer()
        it.kernel.offered(ONE)
        assert it.offers() == 0
        it.kernel.close(it.flow)


def test_an_engine_whose_program_was_taken_off_is_given_up_and_what_it_moved_counts() -> None:
    with path() as it:
        it.engine.pending = (3, 4)
        it.engine.broken = "its program has been taken off the device"
        assert it.kernel.count(it.flow) == (3, 4)
        assert it.log.lines == ["warn tun9: engine pump from now on: its program has been taken off the device"]
        assert it.engine.closed
        assert it.kernel.count(it.flow) == (0, 0)
        assert (it.flow.meter.up, it.flow.meter.down) == (3, 4)


def test_the_log_tells_once_when_a_peer_is_left_to_the_pump_and_when_it_is_not_any_more() -> None:
    with path() as it:
        for _ in range(3):
            it.kernel.registered(ADDRESSES, SEVENTH)
        assert len(it.log.lines) == 1
        it.kernel._tell(SEVENTH, "")
        it.kernel._tell(SEVENTH, "")
        assert it.log.lines[1:] == [f"info tun9: engine kernel for {SEVENTH} again"]


def chosen(
    choice: Choice = "auto", host: str = "127.0.0.1", flow: Flow | None = None, device: MemoryDevice | None = None,
    carrier: Datagrams | None = None,
) -> tuple[KernelPath | None, str, object]:  # fmt: skip
    """Return (engine, what was said of it, the flow's label)."""
    log, flow = Said(), flow or Flow("", ANY)

    async def main() -> KernelPath | None:
        sock = listen_udp(Endpoint(host, 0))
        udp = UdpSocket(sock, Endpoint.from_sockaddr(sock.getsockname()))
        try:
            return start(choice, flow, device or MemoryDevice(setup("192.168.0.1/24")), carrier or udp, log)
        finally:
            udp.abort()

    kernel = run(main())
    return kernel, log.lines[-1], flow.labels["engine"]


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TunEngine", Engine)


@pytest.mark.usefixtures("able")
def test_the_kernel_is_chosen_where_nothing_speaks_against_it() -> None:
    kernel, said, label = chosen()
    assert kernel is not None
    assert said == "info memory: engine kernel, for peers that have it too; pump for the rest"
    assert label == "kernel"
    assert "for all peers" in chosen("kernel")[1]
    assert chosen(host="::1")[0] is not None


@pytest.mark.usefixtures("able")
def test_each_reason_for_the_pump_is_said() -> None:
    limited, recorded = Flow("", ANY), Flow("", ANY)
    limited.shapers = Shapers(up=[object()])  # type: ignore[list-item]
    recorded.taps = [lambda data, up: None]
    routed = MemoryDevice(setup("192.168.0.1/24"))
    routed.setup = replace(routed.setup, router=object())  # type: ignore[arg-type]
    reasons = {
        "chosen": chosen("pump"),
        "there are traffic limits": chosen(flow=limited),
        "the packets are recorded": chosen(flow=recorded),
        "a router chooses among peers": chosen(device=routed),
        "packets go through a chain": chosen(carrier=datagrams_pair()[0]),
    }
    for reason, (kernel, said, label) in reasons.items():
        assert kernel is None
        assert said == f"info memory: engine pump: {reason}"
        assert label == "pump"
    assert chosen("kernel", flow=limited)[1].startswith("warn ")


def test_why_the_kernel_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise KernelError("", 0, "the kernel has no tcx, which came with Linux 6.6")

    monkeypatch.setattr(module, "TunEngine", refuse)
    assert chosen()[1] == "info memory: engine pump: the kernel has no tcx, which came with Linux 6.6"
