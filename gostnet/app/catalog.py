"""Everything that is built, by name: makes the registry know all components."""

from __future__ import annotations

from .. import protocols
from ..core.registry import COMPONENTS, Catalog
from ..transports import table


def catalog() -> Catalog:
    """Return the registries of all kinds; modules of components are imported when they are first asked for."""
    protocols.declare()
    table.declare()
    return COMPONENTS
