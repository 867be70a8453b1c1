"""Which names go directly, what their answers do to the kernel, and what is refused."""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import Callable, Mapping, Sequence
from socket import inet_pton
from typing import Any

import pytest
import yaml

from gostnet.app import direct, direct_names
from gostnet.app.daemon import assemble
from gostnet.app.direct import DirectKeeper, DirectWays, notes
from gostnet.app.direct_names import LEAST, MOST, SLACK, DirectNames, Target
from gostnet.app.direct_names import direct_names as names_of
from gostnet.app.kernel import Wanted, wanted_by
from gostnet.config.argv import parse_args
from gostnet.config.load import Loader
from gostnet.core.address import Endpoint
from gostnet.core.errors import ConfigError, KernelError
from gostnet.core.log import DEBUG, Logger, Sink
from gostnet.core.resources import NAMED_TIMEOUT, Capture, names_set
from gostnet.core.tasks import Scope, run
from gostnet.kernel.nft import Additions
from gostnet.pipeline.chain import Chain
from gostnet.pipeline.hop import Hop
from gostnet.pipeline.node import Node
from gostnet.policies.bypass import PatternBypass, combine
from gostnet.protocols.dns.handler import DnsHandler

NOW = 1000.0


class Clock:
    now = NOW

    def __call__(self) -> float:
        return self.now


class Lines(Sink):
    def __init__(self) -> None:
        super().__init__(-1)
        self.lines: list[dict[str, Any]] = []

    def write(self, line: bytes) -> None:
        self.lines.append(json.loads(line))

    def of(self, level: str) -> list[str]:
        return [str(line["msg"]) for line in self.lines if line["level"] == level]


