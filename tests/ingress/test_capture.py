"""What capture options become, and what is refused with its place."""

from __future__ import annotations

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.errors import ConfigError
from gostnet.core.options import bind_options
from gostnet.core.resources import Capture
from gostnet.ingress.capture import CaptureOptions, CaptureRequest
from gostnet.ingress.redirect import RedOptions

PATH = "services[0].listener.metadata"


def request(**metadata: object) -> CaptureRequest | None:
    raw = {key.replace("_", "."): value for key, value in metadata.items()}
    return CaptureRequest.of(bind_options(CaptureOptions, raw, PATH), PATH)


def test_without_the_key_nothing_is_captured() -> None:
    assert request() is None


def test_lists_and_comma_separated_strings_say_the_same() -> None:
    listed = request(
        capture=["lan0", "local"], capture_exclude=["192.0.2.0/24", "fd00::1"], capture_ports=["80", "8000-8100"]
    )
    text = request(capture="lan0, local", capture_exclude="192.0.2.0/24,fd00::1", capture_ports="80,8000-8100")
    assert listed == text
    assert text is not None
    assert text.resource("s", "tcp", "redirect", Endpoint("::", 12345)) == Capture(
        "s",
        "tcp",
        "redirect",
        12345,
        ("lan0",),
        True,
        ("192.0.2.0/24", "fd00::1/128"),
        (),
        ((80, 80), (8000, 8100)),
        "",
    )


def test_a_listener_on_one_address_captures_for_it_only() -> None:
    wanted = request(capture="lan0")
    assert wanted is not None
    assert wanted.resource("s", "udp", "tproxy", Endpoint("10.0.0.1", 9)).address == "10.0.0.1"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"capture": "lan0", "capture_exclude": "10.0.0.0/33"}, r"capture\.exclude: '10\.0\.0\.0/33' is not a network"),
        ({"capture": "lan0", "capture_ports": "80-70"}, r"capture\.ports: '80-70' is not a port or range"),
        ({"capture": "lan0", "capture_ports": "0"}, r"capture\.ports: '0' is not"),
        ({"capture": "an-interface-name-too-long"}, r"capture: 'an-interface-name-too-long' is not an interface"),
        ({"direct_names": "true"}, r"direct\.names: says nothing without `capture`"),
        ({"capture": "lan0", "direct": "user", "direct_names": "true"}, r"direct\.names: says nothing with"),
        ({"capture_ports": "80"}, r"capture\.ports: says nothing without `capture`"),
    ],
)
def test_bad_values_are_refused_with_their_place(metadata: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=r"services\[0\]\.listener\.metadata\." + message):
        request(**metadata)


def test_the_keys_reach_a_listener_through_its_own_options() -> None:
    options = bind_options(RedOptions, {"Capture": "eth0", "tproxy": "true", "capture.Ports": "443"}, PATH)
    assert options.tproxy
    assert options.capture.capture == ["eth0"]
    assert options.capture.ports == ["443"]
