"""What operators ask of a gateway: to pause the fleet, to drain a worker, to start one anew. Needs an admin's key."""

from __future__ import annotations

from urllib.parse import quote

from common.fleet import Fleet, Slot, Suspended, WorkerView
from zfleet.client import Client, M


class Operator(Client):
    """A client with the calls of the admin scope. Each may be sent twice."""

    def fleet(self) -> Fleet:
        """Return what waits, who works on what, and how it went in the last minutes."""
        return self._call(Fleet, "GET", "api/fleet")

    def pause(self) -> Suspended:
        """Have no task claimed any more."""
        return self._call(Suspended, "POST", "api/fleet/pause")

    def resume(self) -> Suspended:
        """Let tasks be claimed again."""
        return self._call(Suspended, "POST", "api/fleet/resume")

    def drain(self, name: str) -> WorkerView:
        """Have a worker claim nothing more; Refused with code `unknown_worker` where none lives by that name."""
        return self._order(name, "drain", WorkerView)

    def resume_worker(self, name: str) -> Slot:
        """Let a worker that was drained claim again, or whoever comes to its slot."""
        return self._order(name, "resume", Slot)

    def restart(self, name: str) -> WorkerView:
        """Have a worker finish what it has, and another take its place."""
        return self._order(name, "restart", WorkerView)

    def _order(self, name: str, order: str, answer: type[M]) -> M:
        return self._call(answer, "POST", f"api/workers/{quote(name, safe='') or '-'}/{order}")