class Sets:
    """A kernel that notes what it was given, by set and address."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Additions]] = []
        self.failure: KernelError | None = None
        self.left_out: dict[Any, KernelError] = {}

    def apply(self, wanted: Wanted) -> list[Any]:
        return []

    def recover(self) -> list[Any]:
        return []

    def rollback(self) -> list[Any]:
        return []

    def claim(self, homes: Any) -> None:
        pass

    def admit(self, netns: str, additions: Additions) -> None:
        if self.failure is not None:
            raise self.failure
        self.calls.append((netns, additions))

    def take(self) -> dict[str, dict[bytes, float]]:
        calls, self.calls = self.calls, []
        return {name: dict(elements) for _, additions in calls for name, elements in additions.items()}


def packed(text: str) -> bytes:
    return inet_pton(10 if ":" in text else 2, text)


def bypass(*patterns: str, whitelist: bool = False, network: str = "") -> PatternBypass:
    return PatternBypass.from_patterns(patterns, whitelist=whitelist, network=network)


def target(*lists: PatternBypass, netns: str = "") -> Target:
    names = names_of(chain(*lists), "tcp")
    assert names is not None
    return Target("s", netns, names, tuple(each for each in lists if each.whitelist))


class World:
    def __init__(self, *targets: Target) -> None:
        self.kernel, self.sink, self.clock = Sets(), Lines(), Clock()
        self.names = DirectNames(self.clock)
        self.retarget(*targets)

    def retarget(self, *targets: Target) -> None:
        self.names.change(self.kernel, targets, Logger(self.sink, DEBUG), lambda: None)

    def answer(self, name: str, *addresses: str, ttl: int = 300) -> dict[str, dict[bytes, float]]:
        run(self.names.answered(name, [packed(a) for a in addresses], ttl))
        return self.kernel.take()


# ---- which names --------------------------------------------------------------------------------
def chain(*bypasses: PatternBypass, nodes: Sequence[PatternBypass | None] = ()) -> Chain:
    nobody: Any = None  # is dialled
    listed = [Node(f"n{index}", Endpoint("192.0.2.1", 1), nobody, nobody, bypass=of) for index, of in enumerate(nodes)]
    return Chain("c", [Hop("h", listed, bypass=combine(bypasses))] if bypasses or nodes else [], nobody)


@pytest.mark.parametrize(
    ("made", "network", "direct", "other"),
    [
        (chain(bypass("*.example.com", "example.org")), "tcp", ["a.example.com", "example.org"], ["example.com"]),
        (chain(bypass(".example.com")), "udp", ["example.com", "a.b.example.com"], ["notexample.com"]),
        (chain(bypass("example.com:443")), "tcp", [], ["example.com"]),
        (chain(bypass("a.test", network="udp"), bypass("b.test")), "tcp", ["b.test"], ["a.test"]),
        (chain(nodes=[bypass("*.test"), bypass("b.*")]), "tcp", ["b.test"], ["a.test", "b.example"]),
        (chain(bypass("a.test"), nodes=[bypass("b.test")]), "tcp", ["a.test", "b.test"], ["c.test"]),
        (chain(bypass("w.test", whitelist=True), bypass("b.test")), "tcp", ["b.test"], ["w.test", "c.test"]),
    ],
)
def test_names_go_directly_that_a_list_has_at_any_port(
    made: Chain, network: Any, direct: list[str], other: list[str]
) -> None:
    names = names_of(made, network)
    assert names is not None
    assert [name for name in (*direct, *other) if name in names] == direct


@pytest.mark.parametrize(
    "made",
    [
        chain(bypass("a.test", whitelist=True)),
        chain(nodes=[bypass("a.test"), None]),
        chain(bypass("a.test", network="udp")),
        chain(),
    ],
)
def test_there_are_none_where_no_list_can_have_any(made: Chain) -> None:
    assert names_of(made, "tcp") is None


def test_what_stands_for_a_list_changes_with_its_names_only() -> None:
    assert target(bypass("a.test", "10.0.0.0/8")).word == target(bypass("10.1.0.0/16", "a.test")).word
    words = {target(bypass(*each)).word for each in (["a.test"], ["*.a.test"], [".a.test"], ["a.test:80"], ["a?test"])}
    assert len(words) == 5


# ---- what an answer does ------------------------------------------------------------------------
def test_an_answers_addresses_stay_as_long_as_it_holds_within_bounds() -> None:
    of = target(bypass("*.direct.test"))
    world = World(of)
    v4, v6 = names_set(4, of.word), names_set(6, of.word)
    assert world.answer("a.direct.test", "203.0.113.1", "203.0.113.2") == {
        v4: {packed("203.0.113.1"): 300.0, packed("203.0.113.2"): 300.0}
    }
    assert world.answer("a.direct.test", "2001:db8::1", ttl=1) == {v6: {packed("2001:db8::1"): LEAST}}
    assert world.answer("b.direct.test", "203.0.113.3", ttl=1 << 31) == {v4: {packed("203.0.113.3"): NAMED_TIMEOUT}}
    assert world.answer("proxied.test", "203.0.113.4") == {}


@pytest.mark.parametrize(
    "address",
    [
        *("10.0.0.1", "192.168.1.1", "172.31.255.255", "127.0.0.2", "169.254.1.1", "0.0.0.0", "224.0.0.1"),
        *("100.64.0.1", "255.255.255.255", "::1", "::", "::ffff:203.0.113.1", "fd00::1", "fe80::1", "ff02::1"),
    ],
)
def test_no_answer_opens_a_way_to_what_is_nobodys(address: str) -> None:
    assert World(target(bypass("*"))).answer("a.test", address) == {}


def test_nor_to_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_names, "is_own_address", lambda host, netns: host == "203.0.113.1")
    of = target(bypass("*"))
    assert World(of).answer("a.test", "203.0.113.1", "203.0.113.2") == {
        names_set(4, of.word): {packed("203.0.113.2"): 300.0}
    }


def test_an_address_that_a_whitelist_has_goes_by_the_proxy_whatever_its_name() -> None:
    world = World(target(bypass("203.0.113.0/24", "198.51.100.1:80", "w.test", whitelist=True), bypass("a.test")))
    assert world.answer("a.test", "203.0.113.1") == {}
    assert world.answer("a.test", "198.51.100.1") == {}
    assert world.answer("a.test", "198.51.100.2") != {}
    textual = World(target(bypass("203.*", whitelist=True), bypass("a.test")))
    assert textual.answer("a.test", "198.51.100.2") == {}


def test_the_kernel_is_not_told_again_what_it_knows() -> None:
    world = World(target(bypass("a.test")))
    assert world.answer("a.test", "203.0.113.1", ttl=100)
    assert not world.answer("a.test", "203.0.113.1", ttl=100)
    world.clock.now += SLACK
    assert not world.answer("a.test", "203.0.113.1", ttl=100 - int(SLACK))
    world.clock.now += 1
    assert world.answer("a.test", "203.0.113.1", ttl=100)
    assert len(world.names) == 1


def test_an_address_of_two_names_stays_as_long_as_the_longer_of_them() -> None:
    of = target(bypass("a.test", "b.test"))
    world = World(of)
    world.answer("a.test", "203.0.113.1", ttl=1000)
    world.clock.now += 100
    assert world.answer("b.test", "203.0.113.1", ttl=60) == {names_set(4, of.word): {packed("203.0.113.1"): 900.0}}


def test_other_lists_have_other_sets_with_what_is_still_direct() -> None:
    old = bypass("a.test", "b.test")
    world = World(target(old))
    world.answer("a.test", "203.0.113.1", "203.0.113.9")
    world.answer("b.test", "203.0.113.2", "203.0.113.9", ttl=600)
    world.clock.now += 100
    fresh = target(bypass("a.test"))
    world.retarget(fresh)
    left = {packed("203.0.113.1"): 200.0, packed("203.0.113.9"): 200.0}
    assert world.kernel.take() == {names_set(4, fresh.word): left}
    world.clock.now += 1000
    world.retarget(target(old))
    assert world.kernel.take() == {}
    assert len(world.names) == 0


def test_a_list_that_loses_a_name_admits_it_no_more_even_before_it_was_applied() -> None:
    listed = bypass("a.test")
    world = World(target(listed))
    listed.replace(bypass("b.test").patterns)
    assert world.answer("a.test", "203.0.113.1") == {}


def test_namespaces_have_their_own_sets_and_captures_that_decide_alike_share_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(direct_names, "is_own_address", lambda host, netns: False)
    here, alike, there = target(bypass("*.test")), target(bypass("*.test")), target(bypass("a.test"), netns="ns")
    world = World(here, alike, there)
    run(world.names.answered("a.test", [packed("203.0.113.1"), packed("203.0.113.2")], 60))
    assert [(netns, list(additions)) for netns, additions in world.kernel.calls] == [
        ("", [names_set(4, here.word)]),
        ("ns", [names_set(4, there.word)]),
    ]


def test_what_is_beyond_the_bound_is_left_to_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_names, "MOST", 3)
    world = World(target(bypass("*")))
    for number in range(6):
        world.answer(f"{number}.test", f"203.0.113.{number}")
    assert len(world.names) == 3
    assert len(world.sink.of("warn")) == 1
    world.clock.now += 301
    assert world.answer("6.test", "203.0.113.6"), "those that are over make room"
    assert MOST <= 32768


def test_a_kernel_that_refuses_is_asked_no_more_and_that_is_told_once() -> None:
    of = target(bypass("*.test"))
    world = World(of)
    world.kernel.failure = KernelError("nft add element", errno.ENOMEM)
    for number in range(3):
        assert world.answer(f"{number}.test", "203.0.113.1") == {}
    assert world.sink.of("warn") == [
        "engine kernel gives way to user: direct.names: nft add element: Cannot allocate memory"
    ]
    world.kernel.failure = None
    assert world.answer("3.test", "203.0.113.1") == {}
    world.retarget(of)
    assert world.answer("3.test", "203.0.113.1"), "another configuration tries again"


def test_a_namespace_that_is_gone_is_no_error_of_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(target(bypass("a.test"), netns="gone"))
    assert world.answer("a.test", "203.0.113.1") == {}
    (line,) = world.sink.of("warn")
    assert line.startswith("engine kernel gives way to user: direct.names: open network namespace 'gone'")


# ---- a configuration ----------------------------------------------------------------------------
def settings(**changes: Any) -> dict[str, Any]:
    """A service that captures what the host sends, with a name service beside it."""
    node = {"name": "proxy", "addr": "192.0.2.1:1080", "connector": {"type": "socks5"}, "dialer": {"type": "tcp"}}
    made: dict[str, Any] = {
        "services": [
            {
                "name": "s",
                "addr": ":12345",
                "handler": {"type": "red", "chain": "out", "metadata": {"sniffing": changes.pop("sniffing", False)}},
                "listener": {"type": "red", "metadata": {"capture": "local", "direct.names": True}},
            },
            {"name": "dns", "addr": "127.0.0.1:5353", "handler": {"type": "dns"}, "listener": {"type": "dns"}},
        ],
        "chains": [{"name": "out", "hops": [{"name": "h", "bypass": "direct", "nodes": [node]}]}],
        "bypasses": [{"name": "direct", "matchers": ["*.direct.test", "192.0.2.0/24"]}],
    }
    made["services"][0]["listener"]["metadata"].update(changes.pop("listener", {}))
    made["services"][0].update(changes.pop("service", {}))
    made.update(changes)
    return made


def ways(tmp_path: Any, made: Mapping[str, Any]) -> DirectWays:
    path = tmp_path / "gostnet.yaml"
    path.write_text(yaml.safe_dump(dict(made)))
    return DirectWays(assemble(Loader(parse_args(["run", "-C", str(path)])).load()).services)


@pytest.mark.parametrize("sniffing", [False, True])
def test_a_capture_that_asks_for_it_gets_sets_and_the_name_service_tells(tmp_path: Any, sniffing: bool) -> None:
    found = ways(tmp_path, settings(sniffing=sniffing))
    kernel = Sets()
    found.apply(kernel, wanted_by(found.services.values()))
    (verdict,) = found.verdicts.values()
    assert verdict.target is not None
    assert verdict.around is not None
    assert verdict.around.names == verdict.target.word
    assert bool(verdict.around.ranges) is not sniffing
    handler = found.services["dns"].handler
    assert isinstance(handler, DnsHandler)
    assert handler.answered == found.names.answered
    run(found.names.answered("a.direct.test", [packed("203.0.113.1")], 60))
    assert list(kernel.take()) == [names_set(4, verdict.target.word)]
    assert any("come into the sets names4_" in note for note in notes(found))


def test_who_does_not_ask_for_it_pays_nothing(tmp_path: Any) -> None:
    found = ways(tmp_path, settings(listener={"direct.names": False}))
    found.apply(Sets(), wanted_by(found.services.values()))
    handler = found.services["dns"].handler
    assert isinstance(handler, DnsHandler)
    assert handler.answered is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"listener": {"capture": "lan0"}}, "would have to be forwarded: set direct: kernel as well"),
        ({"bypasses": [{"name": "direct", "whitelist": True, "matchers": ["a.test"]}]}, "a whitelist has others"),
        ({"service": {"climiter": "few"}, "climiters": [{"name": "few", "limits": ["$ 100"]}]}, "climiter counts"),
        ({"service": {"bypass": "direct"}}, "own bypass may refuse"),
        ({"service": {"handler": {"type": "red"}}}, "there is no chain"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(tmp_path: Any, changes: dict[str, Any], reason: str) -> None:
    found = ways(tmp_path, settings(**changes))
    with pytest.raises(ConfigError, match=reason):
        found.added_to(wanted_by(found.services.values()))


def test_so_it_is_where_nobody_answers_names(tmp_path: Any) -> None:
    made = settings()
    del made["services"][1]
    found = ways(tmp_path, made)
    with pytest.raises(ConfigError, match="no service of the handler dns"):
        found.added_to(wanted_by(found.services.values()))


def test_and_where_another_process_holds_the_table(tmp_path: Any) -> None:
    class Elsewhere:
        left_out: Mapping[Any, KernelError] = {}
        apply: Callable[[Wanted], list[Any]] = staticmethod(lambda wanted: [])

    found = ways(tmp_path, settings())
    with pytest.raises(ConfigError, match="another process holds the sets"):
        found.apply(Elsewhere(), wanted_by(found.services.values()))  # type: ignore[arg-type]


# ---- a kernel that does not take sets ---------------------------------------------------------------
class Picky(Sets):
    """A kernel that refuses captures which go around something, as long as it does."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Any] = []
        self.refusal: KernelError | None = KernelError("nft add set", errno.EMSGSIZE)

    def apply(self, wanted: Wanted) -> list[Any]:
        captures = [item for items in wanted.values() for item in items if isinstance(item, Capture)]
        if self.refusal is not None and any(item.around for item in captures):
            raise self.refusal
        self.held = captures
        return []


