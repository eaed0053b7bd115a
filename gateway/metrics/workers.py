"""Each worker and each GPU, as the workers' cards describe them.

A worker is named by its slot (`host.gpu0`), which stays when it is restarted; what it has counted then begins anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import Metric

from common.cards import GpuReading, WorkerCard, slot_of
from gateway.metrics.look import Look, Rows, counter, gauge

MIB = 1024 * 1024
COUNTERS = (
    ("zfleet_model_loads_total", "models_loaded_total", "Models that this worker has loaded."),
    ("zfleet_model_unloads_total", "models_unloaded_total", "Models that this worker has let go of."),
    ("zfleet_embeds_cache_hits_total", "embeds_hits", "Prompts that this worker had encoded before and kept."),
    ("zfleet_embeds_cache_misses_total", "embeds_misses", "Prompts that this worker had to encode."),
)
OF_GPU = ["host", "gpu"]


def counters(look: Look) -> Iterator[Metric]:
    """Yield what workers have counted since they started."""
    slots = _slots(look.cards)
    for name, counted, about in COUNTERS:
        rows = [([slot], card.counters.get(counted)) for slot, card in slots.items()]
        yield from counter(name, about, ["worker"], rows)


def memory(look: Look) -> Iterator[Metric]:
    """Yield the workers' memory of the machine."""
    rows = [([slot], card.rss_mb * MIB) for slot, card in _slots(look.cards).items()]
    yield from gauge("zfleet_worker_resident_memory_bytes", "Resident memory of the process.", ["worker"], rows)


def gpus(look: Look) -> Iterator[Metric]:
    """Yield what the driver says of each GPU."""
    found = sorted(_gpus(look.cards).items())

    def rows(figures: Iterable[float | None]) -> Rows:
        return [(where, figure) for (where, _), figure in zip(found, figures, strict=True)]

    readings = [reading for _, reading in found]
    about = "Share of the last moments in which the GPU was at work."
    busy = rows(_scaled(reading.utilisation_percent, 0.01) for reading in readings)
    yield from gauge("zfleet_gpu_utilisation_ratio", about, OF_GPU, busy)
    used = rows(_scaled(reading.memory_used_mb, MIB) for reading in readings)
    yield from gauge("zfleet_gpu_memory_used_bytes", "Memory of the GPU in use, by whomever.", OF_GPU, used)
    total = rows(_scaled(reading.memory_total_mb, MIB) for reading in readings)
    yield from gauge("zfleet_gpu_memory_total_bytes", "Memory of the GPU.", OF_GPU, total)
    hot = rows(reading.temperature_c for reading in readings)
    yield from gauge("zfleet_gpu_temperature_celsius", "Temperature of the GPU.", OF_GPU, hot)
    power = rows(reading.power_w for reading in readings)
    yield from gauge("zfleet_gpu_power_watts", "Power that the GPU draws.", OF_GPU, power)
    about = "Energy that the GPU has used since its driver was loaded."
    energy = rows(reading.energy_j for reading in readings)
    yield from counter("zfleet_gpu_energy_joules_total", about, OF_GPU, energy)


def energy(look: Look) -> Iterator[Metric]:
    """Yield what the GPUs of the whole fleet have used, and for an image."""
    about = "Energy that GPUs have used while workers told of them: of all, whichever came, went or began anew."
    yield from counter("zfleet_energy_joules_total", about, [], [([], look.counts.get("joules"))])
    about = "Energy that GPUs used in the last 15 minutes, idling ones included, for each picture made in them."
    yield from gauge("zfleet_image_energy_joules", about, [], [([], look.recent.joules_per_image)])


SOURCES = (counters, memory, gpus, energy)


def _slots(cards: Iterable[WorkerCard]) -> dict[str, WorkerCard]:
    """Return the newest worker of each slot: one that was just replaced may still be listed."""
    there = sorted((card for card in cards if card.state != "lost"), key=lambda card: card.started_at)
    newest = {slot_of(card.name): card for card in there}
    return dict(sorted(newest.items()))


def _gpus(cards: Iterable[WorkerCard]) -> dict[tuple[str, str], GpuReading]:
    """Return the newest reading of each GPU, by host and index; several workers may share one."""
    told = sorted(cards, key=lambda card: card.seen_at)
    return {(card.host, str(card.gpu.index)): card.gpu for card in told if card.gpu is not None}


def _scaled(figure: float | None, unit: float) -> float | None:
    return None if figure is None else figure * unit
