"""The start: what refuses it does so before anything is opened or done."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gostnet.testing.namespaces import Network
from gostnet.testing.processes import Process

pytestmark = pytest.mark.netns

CAPTURING = """
services:
- name: gateway
  addr: ":{port}"
  handler: {{type: red}}
  listener: {{type: red, metadata: {{capture: [lan0]}}}}
  metadata: {{preUp: ["touch {mark}"]}}
"""


@pytest.mark.parametrize("workers", ["", "workers: 2\n"], ids=["alone", "workers"])
def test_second_instance_of_a_name_is_refused_before_it_opens_anything(
    three: Network, daemon: Callable[..., Process], tmp_path: Path, workers: str
) -> None:
    one = daemon(three["gateway"], CAPTURING.format(port=12345, mark=tmp_path / "one"))
    assert (tmp_path / "one").exists()
    two = daemon(three["gateway"], workers + CAPTURING.format(port=12346, mark=tmp_path / "two"), ready=False)
    assert two.wait() == 1
    assert "instance 'default' runs already in this network namespace, by process" in two.errors
    assert "give this one another name with --instance" in two.errors
    assert "listening on" not in two.errors
    assert not (tmp_path / "two").exists(), "its commands have run"
    assert one.returncode is None
    other = daemon(
        three["gateway"], "--instance", "other", workers + CAPTURING.format(port=12346, mark=tmp_path / "two")
    )
    assert other.returncode is None


def test_an_instance_that_wants_nothing_of_the_kernel_needs_no_name(
    three: Network, daemon: Callable[..., Process]
) -> None:
    for _ in range(2):
        daemon(three["gateway"], "-L", "socks5://127.0.0.1:0")


def test_a_namespace_that_a_command_makes_need_not_be_there_before(
    three: Network, daemon: Callable[..., Process]
) -> None:
    made = f"{three['gateway']}-made"
    service = {
        "name": "s",
        "addr": ":12345",
        "handler": {"type": "red"},
        "listener": {"type": "red", "metadata": {"capture": ["local"]}},
        "metadata": {"netns": made, "preUp": [f"ip netns add {made}"], "postDown": [f"ip netns del {made}"]},
    }
    daemon(three["gateway"], {"services": [service]})


# ---- what we may not do -----------------------------------------------------------------------------------------
NODE = """
services:
- {name: s, addr: "127.0.0.1:0", handler: {type: socks5, chain: c}}
chains:
- {name: c, hops: [{name: h, nodes: [{name: n, addr: "192.0.2.1:1", sockopts: {mark: 16}}]}]}
"""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["-L", "socks5://127.0.0.1:0?so_mark=16"],
            "services[0]: so_mark 0x10 may not be put on sockets (run as root, or with CAP_NET_ADMIN (since",
        ),
        (["-C", NODE], "chains[0].hops[0].nodes[0]: so_mark 0x10 may not be put on sockets (run as root"),
        (
            ["-L", "socks5://127.0.0.1:0?netns.out={there}"],
            "services[0]: netns '{there}' may not be entered (needs CAP_SYS_ADMIN",
        ),
    ],
    ids=["mark", "node", "namespace"],
)
def test_what_outgoing_sockets_may_not_be_refuses_the_start(
    two: Network, peer: Callable[[str], str], tmp_path: Path, words: list[str], message: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(NODE)
    words = [str(path) if word == NODE else word.format(there=two["server"]) for word in words]
    bounds = "--bounding-set=-net_admin,-net_raw,-sys_admin"
    with Process([peer("setpriv"), bounds, sys.executable, "-m", "gostnet", *words], two["client"]) as process:
        assert process.wait() == 1
        assert message.format(there=two["server"]) in process.errors
        assert "listening on" not in process.errors


def test_a_plain_proxy_needs_no_leave_to_tidy_up_what_others_left(
    two: Network, daemon: Callable[..., Process], peer: Callable[[str], str]
) -> None:
    daemon(two["server"], "--instance", "beside", "-L", "red://:12345?capture=local")  # so that there is a journal
    words = ["-L", "socks5://127.0.0.1:0"]
    bounds = "--bounding-set=-net_admin,-net_raw,-sys_admin"
    with Process([peer("setpriv"), bounds, sys.executable, "-m", "gostnet", *words], two["client"]) as process:
        process.wait_ready()


def test_an_interface_or_a_namespace_that_is_not_there_yet_refuses_nothing(
    two: Network, daemon: Callable[..., Process]
) -> None:
    daemon(
        two["client"],
        *("-L", "socks5://127.0.0.1:0?so_mark=16&interface=later0!"),
        *("-L", f"socks5://127.0.0.1:0?netns.out={two['client']}-later"),
        *("-L", "socks5://127.0.0.1:0?interface=192.0.2.7"),
    )


def test_a_reload_that_may_not_be_changes_nothing(
    two: Network, daemon: Callable[..., Process], peer: Callable[[str], str], tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("services:\n- {name: s, addr: '127.0.0.1:0', handler: {type: socks5}}\n")
    bounds = "--bounding-set=-net_admin,-net_raw,-sys_admin"
    words = [peer("setpriv"), bounds, sys.executable, "-m", "gostnet", "-C", str(path)]
    with Process(words, two["client"]) as process:
        process.wait_ready()
        path.write_text(NODE)
        process.send(signal.SIGHUP)
        process.wait_for("nodes[0]: so_mark 0x10 may not be put on sockets")
        assert "the old configuration stays" in process.errors
        assert process.returncode is None
