"""Assembling a configuration: what it keeps, and what it lets go of."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest

from gostnet.app.daemon import Assembly, assemble
from gostnet.config.argv import parse_args
from gostnet.config.load import load
from gostnet.core.tasks import run

CONFIGURATION = """
services:
- name: in
  addr: "127.0.0.1:0"
  resolver: names
  handler: {type: auto, chain: out}
  listener: {type: tcp}
chains:
- name: out
  hops:
  - name: hop
    nodes:
    - {name: node, addr: "192.0.2.1:443", connector: {type: relay}, dialer: {type: tls}}
resolvers:
- name: names
  nameservers:
  - {addr: "tls://192.0.2.53", chain: out}
"""


@pytest.mark.parametrize("reloads", [2, 5])
def test_a_reload_lets_go_of_the_configurations_before_the_last(tmp_path: Path, reloads: int) -> None:
    path = tmp_path / "gostnet.yaml"
    path.write_text(CONFIGURATION)
    loaded = load(parse_args(["-C", str(path)]))

    async def scenario() -> int:
        made: list[weakref.ref[object]] = []
        assembly: Assembly | None = None
        for _ in range(reloads + 1):
            assembly = assemble(loaded, previous=assembly)
            made.append(weakref.ref(assembly.services["in"]))
            assembly.build.close()
        gc.collect()
        return sum(ref() is not None for ref in made)

    assert run(scenario()) == 1
