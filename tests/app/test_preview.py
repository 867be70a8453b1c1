"""What plan and doctor look at: the lists of a configuration are loaded as a start would."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from gostnet.app.preview import preview
from gostnet.config.argv import parse_args
from gostnet.config.load import Loader
from gostnet.core.address import Endpoint
from gostnet.core.errors import GostnetError
from gostnet.pipeline.router import ServiceRouter

from .test_daemon import run

TEXT = """
services:
- {{name: s, addr: "127.0.0.1:0", handler: {{type: socks5}}, bypass: b}}
bypasses:
- {{name: b, matchers: [192.0.2.1], {source}}}
"""


def written(tmp_path: Path, source: str) -> list[str]:
    path = tmp_path / "c.yaml"
    path.write_text(TEXT.format(source=source))
    return ["-C", str(path)]


def refused(words: list[str], patience: float = 10.0) -> tuple[list[bool], list[str]]:
    """Return whether three addresses are bypassed, and what is said of lists that are late."""
    invocation = parse_args(["plan", *words])
    assembly, late = preview(Loader(invocation).load(), invocation, patience)
    router = assembly.services["s"].egress
    assert isinstance(router, ServiceRouter)
    assert router.bypass is not None
    return [router.bypass.contains("tcp", Endpoint(f"192.0.2.{last}", 80)) for last in (1, 2, 3)], late


def test_a_list_in_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("192.0.2.2\n")
    assert refused(written(tmp_path, f"file: {{path: {tmp_path}/list}}")) == ([True, True, False], [])


def test_a_list_that_does_not_come_in_time_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        source = f"http: {{url: 'http://127.0.0.1:{silent.getsockname()[1]}/', timeout: 30s}}"
        found, late = refused(written(tmp_path, source), 0.05)
    assert found == [True, False, False]
    assert late == ["bypass b: not loaded within 0.05s; what it would add is not in this"]


def test_what_no_start_survives_is_an_error_here_as_well(tmp_path: Path) -> None:
    words = written(tmp_path, f"file: {{path: {tmp_path}/none}}")
    path = Path(words[1])
    path.write_text(path.read_text().replace("matchers: [192.0.2.1], ", ""))
    with pytest.raises(GostnetError, match="bypass b would hold nobody back"):
        refused(words)
    for verb in ("plan", "doctor"):
        done = run(verb, *words)
        assert (done.returncode, done.stdout) == (1, "")
        assert "bypass b would hold nobody back" in done.stderr
