"""The lab's parts that need no namespace: its configurations, its topology, and what it shows of a flow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from gostnet.cli import main
from gostnet.lab import EXIT, GATEWAY, TOPOLOGY, configurations, flow_line, run_lab
from gostnet.testing.certificates import Authority

RECORD = {
    "level": "info",
    "msg": "10.77.1.2:40000 >-< 10.77.3.2:80",
    "kind": "handler",
    "network": "tcp",
    "client": "10.77.1.2:40000",
    "dst": "10.77.3.2:80",
    "route": "exit > 10.77.3.2:80",
    "duration": 12_345_678,
    "inputBytes": 71,
    "outputBytes": 1_900_000,
}


@pytest.mark.parametrize("tproxy", [False, True])
def test_configurations_pass_the_check(tmp_path: Path, tproxy: bool, capsys: pytest.CaptureFixture[str]) -> None:
    authority = Authority()
    authority.issue("exit.lab").save(tmp_path, "exit")
    (tmp_path / "ca.crt").write_bytes(authority.certificate)
    for role, configuration in configurations(tmp_path, "10.77.2.2", tproxy).items():
        path = tmp_path / f"{role}.yaml"
        path.write_text(yaml.safe_dump(configuration))
        assert main(["check", "-C", str(path)]) == 0
        assert capsys.readouterr().out == "0 errors, 0 warnings\n"


def test_configurations_agree_on_fresh_credentials(tmp_path: Path) -> None:
    one, two = (configurations(tmp_path, "10.77.2.2", False) for _ in range(2))
    node = one[GATEWAY]["chains"][0]["hops"][0]["nodes"][0]
    assert node["connector"]["auth"] == one[EXIT]["services"][0]["handler"]["auth"]
    assert one[EXIT]["services"][0]["handler"]["auth"] != two[EXIT]["services"][0]["handler"]["auth"]


def test_addresses_are_the_documented_ones() -> None:
    assert TOPOLOGY.addresses("client") == ["10.77.1.2", "fd77:1::2"]
    assert TOPOLOGY.addresses("gateway", "lan0") == ["10.77.1.1", "fd77:1::1"]
    assert TOPOLOGY.addresses("gateway", "wan0", 4) == ["10.77.2.1"]
    assert TOPOLOGY.addresses("exit", version=4) == ["10.77.2.2", "10.77.3.1", "10.77.4.1"]
    assert TOPOLOGY.addresses("internet", "eth0") == ["10.77.3.2", "fd77:3::2"]


def test_flow_is_shown_in_one_line() -> None:
    assert flow_line(json.dumps(RECORD)) == (
        "tcp 10.77.1.2:40000 -> 10.77.3.2:80  via exit > 10.77.3.2:80  12.3 ms  up 71 B, down 1.9 MB"
    )


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"host": "web.lab"}, "-> web.lab (10.77.3.2:80)  via"),
        ({"error": "dial.refused"}, "down 1.9 MB  - dial.refused"),
        ({"duration": 2_500_000_000}, "  2.5 s  "),
        ({"inputBytes": 999, "outputBytes": 3_200_000_000}, "up 999 B, down 3.2 GB"),
        ({"network": "udp", "route": ""}, "udp 10.77.1.2:40000 -> 10.77.3.2:80  12.3 ms"),
    ],
)
def test_flow_line_shows(change: dict[str, object], part: str) -> None:
    assert part in flow_line(json.dumps({**RECORD, **change}))


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ('{"level":"info","msg":"ready"}', ""),
        ('{"level":"info","kind":"service","msg":"listening"}', ""),
        ('{"level":"warn","msg":"accept: too many open files"}', "warn: accept: too many open files"),
        ('{"level":"error","msg":"no"}', "error: no"),
        ("Traceback (most recent call last):", "Traceback (most recent call last):"),
        ("", ""),
        ("[1]", ""),
    ],
)
def test_other_lines_are_left_out_unless_something_is_wrong(line: str, shown: str) -> None:
    assert flow_line(line) == shown


@pytest.mark.parametrize("words", [["--nonsense"], ["--duration", "soon"], ["word"]])
def test_wrong_usage_is_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_lab(words) == 2
    assert "usage: gostnet lab" in capsys.readouterr().err


def test_help_is_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "--help"]) == 0
    assert "--tproxy" in capsys.readouterr().out
