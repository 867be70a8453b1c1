"""From sections to quotas, recorders and observers: what is built, what is refused with its place, what goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from gostnet.config.decode import Decoder
from gostnet.config.parse import parse
from gostnet.config.schema import Config
from gostnet.config.tree import Source
from gostnet.core.tasks import run
from gostnet.policies.build import Build
from gostnet.policies.build_books import build_observers, build_quotas, build_recorders, uses_of
from gostnet.policies.quota import Keeper


def config_of(text: str) -> Config:
    return Decoder().config(parse(text, "yaml", Source("f", "file")))


def problems(text: str) -> list[str]:
    config, build = config_of(text), Build()
    build_quotas(config, build)
    recorders = build_recorders(config, build)
    build_observers(config, build)
    for service in config.services:
        uses_of(service.recorders, recorders, build)
    build.close()
    return [f"{problem.severity}: {problem}" for problem in build.problems]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "recorders: [{name: r, redis: {addr: ':1', key: k}}]",
            "recorders[0].redis: a Redis recorder is not available",
        ),
        ("recorders: [{name: r, plugin: {type: grpc, addr: ':1'}}]", "recorders[0].plugin.type: a gRPC plugin is not"),
        ("recorders: [{name: r, http: {url: 'http://'}}]", "recorders[0].http.url: 'http://' is not a URL"),
        ("observers: [{name: o, plugin: {addr: ':1'}}]", "observers[0].plugin.type: a gRPC plugin is not available"),
        ("quotas: [{name: q, limit: lots}]", "quotas[0].limit: 'lots': "),
        ("quotas: [{name: q, startsAt: soon}]", "quotas[0].startsAt: 'soon': "),
        ("quotas: [{name: q, direction: up}]", "quotas[0].direction: 'up': "),
        ("quotas: [{name: q, flush: often}]", "quotas[0].flush: 'often': "),
        (
            "recorders: [{name: r}]\n"
            "services: [{name: s, recorders: [{name: r, record: recorder.service.handler.serial}]}]",
            "services[0].recorders[0].record: the record 'recorder.service.handler.serial' is not available",
        ),
    ],
)
def test_what_cannot_be_built_is_an_error_with_its_place(text: str, expected: str) -> None:
    (problem,) = problems(text)
    assert problem.startswith(f"error: {expected}")


def test_bodies_are_a_warning() -> None:
    use = "{name: r, record: recorder.service.handler, metadata: {http.body: true}}"
    (problem,) = problems(f"recorders: [{{name: r}}]\nservices: [{{name: s, recorders: [{use}]}}]")
    assert problem.startswith("warning: services[0].recorders[0].metadata.http.body: ")


def test_the_first_recorder_of_a_record_counts() -> None:
    config, build = (
        config_of(
            "recorders: [{name: a}, {name: b}]\n"
            "services: [{name: s, recorders: [{name: a, record: recorder.service.handler},"
            " {name: b, record: recorder.service.handler}, {name: b, record: recorder.service.client.address}]}]"
        ),
        Build(),
    )
    made = build_recorders(config, build)
    uses = uses_of(config.services[0].recorders, made, build)
    assert {record: use.recorder.name for record, use in uses.items()} == {
        "recorder.service.handler": "a",
        "recorder.service.client.address": "b",
    }
    build.close()


def test_recorders_and_quotas_go_on_where_nothing_changed(tmp_path: Path) -> None:
    def text(path: str, limit: str) -> str:
        store = f"store: {{file: {tmp_path}/q.json}}"
        return (
            f"recorders: [{{name: same, file: {{path: {tmp_path}/a}}}}, {{name: other, file: {{path: {path}}}}}]\n"
            f"quotas: [{{name: q, limit: {limit}, {store}}}, {{name: gone{limit}, {store}}}]"
        )

    async def main() -> None:
        old, new = Build(), Build()
        first = build_recorders(config_of(text(f"{tmp_path}/b", "1KB")), old)
        quotas = build_quotas(config_of(text(f"{tmp_path}/b", "1KB")), old)
        config = config_of(text(f"{tmp_path}/c", "2KB"))
        second = build_recorders(config, new, old.recorders)
        again = build_quotas(config, new, old.quotas)
        assert second["same"] is first["same"]
        assert second["other"] is not first["other"]
        assert again["q"] is quotas["q"]
        assert again["q"].terms.limit == 1024, "the old terms hold as long as the old configuration"
        (keeper,) = (item for item in new.reloaders if isinstance(item, Keeper))
        assert keeper.gone == [quotas["gone1KB"]]
        await old.aclose(new)
        assert not first["same"]._closed
        assert first["other"]._closed
        await new.aclose()
        assert first["same"]._closed

    run(main())
