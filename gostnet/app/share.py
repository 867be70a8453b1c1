"""One process's part in serving a configuration: a worker's, or that of the supervisor, which serves nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..policies.board import Board, Totals
from ..policies.ledger import Ledger

SHARED: Mapping[str, object] = {"reuseport": True}
"""What lets every worker have a socket at the same port; a listener that does not know the option has one worker."""


@dataclass(frozen=True, slots=True)
class Share:
    """Who this worker is, and what it has in common with the others.

    worker    its number; the first, 0, has the listeners that one worker has alone
    ledger    what all of them count together
    ports     by service: what the kernel has chosen for the first worker where the configuration says 0
    board     where its statistics go, for the supervisor to read
    totals    the statistics of all workers: the supervisor's, who tells of them
    """

    worker: int
    ledger: Ledger
    ports: Mapping[str, int] = field(default_factory=dict)
    board: Board | None = None
    totals: Totals | None = None

    @property
    def first(self) -> bool:
        """Whether it is the worker that does what only one does."""
        return self.worker == 0
