"""Where addresses are learnt to be, for how long, and how many."""

from __future__ import annotations

import pytest

from gostnet.protocols.tap import switch as module
from gostnet.protocols.tap.switch import AGEING, SILENCE, Switch

from .kit import mac


def known(under_test: Switch[str], number: int, now: float = 0.0) -> str | None:
    try:
        return under_test.find(mac(number), now) or "device"
    except KeyError:
        return None


def learn(under_test: Switch[str], number: int, peer: str | None, now: float = 0.0) -> None:
    if peer is not None:
        assert under_test.heard(peer, now) is not None
    under_test.learn(mac(number), peer, now)


def test_addresses_are_learnt_and_followed() -> None:
    under_test: Switch[str] = Switch()
    assert known(under_test, 1) is None
    learn(under_test, 1, "a")
    learn(under_test, 2, None)
    assert (known(under_test, 1), known(under_test, 2)) == ("a", "device")
    learn(under_test, 1, "b")
    assert known(under_test, 1) == "b"
    learn(under_test, 1, None)
    assert known(under_test, 1) == "device"


def test_a_peer_whose_last_address_has_moved_is_gone() -> None:
    under_test: Switch[str] = Switch()
    learn(under_test, 1, "a")
    learn(under_test, 2, "a")
    learn(under_test, 1, "b")
    assert under_test.peers == ["a", "b"]
    learn(under_test, 2, "b")
    assert under_test.peers == ["b"]


def test_floods_go_to_all_but_who_has_sent() -> None:
    under_test: Switch[str] = Switch()
    for number, peer in enumerate("abc"):
        learn(under_test, number, peer)
    assert under_test.others("b") == ["a", "c"]
    assert under_test.others(None) == ["a", "b", "c"]


def test_an_address_that_is_silent_may_be_anywhere_but_its_peer_stays() -> None:
    under_test: Switch[str] = Switch()
    learn(under_test, 1, "a")
    assert known(under_test, 1, AGEING) == "a"
    assert known(under_test, 1, AGEING + 1) is None
    under_test.sweep(AGEING + 1)
    assert under_test.peers == ["a"]
    under_test.sweep(SILENCE + 1)
    assert under_test.peers == []
    assert len(under_test) == 0


def test_a_full_table_learns_again_when_addresses_have_aged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ADDRESSES", 3)
    under_test: Switch[str] = Switch()
    for number in range(5):
        learn(under_test, number, "a")
    assert len(under_test) == 3
    assert known(under_test, 4) is None
    learn(under_test, 2, "a", AGEING)
    learn(under_test, 4, "a", AGEING + 1)
    assert [known(under_test, number, AGEING + 1) for number in range(5)] == [None, None, "a", None, "a"]


def test_too_many_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PEERS", 2)
    under_test: Switch[str] = Switch()
    learn(under_test, 1, "a")
    learn(under_test, 2, "b")
    assert under_test.heard("c", 1.0) is None
    assert under_test.heard("b", AGEING) is False
    assert under_test.heard("c", AGEING + 1) is True
    assert under_test.peers == ["b", "c"]
    assert known(under_test, 1, 2.0) is None
