"""Statistics of several workers: what each has counted adds up, and outlives it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from gostnet.core.address import ANY, Endpoint
from gostnet.core.flow import Flow
from gostnet.policies import board as module
from gostnet.policies.board import NOTHING, RECORD, Board, Totals
from gostnet.policies.ledger import SUPERVISOR, Ledger
from gostnet.policies.merged import MergedBooks
from gostnet.policies.stats import Reading, ServiceBooks, Stats

Parts = tuple[Totals, Board, Board]


@pytest.fixture
def parts() -> Iterator[Parts]:
    """What the supervisor has, and two workers."""
    ledger = Ledger.create(2, SUPERVISOR)
    first, second = (Ledger(ledger.descriptor, 2, worker).board() for worker in (0, 1))
    yield ledger.totals(), first, second
    os.close(ledger.descriptor)


def counted(board: Board, service: str, client: str | None, *counts: int) -> Stats:
    stats = Stats()
    stats.take_over(tuple(counts))  # type: ignore[arg-type]  # five of them
    assert stats.place_on(board, service, client)
    return stats


def test_the_counts_of_all_workers_add_up(parts: Parts) -> None:
    totals, first, second = parts
    counted(first, "s", None, 1, 1, 10, 20, 0)
    there = counted(second, "s", None, 2, 0, 30, 40, 1)
    counted(second, "s2", None, 9, 9, 9, 9, 9)
    assert totals.of("s") == (3, 1, 40, 60, 1)
    there.total += 1
    assert totals.of("s") == (3, 1, 40, 60, 1)
    there.publish()
    assert totals.of("s") == (4, 1, 40, 60, 1)
    assert totals.of("none") == NOTHING
    assert totals.clients("s") == {}


def test_clients_add_up_too_and_have_names(parts: Parts) -> None:
    totals, first, second = parts
    counted(first, "s", "", 1, 0, 1, 1, 0)
    counted(first, "s", "müller", 1, 1, 5, 5, 0)
    counted(second, "s", "müller", 1, 0, 7, 7, 0)
    counted(second, "other", "müller", 1, 0, 7, 7, 0)
    assert totals.clients("s") == {"": (1, 0, 1, 1, 0), "müller": (2, 1, 12, 12, 0)}


def test_what_a_dead_worker_has_counted_stays_but_for_its_connections(parts: Parts) -> None:
    totals, first, second = parts
    counted(first, "s", None, 3, 2, 30, 40, 1)
    counted(first, "s", "u", 3, 2, 30, 40, 0)
    counted(second, "s", None, 1, 1, 1, 1, 0)
    assert totals.busy(0)
    totals.bury(0)
    assert not totals.busy(0)
    assert totals.busy(1)
    assert totals.of("s") == (4, 1, 31, 41, 1)
    assert totals.clients("s") == {"u": (3, 0, 30, 40, 0)}


def test_a_successor_begins_with_an_empty_plane() -> None:
    ledger = Ledger.create(1, SUPERVISOR)
    totals = ledger.totals()
    for deaths in range(3):
        successor = Ledger(ledger.descriptor, 1, 0).board()
        counted(successor, "s", None, 1, 0, 10, 10, 0)
        assert totals.of("s") == (deaths + 1, 0, 10 * (deaths + 1), 10 * (deaths + 1), 0)
        totals.bury(0)
    totals.forget(["s"])
    assert totals.of("s") == NOTHING
    os.close(ledger.descriptor)


def test_a_service_that_has_gone_is_not_remembered_for_the_dead(parts: Parts) -> None:
    totals, first, second = parts
    counted(first, "gone", None, 1, 0, 10, 10, 0)
    counted(second, "gone", None, 1, 0, 10, 10, 0)
    totals.bury(1)
    totals.forget(["gone"])
    totals.bury(0)
    assert totals.of("gone") == NOTHING


def test_what_is_hidden_makes_room_for_others(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    totals, first, _ = parts
    monkeypatch.setattr(module, "ROOM", 2)
    one = counted(first, "s", "one", 1, 0, 1, 1, 0)
    counted(first, "s", "two", 2, 0, 2, 2, 0)
    three = Stats(3)
    assert not three.place_on(first, "s", "three")
    three.publish()
    one.hide()
    assert three.place_on(first, "s", "three")
    assert totals.clients("s") == {"two": (2, 0, 2, 2, 0), "three": (3, 0, 0, 0, 0)}
    one.total = 100
    one.publish()
    assert totals.clients("s")["three"] == (3, 0, 0, 0, 0), "who is hidden writes nowhere"


def test_names_that_are_too_long_are_told_apart(parts: Parts) -> None:
    totals, first, second = parts
    same = "x" * RECORD
    counted(first, "s", same + "1", 1, 0, 0, 0, 0)
    counted(second, "s", same + "1", 1, 0, 0, 0, 0)
    counted(second, "s", same + "2", 1, 0, 0, 0, 0)
    found = totals.clients("s")
    assert sorted(counts[0] for counts in found.values()) == [1, 2]
    assert all(name.startswith("xxx") and len(name) < RECORD for name in found)
    assert totals.of("s", same + "1")[0] == 2


def test_a_service_that_comes_back_counts_what_its_old_connections_still_move(parts: Parts) -> None:
    totals, first, _ = parts
    old = counted(first, "s", None, 1, 1, 10, 0, 0)
    counted(first, "s", None, 1, 0, 5, 0, 0)
    assert totals.of("s") == (2, 1, 15, 0, 0)
    old.hide()
    assert totals.of("s") == (1, 0, 5, 0, 0)


# ---- books ---------------------------------------------------------------------------------------
def begun(books: ServiceBooks, user: str) -> tuple[Flow, object]:
    flow = Flow("s", Endpoint("192.0.2.1", 5), ANY)
    entry = books.enter(flow, object())
    flow.user = user
    flow.connected = True
    return flow, entry


def test_merged_books_tell_what_one_process_would(parts: Parts) -> None:
    totals, *boards = parts
    working = [ServiceBooks("s", by_client=True, board=board) for board in boards]
    merged = MergedBooks("s", totals, by_client=True, shown=True)
    service, clients = Reading(), Reading(reset=True)
    flow, _ = begun(working[0], "u")
    assert merged.service_events(service)[0]["stats"]["currentConns"] == 1
    flow.meter.up, flow.meter.down = 5, 15
    other, entry = begun(working[1], "u")
    other.meter.up = 1
    entry.leave()  # type: ignore[attr-defined]
    working[0].settle()
    expected = {"totalConns": 2, "currentConns": 1, "inputBytes": 6, "outputBytes": 15, "totalErrs": 0}
    assert merged.service_events(service)[0]["stats"] == expected
    assert merged.client_events(clients)[0] == {
        "kind": "handler",
        "service": "s",
        "client": "u",
        "type": "stats",
        "stats": expected,
    }
    assert merged.status() == {"stats": expected}
    assert merged.service_events(service) == []
    totals.bury(1)
    assert merged.service_events(service) == [], "a death changes nothing that was counted"
    totals.bury(0)
    assert merged.client_events(clients)[0]["stats"] == {
        **expected,
        "currentConns": 0,
        "inputBytes": 0,
        "outputBytes": 0,
    }


def test_a_client_that_is_forgotten_makes_room(monkeypatch: pytest.MonkeyPatch, parts: Parts) -> None:
    totals, first, _ = parts
    monkeypatch.setattr(module, "ROOM", 3)
    books = ServiceBooks("s", by_client=True, board=first)
    for number in range(5):
        flow, entry = begun(books, f"u{number}")
        flow.meter.up = number + 1
        entry.leave()  # type: ignore[attr-defined]
    found = totals.clients("s")
    assert {name: counts[2] for name, counts in found.items()} == {"u3": 4, "u4": 5}


def test_books_that_are_hidden_count_on_for_nobody(parts: Parts) -> None:
    totals, first, _ = parts
    books = ServiceBooks("s", by_client=True, board=first)
    _, entry = begun(books, "u")
    books.hide()
    entry.leave()  # type: ignore[attr-defined]
    begun(books, "v")[1].leave()  # type: ignore[attr-defined]
    assert totals.of("s") == NOTHING
    assert totals.clients("s") == {}
    assert books.stats.total == 2
