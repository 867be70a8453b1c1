"""Names of settings, and the files that they lead to."""

from __future__ import annotations

from pathlib import Path

import pytest

from gostnet.core.errors import KernelError
from gostnet.kernel import sysctl


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("net.ipv4.ip_forward", "/proc/sys/net/ipv4/ip_forward"),
        ("net.ipv4.conf.eth0/5.rp_filter", "/proc/sys/net/ipv4/conf/eth0.5/rp_filter"),
    ],
)
def test_path_of_a_setting(name: str, path: str) -> None:
    assert sysctl.path_of(name) == Path(path)


@pytest.mark.parametrize("name", ["", ".", "a..b", "net.//.//.etc", "a./", "net.//"])
def test_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(KernelError, match="is not the name of a setting"):
        sysctl.path_of(name)


def test_read_and_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysctl, "_ROOT", tmp_path)
    (tmp_path / "range").write_text("32768\t 60999\n")
    assert sysctl.read("range") == "32768 60999"
    sysctl.write("range", "1 2")
    assert (tmp_path / "range").read_text().startswith("1 2\n")
    assert sysctl.read("missing") is None
    assert sysctl.read("range.below") is None
    with pytest.raises(KernelError, match="sysctl -w missing=1: No such file"):
        sysctl.write("missing", "1")
