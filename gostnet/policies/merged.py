"""The books of a service that several workers serve, as the supervisor shows them: one set of counters for all."""

from __future__ import annotations

from collections.abc import Sequence

from .board import Totals
from .observer import Reporter
from .quota import Quota
from .stats import ServiceBooks, Stats


class MergedBooks(ServiceBooks):
    """What all workers have counted. Nothing is entered here."""

    def __init__(
        self,
        service: str,
        totals: Totals,
        *,
        quotas: Sequence[Quota] = (),
        by_client: bool = False,
        reporters: Sequence[Reporter] = (),
        shown: bool = False,
        before: ServiceBooks | None = None,
    ) -> None:
        super().__init__(service, quotas=quotas, by_client=by_client, reporters=reporters, shown=shown, before=before)
        self._totals = totals

    def settle(self) -> None:
        """Read what the workers have written."""
        self.stats.take_over(self._totals.of(self.service))
        if self.clients is None:
            return
        found = self._totals.clients(self.service)
        for name in self.clients.keys() - found.keys():
            del self.clients[name]
        for name, counts in found.items():
            self.clients.setdefault(name, Stats()).take_over(counts)

    async def run(self) -> None:
        """Nothing: the workers look after quotas."""
