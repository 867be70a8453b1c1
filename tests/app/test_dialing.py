"""What is tried before a start: which refusals count."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence

import pytest

from gostnet.app import dialing
from gostnet.app.dialing import Trials, dial_options
from gostnet.core.errors import ConfigError
from gostnet.core.sockets import SO_BINDTODEVICE


class Strict(socket.socket):
    """A socket whose options take privileges, as on a kernel before 5.7."""

    code = errno.EPERM

    def setsockopt(self, level: int, option: int, *rest: object) -> None:  # type: ignore[override]
        if option in (socket.SO_MARK, SO_BINDTODEVICE):
            raise OSError(self.code, os.strerror(self.code))


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialing, "make_socket", lambda family, kind, netns: Strict(family, kind))


def tried(interface: str, mark: int = 0) -> None:
    Trials({"services[0]": dial_options(interface, mark, "", 0)}).run()


@pytest.mark.parametrize(
    ("interface", "mark", "message"),
    [
        ("eth7", 0, "interface 'eth7' may not be bound to"),
        ("", 5, "so_mark 0x5 may not be put on sockets"),
        ("eth7,127.0.0.1", 5, "so_mark 0x5 may not be put on sockets"),
    ],
)
def test_what_takes_a_privilege_is_refused(strict: None, interface: str, mark: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        tried(interface, mark)
    assert "CAP_NET_" in caught.value.hint


def test_an_alternative_that_works_is_enough(strict: None) -> None:
    tried("eth7,127.0.0.1")


def test_what_is_not_there_refuses_nothing(strict: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Strict, "code", errno.ENODEV)
    tried("eth7!")


@pytest.mark.parametrize("items", [["eth7"], ["eth7!", "203.0.113.9"]])
def test_ways_keep_their_order(items: Sequence[str]) -> None:
    ways = dial_options(",".join(items), 0, "", 0)
    assert [way.interface for way in ways] == [item.removesuffix("!") for item in items]
    assert [way.strict for way in ways] == [item.endswith("!") for item in items]
