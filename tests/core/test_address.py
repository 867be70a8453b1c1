"""Endpoints as users write them and as the kernel tells them."""

from __future__ import annotations

import pytest

from gostnet.core.address import Endpoint, parse_endpoint


@pytest.mark.parametrize(
    ("sockaddr", "host"),
    [
        (("192.0.2.1", 1), "192.0.2.1"),
        (("2001:db8::1", 1, 0, 0), "2001:db8::1"),
        (("::ffff:192.0.2.1", 1, 0, 0), "192.0.2.1"),
        (("fe80::1", 1, 0, 7), "fe80::1%7"),
        (("fe80::1%eth0", 1, 0, 7), "fe80::1%7"),
    ],
)
def test_what_the_kernel_tells(sockaddr: tuple[object, ...], host: str) -> None:
    assert Endpoint.from_sockaddr(sockaddr) == Endpoint(host, 1)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("[fe80::1%eth0]:1", "fe80::1%eth0"),
        ("[fe80::1%25eth0]:1", "fe80::1%eth0"),
        ("[fe80::1%25]:1", "fe80::1%25"),
        ("[fe80::1]:1", "fe80::1"),
        ("[::ffff:192.0.2.1]:1", "192.0.2.1"),
    ],
)
def test_addresses_with_a_zone(text: str, host: str) -> None:
    assert parse_endpoint(text) == Endpoint(host, 1)
