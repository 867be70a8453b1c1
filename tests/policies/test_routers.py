"""Routers: rows O01-O06 and O09, what the kernel can hold of a table, and tables that are read again."""

from __future__ import annotations

from pathlib import Path

import pytest

from gostnet.config.decode import Decoder
from gostnet.config.parse import parse
from gostnet.config.schema import Config
from gostnet.config.tree import Source
from gostnet.core.resources import Route
from gostnet.core.tasks import run
from gostnet.policies.build import Build, build_routers
from gostnet.policies.entries import lines
from gostnet.policies.routers import RouteEntry, RouteTable, StaticRouter, compile_routes

ROWS = (
    ("10.0.0.0/8", "g1"),
    ("10.1.0.0/16", "g2"),
    ("10.1.2.3", "g3"),
    ("0.0.0.0/0", "g4"),
    ("fd00::/8", "g5"),
    ("tun-name", "g6"),
)


def router(*rows: tuple[str, str]) -> StaticRouter:
    return StaticRouter(RouteTable(RouteEntry(*row) for row in rows))


@pytest.mark.parametrize(
    ("destination", "gateway"),
    [
        ("10.1.2.3", "g3"),
        ("10.1.2.4", "g2"),
        ("10.2.0.1", "g1"),
        ("8.8.8.8", "g4"),
        ("::ffff:10.1.2.4", "g2"),
        ("fd00::1", "g5"),
        ("fe80::1", None),
        ("tun-name", "g6"),
        ("10.1.0.0/16", "g2"),
        ("10.9.0.0/16", None),
        ("other-name", None),
        ("", None),
    ],
)
def test_the_longest_prefix_counts(destination: str, gateway: str | None) -> None:
    for rows in (ROWS, ROWS[::-1]):
        found = router(*rows).get_route(destination)
        assert (found.gateway if found else None) == gateway


def test_of_two_routes_to_one_network_the_first_counts() -> None:
    assert router(("10.0.0.0/8", "one"), ("10.9.9.9/8", "two")).get_route("10.1.1.1").gateway == "one"  # type: ignore[union-attr]


def test_an_address_is_a_network_of_one() -> None:
    under_test = router(("192.168.1.0", "g"))
    found = under_test.get_route("192.168.1.0")
    assert found is not None
    assert (str(found.network), found.destination, found.protocol) == ("192.168.1.0/32", "192.168.1.0", "static")
    assert under_test.get_route("192.168.1.100") is None


def test_routes_to_one_network_or_of_one_origin_only() -> None:
    under_test = router(*ROWS)
    assert under_test.get_route("10.1.2.3", network="10.0.0.0/8").gateway == "g1"  # type: ignore[union-attr]
    assert under_test.get_route("10.1.2.3", network="192.0.2.0/24") is None
    assert under_test.get_route("10.1.2.3", protocol="static").gateway == "g3"  # type: ignore[union-attr]
    assert under_test.get_route("10.1.2.3", protocol="bgp") is None


def test_what_the_kernel_can_hold() -> None:
    under_test = router(
        ("10.77.0.0/16", "192.0.2.1"),
        ("10.78.1.1/16", "192.0.2.2"),
        ("10.77.0.0/16", "192.0.2.9"),
        ("10.79.0.1", "192.0.2.1"),
        ("10.80.0.0/16", "some-name"),
        ("fd77::/16", "192.0.2.1"),
        ("fd78::/16", "fe80::1"),
        ("name", "192.0.2.1"),
    )
    assert under_test.resources() == (
        Route("10.77.0.0/16", gateway="192.0.2.1"),
        Route("10.78.0.0/16", gateway="192.0.2.2"),
        Route("fd78::/16", gateway="fe80::1"),
    )
    assert all(isinstance(item, Route) and item.tentative for item in under_test.resources())


def test_bad_lines_are_left_out_and_blank_ones_and_comments_are_none() -> None:
    data = b"# a comment\n\n10.0.0.0/8 g1 # behind\n10.0.0.0/99 g2\nonly-one\na b c\nname  g3\n"
    table, problems = compile_routes((), lines(data, "file r"))
    assert [(route.destination, route.gateway) for route in table.routes] == [("10.0.0.0/8", "g1"), ("name", "g3")]
    assert [problem.path for problem in problems] == [f"file r: line {number}" for number in (4, 5, 6)]


def test_a_new_table_is_told() -> None:
    under_test = router(*ROWS)
    told: list[int] = []
    under_test.changed.append(lambda: told.append(under_test.generation))
    before = under_test.generation
    under_test.replace(RouteTable())
    assert told == [before + 1]
    assert under_test.get_route("10.1.2.3") is None


def test_who_has_the_router_of_before_a_reload_sees_the_new_table() -> None:
    first, second, third = router(*ROWS), router(("10.0.0.0/8", "new")), router(("10.0.0.0/8", "newest"))
    told: list[str] = []
    first.changed.append(lambda: told.append("first"))
    second.take_over(first)
    assert first.get_route("10.1.2.3") == second.get_route("10.1.2.3")
    assert first.generation == second.generation
    third.take_over(second)
    third.replace(RouteTable([RouteEntry("10.0.0.0/8", "last")]))
    assert first.get_route("10.1.2.3").gateway == "last"  # type: ignore[union-attr]
    assert told == ["first"] * 3


# ---- configuration ----------------------------------------------------------------------------------
def config_of(text: str) -> Config:
    decoder = Decoder()
    config = decoder.config(parse(text, "yaml", Source("f", "file")))
    assert decoder.problems == []
    return config


def test_sections_and_their_errors() -> None:
    text = """
    routers:
    - name: r
      routes:
      - {dst: 10.0.0.0/8, gateway: 192.0.2.1}
      - {net: 10.1.0.0/16, gateway: 192.0.2.2}
      - {dst: 10.2.0.0/16}
      - {gateway: 192.0.2.3}
      - {net: 10.3.0.0/77, gateway: 192.0.2.3}
    - name: cached
      redis: {addr: "localhost:6379"}
    """
    build = Build()
    routers = build_routers(config_of(text), build)
    build.close()
    assert [route.destination for route in routers["r"].table.routes] == ["10.0.0.0/8", "10.1.0.0/16"]
    assert [problem.path for problem in build.problems] == [
        "routers[0].routes[2].gateway",
        "routers[0].routes[3].dst",
        "routers[0].routes[4].net",
        "routers[1].redis",
    ]


def test_a_file_is_read_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "routes"
    path.write_text("10.1.0.0/16 192.0.2.2\n")
    text = f"""
    routers:
    - name: r
      reload: 10s
      routes: [{{dst: 10.0.0.0/8, gateway: 192.0.2.1}}]
      file: {{path: {path}}}
    """

    async def main() -> None:
        build = Build()
        router = build_routers(config_of(text), build)["r"]
        (reloader,) = build.reloaders
        assert reloader.period == 10.0
        assert await reloader.load()
        assert router.get_route("10.1.2.3").gateway == "192.0.2.2"  # type: ignore[union-attr]
        path.write_text("10.1.2.0/24 192.0.2.3\n")
        assert await reloader.load()
        assert router.get_route("10.1.2.3").gateway == "192.0.2.3"  # type: ignore[union-attr]
        assert router.get_route("10.1.3.3").gateway == "192.0.2.1"  # type: ignore[union-attr]
        assert [str(item.key[2]) for item in router.resources()] == ["10.0.0.0/8", "10.1.2.0/24"]
        build.close()

    run(main())
