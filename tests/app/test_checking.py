"""What `check` finds in files that a configuration names."""

from __future__ import annotations

from pathlib import Path

import pytest

from gostnet.testing.certificates import Authority

from .test_daemon import run

CASES = [
    ("certFile: none.pem, keyFile: good.key", "certFile", "cannot read 'none.pem': No such file or directory"),
    ("certFile: good.crt, keyFile: good.crt", "keyFile", "holds a certificate, not a private key"),
    ("certFile: good.crt, keyFile: other.key", "keyFile", "does not belong to the certificate"),
    ("caFile: good.key", "caFile", "holds a private key, not a certificate"),
    ("options: {cipherSuites: [AES]}", "options.cipherSuites[0]", "is not the name of a cipher suite"),
]


@pytest.mark.parametrize("verb", [["check"], []])
def test_bad_certificates_are_found_before_anybody_asks_for_tls(
    verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for stem in ("good", "other"):
        Authority().issue("a.test").save(tmp_path, stem)
    path = tmp_path / "c.yaml"
    services = [
        f"- name: s{index}\n  addr: 127.0.0.1:0\n  handler: {{type: socks5, tls: {{{words}}}}}\n"
        f"  listener: {{type: tls, tls: {{{words}}}}}\n"
        for index, (words, _, _) in enumerate(CASES)
    ]
    path.write_text("services:\n" + "".join(services))
    done = run(*verb, "-C", str(path))
    assert done.returncode == 1
    said = done.stdout + done.stderr
    for index, (_, key, message) in enumerate(CASES):
        for block in ("handler", "listener"):
            where = f"services[{index}].{block}.tls.{key}: "
            assert any(where in line and message in line for line in said.splitlines()), (where, said)


def test_good_certificates_are_no_finding(tmp_path: Path) -> None:
    certificate, key = Authority().issue("a.test").save(tmp_path)
    done = run("check", "-L", f"socks5+tls://:1080?cert={certificate}&key={key}&ca={certificate}")
    assert (done.returncode, done.stdout) == (0, "0 errors, 0 warnings\n")
