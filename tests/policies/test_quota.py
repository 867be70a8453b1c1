"""Quotas with a clock of their own, and the file that outlives the process. Names of tests carry the ids."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from gostnet.core.errors import QuotaDenied
from gostnet.core.flow import Flow, Shapers
from gostnet.core.tasks import Scope, run
from gostnet.dataplane.shaper import grant
from gostnet.policies.bucket import Rate, TokenBucket
from gostnet.policies.quota import Keeper, Quota, Side, Store, Terms, parse_direction, parse_time
from gostnet.policies.threads import Threads

SECOND = 10**9


class Wall:
    def __init__(self, seconds: float = 1000) -> None:
        self.now = int(seconds * SECOND)

    def __call__(self) -> int:
        return self.now


def sides(quota: Quota, *, cuts: bool = True) -> Shapers:
    shapers = Shapers()
    quota.shape(shapers, cuts=cuts)
    return shapers


def test_q01_in_and_out_count_together_and_the_limit_is_met_to_the_byte() -> None:
    told: list[str] = []
    quota = Quota("q", Terms(100), report=told.append)
    shapers = sides(quota)
    assert grant(shapers.up, 60) == 60
    assert not quota.blocked
    assert grant(shapers.down, 60) == 40
    assert quota.blocked
    assert told == ["quota q: the limit of 100 bytes is reached"]
    for direction in (shapers.up, shapers.down):
        with pytest.raises(QuotaDenied, match="'q' is used up"):
            grant(direction, 1)
    assert quota.used == 100


def test_what_is_granted_and_does_not_move_is_given_back() -> None:
    quota = Quota("q", Terms(1000))
    (side,) = sides(quota).up
    assert side.take(1 << 20) == 1000
    assert quota.blocked
    side.give_back(990)
    assert (quota.used, quota.blocked) == (10, False)


@pytest.mark.parametrize(("direction", "used"), [("in", 0), ("out", 500), ("total", 500)])
def test_q02_only_the_direction_counts(direction: Any, used: int) -> None:
    quota = Quota("q", Terms(1000, direction=direction))
    assert grant(sides(quota).down, 500) == 500
    assert quota.used == used
    quota.settle(Flow(), (0, 500), (0, 0))
    assert quota.used == 2 * used


@pytest.mark.parametrize("now", [99, 200, 300])
def test_q03_outside_the_window_nothing_counts_and_nothing_is_refused(now: int) -> None:
    wall = Wall(150)
    quota = Quota("q", Terms(10, 100 * SECOND, 200 * SECOND), wall)
    assert grant(sides(quota).up, 100) == 10
    assert quota.blocked
    wall.now = now * SECOND
    assert not quota.blocked
    assert grant(sides(quota).up, 1 << 20) == 1 << 20
    assert quota.used == 10
    assert quota.snapshot()["active"] is False
    assert quota.snapshot().get("expired", False) is (now >= 200)


def test_q04_a_reset_lets_everybody_go_on() -> None:
    quota = Quota("q", Terms(10))
    shapers = sides(quota)
    grant(shapers.up, 10)
    quota.reset()
    assert grant(shapers.up, 4) == 4
    assert quota.snapshot() == {"used": 4, "limit": 10, "active": True, "blocked": False, "direction": "total"}


def test_a_time_that_is_over_is_told_once_and_again_for_another_one() -> None:
    wall, told = Wall(150), list[str]()
    quota = Quota("q", Terms(10, 100 * SECOND, 200 * SECOND), wall, told.append)
    assert quota.take(20) == 10
    told.clear()
    wall.now = 200 * SECOND
    assert quota.take(20) == quota.take(20) == 20
    assert told == ["quota q: its time is over since 1970-01-01T00:03:20Z; it limits and counts nothing now"]
    quota.apply(Terms(10, 100 * SECOND, 300 * SECOND))
    assert quota.take(20) == 10
    quota.apply(Terms(10, 0, 160 * SECOND))
    assert "over since 1970-01-01T00:02:40Z" in told[-1], "without anybody coming"
    Quota("old", Terms(10, 0, 1), wall, told.append)
    assert told[-1].startswith("quota old: its time is over since 1970-01-01T00:00:00Z")


def test_q07_another_window_begins_again_and_another_limit_does_not() -> None:
    quota = Quota("q", Terms(100, 1, 0))
    grant(sides(quota).up, 60)
    quota.apply(Terms(50, 1, 0))
    assert (quota.used, quota.blocked) == (60, True)
    quota.apply(Terms(50, 2, 0))
    assert (quota.used, quota.blocked) == (0, False)


def test_q08_one_that_is_gone_holds_nobody_back() -> None:
    quota = Quota("q", Terms(10))
    shapers = sides(quota)
    grant(shapers.up, 10)
    quota.retire()
    assert grant(shapers.up, 100) == 100
    assert (quota.blocked, quota.used) == (False, 10)


def test_a_refusal_takes_nothing_from_the_limits_before_it() -> None:
    first, second = Quota("first", Terms(1000)), Quota("second", Terms(1))
    shapers = sides(first)
    second.shape(shapers, cuts=True)
    assert grant(shapers.up, 100) == 1
    with pytest.raises(QuotaDenied):
        grant(shapers.up, 100)
    assert first.used == 1
    bucket = TokenBucket(Rate(1000, 1000), lambda: 0.0)
    with pytest.raises(QuotaDenied):
        grant([bucket, *shapers.up], 500)
    assert bucket.take(1000) == 1000


def test_a_device_is_not_cut_but_nothing_moves() -> None:
    quota = Quota("q", Terms(10))
    shapers = sides(quota, cuts=False)
    assert grant(shapers.up, 100) == 10
    assert grant(shapers.up, 100) == 0
    assert shapers.up[0].delay() > 0
    quota.reset()
    assert grant(shapers.up, 5) == 5
    assert shapers.up[0].delay() == 0


def test_what_engines_did_not_ask_for_is_charged_once() -> None:
    quota = Quota("q", Terms())
    flow = Flow()
    flow.shapers = sides(quota)
    grant(flow.shapers.up, 100)
    charged = quota.settle(flow, (112, 12), (0, 0))
    assert (charged, quota.used) == ((12, 12), 124)
    charged = quota.settle(flow, (112, 12), charged)
    assert quota.used == 124
    grant(flow.shapers.down, 1000)
    quota.settle(flow, (112, 1012), charged)
    assert quota.used == 1124


# ---- the file ------------------------------------------------------------------------------------
def kept(path: Path, quota: Quota, wall: Wall | None = None) -> tuple[Keeper, Threads]:
    threads = Threads("test", 1)
    keeper = Keeper(threads, wall=wall or Wall())
    keeper.quotas[quota.name] = (quota, Store(str(path)))
    keeper.fresh.append(quota.name)
    return keeper, threads


def test_a_count_survives_in_gosts_form_and_only_for_its_window(tmp_path: Path) -> None:
    path = tmp_path / "quota.json"
    path.write_text('{"other": {"used": 5}}')

    async def main() -> None:
        quota = Quota("q", Terms(1000, 7, 0))
        keeper, threads = kept(path, quota, Wall(3))
        assert await keeper.load()
        grant(sides(quota).up, 321)
        scope = Scope("keeper")
        scope.start(keeper.run())
        await asyncio.sleep(0)
        await scope.cancel()
        for starts, used in ((7, 321), (8, 0)):
            again = Quota("q", Terms(5000, starts, 0))
            reader, more = kept(path, again)
            assert await reader.load()
            assert again.used == used
            more.close()
        threads.close()

    run(main())
    assert json.loads(path.read_text()) == {
        "other": {"used": 5},
        "q": {"used": 321, "limit": 1000, "startsAt": 7, "expiresAt": 0, "updatedAt": 3 * SECOND},
    }
    assert [found.name for found in tmp_path.iterdir()] == ["quota.json"]


def test_it_is_written_while_it_runs_and_only_when_it_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "quota.json"

    async def main() -> None:
        quota = Quota("q", Terms(flush=0.01))
        keeper, threads = kept(path, quota)
        grant(sides(quota).up, 5)
        scope = Scope("keeper")
        scope.start(keeper.run())
        while not path.exists():  # noqa: ASYNC110 - a file tells nobody
            await asyncio.sleep(0.005)
        assert json.loads(path.read_text())["q"]["used"] == 5
        path.unlink()
        await scope.cancel()
        assert not path.exists()
        threads.close()

    run(main())


def test_the_directory_of_the_file_is_made(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "lib" / "gostnet" / "quota.json"))
    store.write({"q": {"used": 5}})
    assert store.read() == {"q": {"used": 5}}


def test_what_could_not_be_written_is_written_when_it_can(tmp_path: Path) -> None:
    path = tmp_path / "lib" / "quota.json"
    path.parent.write_text("a file in the place of a directory")

    async def main() -> None:
        quota = Quota("q", Terms())
        keeper, threads = kept(path, quota)
        told: list[str] = []
        keeper._report = told.append
        grant(sides(quota).up, 5)
        keeper.save()
        path.parent.unlink()
        keeper.save()
        assert json.loads(path.read_text())["q"]["used"] == 5
        assert len(told) == 1
        assert str(path) in told[0]
        threads.close()

    run(main())


@pytest.mark.parametrize("text", ["nonsense", "[]", '{"q": 5}', '{"q": {"used": "5", "startsAt": 0, "expiresAt": 0}}'])
def test_a_file_that_makes_no_sense_is_told_and_begins_at_0(tmp_path: Path, text: str) -> None:
    path = tmp_path / "quota.json"
    path.write_text(text)

    async def main() -> None:
        quota = Quota("q", Terms())
        keeper, threads = kept(path, quota)
        told: list[str] = []
        keeper._report = told.append
        complete = await keeper.load()
        assert complete is not bool(told)
        assert quota.used == 0
        threads.close()

    run(main())


def test_times_and_directions_are_read_strictly() -> None:
    assert parse_time("") == 0
    assert parse_time("1970-01-01T00:00:01.5Z") == 1_500_000_000
    assert parse_time("1970-01-01T02:00:00+02:00") == 0
    for text in ("tomorrow", "2026-01-01T00:00:00"):
        with pytest.raises(ValueError, match=r"zone|isoformat|Invalid"):
            parse_time(text)
    assert [parse_direction(word) for word in ("", "IN", " out", "total")] == ["total", "in", "out", "total"]
    with pytest.raises(ValueError, match="sideways"):
        parse_direction("sideways")


def test_a_side_knows_what_it_let_through() -> None:
    quota = Quota("q", Terms(10))
    side = Side(quota, cuts=True)
    side.take(8)
    side.give_back(3)
    assert (side.taken, quota.used) == (5, 5)
