"""GET /api/history: the figures of the dashboard's charts, from samples that Redis keeps; it needs no Prometheus."""

from __future__ import annotations

from flask import Response
from pydantic import Field

from common.broker import Broker
from common.errors import Forbidden, InvalidRequest, RedisUnavailable
from common.history import WINDOWS, History, Window
from gateway import problems
from gateway.admission import open_to
from gateway.api import NO_STORE, Api, Query, json_answer


class HistoryQuery(Query):
    """What GET /api/history is asked for."""

    window: Window = Field("15m", description="In steps of 10 s, 4 min or 2 h.")


def create(broker: Broker) -> Api:
    """Return the route for charts."""
    api = Api("history", __name__, about="How the fleet did of late.")

    refusals = problems.documented(InvalidRequest, Forbidden, RedisUnavailable)

    @api.get("/api/history", responses={"200": History, **refusals})
    @open_to("admin")
    def history(query: HistoryQuery) -> Response:
        """Tell what was done in each step of the last 15 minutes, 6 hours or 7 days."""
        window = query.window
        found = History(window=window, step_seconds=WINDOWS[window], points=broker.history(window))
        return json_answer(found, headers=NO_STORE)

    return api