def test_sets_that_the_kernel_does_not_take_leave_it_to_the_daemon_which_is_told_once(tmp_path: Any) -> None:
    found = ways(tmp_path, settings())
    kernel, sink = Picky(), Lines()
    found.log = Logger(sink, DEBUG)
    for _ in range(2):
        found.apply(kernel, wanted_by(found.services.values()))
    assert [item.around for item in kernel.held] == [None]
    assert sink.of("warn") == ["engine kernel gives way to user: direct traffic: nft add set: Message too long"]
    assert any("the kernel does not take the sets" in note for note in notes(found))
    handler = found.services["dns"].handler
    assert isinstance(handler, DnsHandler)
    assert handler.answered is None
    kernel.refusal = None
    found.apply(kernel, wanted_by(found.services.values()))
    assert kernel.held[0].around is not None
    assert handler.answered is not None


def test_who_demands_the_kernel_is_refused_at_the_start_and_left_to_the_daemon_later(tmp_path: Any) -> None:
    found = ways(tmp_path, settings(listener={"direct": "kernel"}))
    kernel = Picky()
    with pytest.raises(KernelError, match="Message too long"):
        found.apply(kernel, wanted_by(found.services.values()))
    assert kernel.held == []
    found.apply(kernel, wanted_by(found.services.values()), yields=True)
    assert [item.around for item in kernel.held] == [None]


