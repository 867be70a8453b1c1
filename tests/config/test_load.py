"""From an invocation to a configuration: every kind of source, merging, environment, flags."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from gostnet.config.argv import parse_args
from gostnet.config.load import Loaded, Loader, load
from gostnet.config.parse import MAX_SIZE

SERVICE = "services: [{name: a, addr: ':1'}]\n"


def loader(
    *arguments: str, environment: Mapping[str, str] | None = None, stdin: bytes = b"", directory: Path | None = None
) -> Loader:
    return Loader(
        parse_args(arguments), environment=environment or {}, stdin=io.BytesIO(stdin), directory=directory or Path()
    )


def texts(loaded: Loaded) -> list[str]:
    return [str(finding) for finding in loaded.findings]


def names(loaded: Loaded) -> list[str]:
    assert loaded.findings == []
    return [service.name for service in loaded.config.services]


def test_files_by_extension(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(SERVICE)
    (tmp_path / "b.yml").write_text("services: [{name: b}]")
    (tmp_path / "c.json").write_text('{"services": [{"name": "c"}]}')
    (tmp_path / "d.toml").write_text('[[services]]\nname = "d"\n')
    arguments = [word for name in ("a.yaml", "b.yml", "c.json", "d.toml") for word in ("-C", name)]
    assert names(loader(*arguments, directory=tmp_path).load()) == ["a", "b", "c", "d"]


def test_lists_are_joined_and_sections_replaced(tmp_path: Path) -> None:
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text(SERVICE + "log: {level: debug, format: text}\napi: {addr: ':1'}\nbypasses: {name: x}\n")
    second.write_text("services: {name: b}\nlog: {level: info}\napi: {}\nBypasses: [{name: y}]\n")
    loaded = loader("-C", str(first), "-C", str(second), "-L", ":8080").load()
    assert names(loaded) == ["a", "b", "service-0"]
    config = loaded.config
    assert config.log is not None
    assert (config.log.level, config.log.format) == ("info", "")
    assert config.api is not None
    assert config.api.addr == ":1"
    assert [bypass.name for bypass in config.bypasses] == ["x", "y"]
    assert [service.path for service in config.services] == ["services[0]", "services[1]", "services[2]"]


def test_places_survive_merging(tmp_path: Path) -> None:
    path = tmp_path / "1.yaml"
    path.write_text("services:\n- name: a\n  adr: x\n")
    inline = '{"services": [{"name": "b", "adr": 1}]}'
    loaded = loader("-C", inline, "-C", str(path)).load()
    assert texts(loaded) == [
        "-C#1:1:29: warning: services[0].adr: unknown key; did you mean 'addr'? [config.unknown-key]",
        f"{path}:3:3: warning: services[1].adr: unknown key; did you mean 'addr'? [config.unknown-key]",
    ]


def test_standard_input_is_yaml_or_json_and_is_remembered() -> None:
    for text in (b"services: [{name: a}]", b'{"services": [{"name": "a"}]}', b'\n {"services": [{"name": "a"}]}'):
        found = loader("-C", "-", stdin=text)
        assert names(found.load()) == ["a"]
        assert names(found.load()) == ["a"], "a reload must find what standard input said"


def test_standard_input_has_a_name_in_messages() -> None:
    assert texts(loader("-C", "-", stdin=b"a: @x").load()) == [
        "standard input:1:4: error: not valid YAML: found character that cannot start any token [config.syntax]"
    ]


def test_inline_json_counts_its_argument() -> None:
    loaded = loader("-C", '{"services": []}', "-C", '{"services": 1 2}').load()
    assert texts(loaded) == ["-C#2:1:16: error: not valid JSON: a comma or } is missing [config.syntax]"]
    assert loaded.broken


def test_blank_sources_are_skipped() -> None:
    assert names(loader("-C", "", "-C", "  ", "-L", ":1").load()) == ["service-0"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.yaml", None, "cannot be read: no such file or directory"),
        ("x.ini", "a=1", "files of type 'ini' are not read; use .yaml, .yml, .json or .toml"),
        ("x", "a: 1", "files of type '' are not read; use .yaml, .yml, .json or .toml"),
    ],
)
def test_unreadable_sources_are_fatal(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    loaded = loader("-C", str(path), "-L", ":1").load()
    assert texts(loaded) == [f"{path}: error: {message} [config.source]"]
    assert loaded.broken


def test_a_directory_is_no_source(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.mkdir()
    assert texts(loader("-C", str(path)).load()) == [f"{path}: error: cannot be read: is a directory [config.source]"]


def test_bad_bytes_have_a_line(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"a: 1\nb: \xff\n")
    assert texts(loader("-C", str(path)).load()) == [f"{path}:2:1: error: not valid UTF-8 [config.syntax]"]
    path.write_bytes(b"\xef\xbb\xbf" + SERVICE.encode())
    assert names(loader("-C", str(path)).load()) == ["a"]


def test_every_source_is_reported(tmp_path: Path) -> None:
    loaded = loader("-C", str(tmp_path / "a.yaml"), "-C", "{]}", "-L", "x_y://").load()
    assert len(loaded.findings) == 3


def test_default_file_is_sought_in_order(tmp_path: Path) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    (home / ".gost").mkdir(parents=True)
    here.mkdir()
    (here / "gost.yaml").write_text("services: [{name: here}]")
    if Path("/etc/gost").exists():
        pytest.skip("this host has a configuration of its own")
    assert names(loader(environment={"HOME": str(home)}, directory=here).load()) == ["here"]
    (home / ".gost" / "gost.yml").write_text("services: [{name: yml}]")
    assert names(loader(environment={"HOME": str(home)}, directory=here).load()) == ["yml"]
    (home / ".gost" / "gost.json").write_text('{"services": [{"name": "json"}]}')
    assert names(loader(environment={"HOME": str(home)}, directory=here).load()) == ["json"]


def test_nothing_to_run_is_fatal(tmp_path: Path) -> None:
    if Path("/etc/gost").exists():
        pytest.skip("this host has a configuration of its own")
    for arguments in ((), ("-F", "http://h:1"), ("-D",)):
        loaded = loader(*arguments, environment={"HOME": str(tmp_path)}, directory=tmp_path).load()
        assert loaded.broken
        assert "nothing to run: no -L, no -C" in texts(loaded)[0]
        assert f"{tmp_path}/.gost" in texts(loaded)[0]


@pytest.mark.parametrize("arguments", [("-api", ":1"), ("-metrics", ":1"), ("-C", "{}"), ("-L", ":1")])
def test_no_default_file_is_sought_if_there_is_something(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "gost.yaml").write_text("services: [{name: unwanted}]")
    loaded = loader(*arguments, directory=tmp_path).load()
    assert "unwanted" not in names(loaded)


def test_environment(tmp_path: Path) -> None:
    environment = {"GOST_API": ":1", "GOST_METRICS": ":2", "GOST_PROFILING": ":3", "GOST_LOGGER_LEVEL": "warn"}
    (tmp_path / "a.yaml").write_text(
        "log: {level: debug, format: text}\napi: {addr: ':9', pathPrefix: /x}\nmetrics:\nservices: [{name: a}]\n"
    )
    config = loader("-C", "a.yaml", environment=environment, directory=tmp_path).load().config
    assert config.log is not None
    assert (config.log.level, config.log.format) == ("warn", "text")
    assert config.api is not None
    assert (config.api.addr, config.api.path_prefix) == (":1", "/x")
    assert config.metrics is not None
    assert config.metrics.addr == ":2"
    assert config.profiling is not None
    assert config.profiling.addr == ":3"
    spot = config.positions.exact("api.addr")
    assert spot is not None
    assert str(spot.value) == "GOST_API"


def test_flags_beat_the_environment_and_replace_sections() -> None:
    environment = {"GOST_API": ":1", "GOST_LOGGER_LEVEL": "warn"}
    source = '{"api": {"addr": ":9", "pathPrefix": "/x"}, "services": [{"name": "a"}]}'
    config = loader("-C", source, "-D", "-api", "u:p@:2", environment=environment).load().config
    assert config.log is not None
    assert config.log.level == "debug"
    assert config.api is not None
    assert (config.api.addr, config.api.path_prefix) == (":2", "")
    config = loader("-L", ":1", "-D", "-DD").load().config
    assert config.log is not None
    assert config.log.level == "trace"


def test_load_uses_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOST_API", ":7")
    config = load(parse_args(["-L", ":1"])).config
    assert config.api is not None
    assert config.api.addr == ":7"


def test_loading_again_reads_the_file_again(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(SERVICE)
    found = loader("-C", str(path))
    assert names(found.load()) == ["a"]
    path.write_text("services: [{name: b}]")
    assert names(found.load()) == ["b"]


# ---- URLs ----
class Answers:
    """What a small server says, and what it was asked."""

    def __init__(self) -> None:
        self.status = 200
        self.headers: dict[str, str] = {}
        self.body = SERVICE.encode()
        self.asked: list[tuple[str, str | None]] = []


@contextmanager
def server(answers: Answers) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answers.asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(answers.status)
            for name, value in answers.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answers.body)))
            self.end_headers()
            self.wfile.write(answers.body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"127.0.0.1:{found.server_port}"
        finally:
            found.shutdown()
            thread.join()


def test_urls_by_type_then_extension() -> None:
    answers = Answers()
    with server(answers) as address:
        assert names(loader("-C", f"http://{address}/x").load()) == ["a"]
        answers.body = b'{"services": [{"name": "j"}]}'
        assert names(loader("-C", f"http://{address}/x.json").load()) == ["j"]
        answers.body = b'[[services]]\nname = "t"'
        assert names(loader("-C", f"http://{address}/x.toml").load()) == ["t"]
        answers.headers = {"Content-Type": "application/json; charset=utf-8"}
        answers.body = b'{"services": [{"name": "a",}]}'
        [finding] = texts(loader("-C", f"http://{address}/x.yaml").load())
        assert finding == (
            f"http://{address}/x.yaml:1:28: error: not valid JSON: a key in double quotes is missing [config.syntax]"
        )


def test_credentials_of_a_url_are_sent_and_never_shown() -> None:
    answers = Answers()
    with server(answers) as address:
        url = f"http://user:hunter%402@{address}/x"
        assert names(loader("-C", url).load()) == ["a"]
        assert answers.asked == [("/x", "Basic dXNlcjpodW50ZXJAMg==")]
        answers.status = 403
        [finding] = texts(loader("-C", url).load())
    assert finding == f"http://{address}/x: error: the server answered 403 [config.source]"


def test_urls_are_bounded() -> None:
    answers = Answers()
    answers.body = b"#" * (MAX_SIZE + 1)
    with server(answers) as address:
        [finding] = texts(loader("-C", f"http://{address}/x").load())
    assert "is larger than 10 MiB" in finding


def test_a_server_that_is_not_there() -> None:
    with server(Answers()) as address:
        pass
    loaded = loader("-C", f"http://{address}/x").load()
    assert texts(loaded) == [f"http://{address}/x: error: cannot be fetched: connection refused [config.source]"]
    assert "cannot be fetched" in texts(loader("-C", "http://[::1/x").load())[0]
