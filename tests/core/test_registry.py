"""Names of components."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from gostnet.core.errors import ConfigError, Unavailable
from gostnet.core.registry import GOST_NAMES, KINDS, Catalog, Registry, component, register
from gostnet.core.suggest import did_you_mean, nearest


def test_every_name_of_gost_is_known() -> None:
    assert {kind: len(GOST_NAMES[kind]) for kind in KINDS} == {
        "handler": 35,
        "listener": 42,
        "connector": 20,
        "dialer": 35,
    }


def test_component_registers_a_class_under_its_names() -> None:
    catalog = Catalog()

    @component("handler", "socks5", "socks", catalog=catalog)
    class Handler:
        @dataclass(frozen=True, slots=True, kw_only=True)
        class Options:
            pass

    assert catalog.handlers.get("socks") is Handler
    assert catalog.options("handler", "socks5") is Handler.Options
    assert catalog.available("handler", "socks")
    assert not catalog.available("handler", "http")
    assert catalog.options("handler", "http") is None


def test_plain_values_can_be_registered() -> None:
    catalog = Catalog()
    stack = ("tcp", "tls")
    register("listener", stack, ("tls",), catalog)
    assert catalog.listeners.get("tls") == ("tcp", "tls")
    assert catalog.options("listener", "tls") is None


def test_a_name_cannot_stand_for_two_things() -> None:
    registry: Registry[object] = Registry("dialer")
    first, second = object(), object()
    registry.register(first, "tcp")
    registry.register(first, "tcp", "t")
    with pytest.raises(ValueError, match="'tcp' is registered twice"):
        registry.register(second, "new", "tcp")
    assert "new" not in registry, "a refused registration must leave nothing behind"
    with pytest.raises(ValueError, match="needs a name"):
        registry.register(second)


def test_unbuilt_names_of_gost_are_not_available() -> None:
    with pytest.raises(Unavailable) as caught:
        Catalog().listeners.get("kcp")
    assert str(caught.value) == "listener 'kcp' is not available in this version"


def test_unknown_names_are_config_errors_with_a_suggestion() -> None:
    with pytest.raises(ConfigError) as caught:
        Catalog().handlers.get("sock5", "services[0].handler.type")
    assert str(caught.value) == "services[0].handler.type: unknown handler 'sock5'; did you mean 'socks5'?"
    assert caught.value.code == "config.unknown-component"


def test_declared_modules_are_imported_at_the_first_look_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "gostnet_test_declared"
    (tmp_path / f"{name}.py").write_text("CATALOG = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    catalog = Catalog()
    catalog.handlers.declare({"http": name})
    assert catalog.handlers.names() == ["http"]
    assert "http" in catalog.handlers
    assert name not in sys.modules
    try:
        with pytest.raises(Unavailable):
            catalog.handlers.get("http")
        assert name in sys.modules
    finally:
        sys.modules.pop(name, None)


def test_nearest_word_ignores_case_and_gives_up_on_strangers() -> None:
    assert nearest("ADRR", ["addr", "auth"]) == "addr"
    assert nearest("zzz", ["addr"]) == ""
    assert nearest("", ["addr"]) == ""
    assert did_you_mean("xyzzy", ["addr"]) == ""
