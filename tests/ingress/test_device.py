"""What is wrong with a device's options shows when they are bound, before anything is opened."""

from __future__ import annotations

from typing import Any

import pytest

from gostnet.core.options import Problem, bind_options
from gostnet.ingress.tap import TapOptions
from gostnet.ingress.tun import TunOptions
from gostnet.ingress.tungo import TungoOptions

ALL: list[Any] = [TunOptions, TapOptions, TungoOptions]


def problems_in(options: Any, metadata: dict[str, Any]) -> list[str]:
    problems: list[Problem] = []
    bind_options(options, metadata, problems=problems)
    return [str(problem) for problem in problems]


@pytest.mark.parametrize("options", ALL)
@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ({"net": "192.168.123.1/77"}, ["net: '192.168.123.1/77' is not an address with prefix length"]),
        ({"route": "10.0.0.0/99,x"}, ["route: '10.0.0.0/99' is not a network", "route: 'x' is not a network"]),
        ({"routes": ["10.0.0.0/8 gate"]}, ["routes: 'gate' is not an address"]),
        ({"gw": "fd00::1", "route": "10.0.0.0/8"}, ["route: 10.0.0.0/8 cannot be reached by fd00::1"]),
        ({"gw": "gate", "route": "10.0.0.0/8"}, ["gw: 'gate' is not an address"]),
        ({"name": "longer-than-it-may-be"}, ["name: 'longer-than-it-may-be' is not the name of an interface"]),
        ({"mtu": 20}, ["mtu: 20 is not between 68 and 65535"]),
        ({"mtu": 70000, "name": "a/b"}, ["name: 'a/b' is not the name of an interface", "mtu: 70000 is not between"]),
        ({"net": "10.0.0.1/24,fd00::1/64", "route": "10.1.0.0/16", "routes": ["10.2.0.0/16 10.0.0.2"]}, []),
        ({"name": "tun%d", "mtu": 1280, "gw": "10.0.0.2", "route": "10.1.0.0/16"}, []),
    ],
)
def test_what_no_device_can_have_is_found(options: Any, metadata: dict[str, Any], found: list[str]) -> None:
    problems = problems_in(options, metadata)
    assert len(problems) == len(found)
    assert all(text.startswith(start) for text, start in zip(problems, found, strict=True))


def test_a_hardware_address_is_read_when_options_are() -> None:
    assert problems_in(TapOptions, {"mac": "zz"}) == ["mac: 'zz' is not a hardware address such as 02:00:5e:10:00:01"]
