"""What a scrape reads of the fleet, once for all its metrics, and how families are made of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from typing import Self

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from common.broker import Broker
from common.cards import QueueDepth, WorkerCard
from common.fleet import Recent
from common.histograms import Bounds
from common.records import EtaErrors
from common.storage.base import Disk

MICRO = 1e-6

Rows = Iterable[tuple[Sequence[str], float | None]]  # the values of the labels, and the figure; None is left out


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """The fleet at one moment. `models` are those served here, which have figures even while those are 0."""

    models: Collection[str]
    counts: Mapping[str, int]  # the fleet's counters, as lua/_counts.lua keeps them
    queues: Sequence[QueueDepth]
    cards: Sequence[WorkerCard]
    eta_errors: Mapping[str, EtaErrors]
    disks: Mapping[str, Disk]
    suspended: bool
    recent: Recent
    memory_bytes: int  # of Redis

    @classmethod
    def at(cls, broker: Broker, models: Collection[str]) -> Self:
        """Ask Redis; raises RedisUnavailable."""
        return cls(
            models=models,
            counts=broker.counts(),
            queues=broker.queues(),
            cards=broker.workers(),
            eta_errors=broker.eta_errors(),
            disks=broker.disks(),
            suspended=broker.suspended(),
            recent=broker.recent(),
            memory_bytes=broker.memory_bytes(),
        )

    def counted(self, what: str, *expected: Collection[str]) -> Rows:
        """Return the counters of this name by their labels, with 0 for expected values of the labels, in any mix."""
        found: dict[tuple[str, ...], int] = dict.fromkeys(product(*expected), 0) if expected else {}
        for field, count in self.counts.items():
            name, *labels = field.split("|")
            if name == what:
                found[tuple(labels)] = count
        return sorted(found.items())

    def histogram(
        self, what: str, bounds: Bounds, about: tuple[str, str], labels: Sequence[str] = (), *, unit: float = 1.0
    ) -> Iterator[Metric]:
        """Yield the histogram of these counters under its name, with its help; its sum is kept in `unit`."""
        family = HistogramMetricFamily(*about, labels=labels)
        found: dict[tuple[str, ...], dict[str, int]] = {}
        for values, count in self.counted(what):
            found.setdefault(tuple(values[:-1]), {})[values[-1]] = int(count or 0)
        if not labels:
            found.setdefault((), {})
        for values, counts in sorted(found.items()):
            within = accumulate(counts.get(bound, 0) for bound in bounds.names)
            family.add_metric(values, list(zip(bounds.names, within, strict=True)), counts.get("sum", 0) * unit)
        yield family


def counter(name: str, about: str, labels: Sequence[str], rows: Rows) -> Iterator[Metric]:
    """Yield a counter, whose name ends in `_total`."""
    yield _filled(CounterMetricFamily(name, about, labels=labels), rows)


def gauge(name: str, about: str, labels: Sequence[str], rows: Rows) -> Iterator[Metric]:
    """Yield a gauge."""
    yield _filled(GaugeMetricFamily(name, about, labels=labels), rows)


def _filled(family: CounterMetricFamily | GaugeMetricFamily, rows: Rows) -> Metric:
    for values, figure in rows:
        if figure is not None:
            family.add_metric(values, figure)
    return family
