from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.broker import Broker
from common.counting import Counting
from common.errors import RedisUnavailable


class Ledger:
    """Keeps what it is told once for each number; now and then the answer does not arrive, or the question."""

    def __init__(self, fates: list[str]) -> None:
        self.total: Counter[str] = Counter()
        self.calls = 0
        self._fates = fates
        self._last = -1

    def add_counts(self, process: str, number: int, counts: Mapping[str, int]) -> None:
        self.calls += 1
        fate = self._fates.pop() if self._fates else "heard"
        if fate != "lost" and number != self._last:
            self.total.update(counts)
            self._last = number
        if fate != "heard":
            raise RedisUnavailable("away")


FATES = st.lists(st.sampled_from(["heard", "lost", "unanswered"]), max_size=30)


@given(FATES, st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(1, 9)), max_size=30))
def test_whatever_gets_lost_on_the_way_everything_counts_once(fates: list[str], rounds: list[dict[str, int]]) -> None:
    ledger, counts = Ledger(fates), Counter[str]()
    counting = Counting(ledger, counts.copy)
    for more in [*rounds, *({} for _ in range(31))]:
        counts.update(more)
        try:
            counting.tell()
        except RedisUnavailable:
            continue
    assert ledger.total == counts


def test_nothing_new_is_told_by_nothing() -> None:
    ledger, counts = Ledger([]), {"a": 1, "b": 0}
    counting = Counting(ledger, counts.copy)
    counting.tell()
    counting.tell()
    assert (ledger.calls, ledger.total) == (1, {"a": 1})


def test_redis_counts_a_number_once_and_every_process(broker: Broker) -> None:
    for process, number, more in (("p", 0, 2), ("p", 0, 2), ("q", 0, 3), ("p", 1, 4)):
        broker.add_counts(process, number, {"requests|/x|GET|200": more})
    assert broker.counts() == {"requests|/x|GET|200": 9}


def test_what_redis_heard_and_did_not_answer_counts_once(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"crashes": 1}
    counting = Counting(broker, counts.copy)
    run = broker._run

    def heard_and_lost(*call: object) -> None:
        run(*call)  # type: ignore[arg-type]
        raise RedisUnavailable("away")

    with monkeypatch.context() as away:
        away.setattr(broker, "_run", heard_and_lost)
        with pytest.raises(RedisUnavailable):
            counting.tell()
    counts["crashes"] = 3
    counting.tell()
    assert broker.counts() == {"crashes": 3}