def test_while_it_runs_a_list_that_changes_is_no_reason_to_go_on_around_what_it_has_lost(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "SETTLE", 0.0)
    found = ways(tmp_path, settings(listener={"direct": "kernel"}))
    kernel, sink = Picky(), Lines()
    kernel.refusal = None
    found.log = Logger(sink, DEBUG)
    (listed,) = found.lists()

    async def main() -> None:
        applied = asyncio.Event()
        loop = asyncio.get_running_loop()
        real = found.apply

        def apply(*arguments: Any, **named: Any) -> list[Any]:
            try:
                return real(*arguments, **named)
            finally:
                loop.call_soon_threadsafe(applied.set)

        monkeypatch.setattr(DirectWays, "apply", lambda self, *arguments, **named: apply(*arguments, **named))
        found.apply(kernel, wanted_by(found.services.values()))
        scope = Scope("test")
        scope.start(DirectKeeper(kernel, found.log).run(found, lambda: wanted_by(found.services.values())))
        for refusal in (
            None,
            KernelError("nft add set", errno.EMSGSIZE),
            KernelError("nft add set", errno.EMSGSIZE),
            None,
        ):
            applied.clear()
            kernel.refusal = refusal
            listed.replace(bypass("192.0.2.0/24", "*.test").patterns)
            await applied.wait()
            while (kernel.held[0].around is None) is (refusal is None):
                applied.clear()
                await applied.wait()
        await scope.cancel()

    run(main())
    assert sink.of("warn") == ["engine kernel gives way to user: direct traffic: nft add set: Message too long"]


def test_a_kernel_that_takes_nothing_at_all_is_an_error_as_before(tmp_path: Any) -> None:
    found = ways(tmp_path, settings())
    kernel = Picky()

    def refuse(wanted: Wanted) -> list[Any]:
        raise KernelError("nft", errno.EPERM)

    kernel.apply = refuse  # type: ignore[method-assign]
    with pytest.raises(KernelError, match="Operation not permitted"):
        found.apply(kernel, wanted_by(found.services.values()), yields=True)
