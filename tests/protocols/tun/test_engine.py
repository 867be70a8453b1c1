"""Which engine is chosen and why, and to whom packets go from the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address
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
from gostnet.protocols.tun import engine as module
from gostnet.protocols.tun.engine import Choice, KernelPath, start
from gostnet.testing.memory import datagrams_pair

from .kit import MemoryDevice, setup

ONE, TWO = Endpoint("192.0.2.1", 1000), Endpoint("192.0.2.2", 1000)
ADDRESSES = [ip_address("192.168.0.2")]


class Engine:
    """Serves every peer but those with port 7, and notes what it was told last."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.peers: dict[Endpoint, bool] = {}
        self.pending = (0, 0)
        self.closed = False

    def learn(self, addresses: Sequence[IPAddress], peer: Endpoint, *, takes: bool, source: str = "") -> bool:
        if peer.port == 7:
            return False
        self.peers[peer] = takes
        return True

    def moved(self) -> tuple[int, int]:
        moved, self.pending = self.pending, (0, 0)
        return moved

    def close(self) -> None:
        self.closed = True


def path(*, always: bool = False) -> tuple[KernelPath, Engine]:
    engine = Engine()
    return KernelPath(cast(TunEngine, engine), always), engine


def test_a_peer_is_sent_packets_from_the_kernel_as_long_as_it_offers_to_take_them() -> None:
    kernel, engine = path()
    assert kernel.registered(ADDRESSES, ONE)
    assert engine.peers == {ONE: False}
    for _ in range(3):
        kernel.offered(ONE)
        assert engine.peers == {ONE: True}
        assert kernel.registered(ADDRESSES, ONE)
        assert engine.peers == {ONE: True}
    # A second registration without an offer between: somebody else, or the same one with the pump.
    assert kernel.registered(ADDRESSES, ONE)
    assert engine.peers == {ONE: False}
    kernel.offered(ONE)
    kernel.refresh()
    assert engine.peers == {ONE: True}


def test_offers_of_strangers_and_to_peers_that_are_not_served_mean_nothing() -> None:
    kernel, engine = path()
    kernel.offered(TWO)
    assert engine.peers == {}
    assert not kernel.registered(ADDRESSES, Endpoint("192.0.2.1", 7))
    kernel.offered(Endpoint("192.0.2.1", 7))
    assert engine.peers == {}
    assert kernel.registered(ADDRESSES, TWO)
    assert engine.peers == {TWO: False}


def test_every_peer_takes_packets_where_that_is_said() -> None:
    kernel, engine = path(always=True)
    kernel.registered(ADDRESSES, ONE)
    assert kernel.talk_to(TWO, "192.0.2.9", takes=False)
    assert engine.peers == {ONE: True, TWO: True}


def test_what_the_kernel_moves_is_on_the_flows_meter_to_the_last() -> None:
    kernel, engine = path()
    flow = Flow()
    flow.meter.up = 5
    engine.pending = (10, 20)
    assert kernel.count(flow) == (10, 20)
    engine.pending = (1, 2)
    kernel.close(flow)
    assert (flow.meter.up, flow.meter.down) == (16, 22)
    assert engine.closed


class Said(Logger):
    """A logger whose lines are kept."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, message: str, **_: Any) -> None:
        self.lines.append(f"info {message}")

    def warn(self, message: str, **_: Any) -> None:
        self.lines.append(f"warn {message}")


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
        "packets go over IPv6": chosen(host="::1"),
        "a router chooses among peers": chosen(device=routed),
        "packets go through a chain": chosen(carrier=datagrams_pair()[0]),
    }
    for reason, (kernel, said, label) in reasons.items():
        assert kernel is None
        assert said == f"info memory: engine pump: {reason}"
        assert label == "pump"
    assert chosen("kernel", host="::1")[1].startswith("warn ")


def test_why_the_kernel_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise KernelError("", 0, "the kernel has no tcx, which came with Linux 6.6")

    monkeypatch.setattr(module, "TunEngine", refuse)
    assert chosen()[1] == "info memory: engine pump: the kernel has no tcx, which came with Linux 6.6"
