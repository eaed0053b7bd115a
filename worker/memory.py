"""How much of a device a worker has, and what it does with it: its settings as residency and pipelines take them."""

from __future__ import annotations

from collections.abc import Callable

from common.models import Catalogue
from common.settings import Settings
from worker import gpu
from worker.pipelines.base import MIB, Tuning
from worker.residency import Residency
from worker.vram import budget_bytes


def residency(settings: Settings, catalogue: Catalogue, device: str, changed: Callable[[], None]) -> Residency:
    """Return the models of a worker on this device (`cpu` or a GPU's index), none of them loaded yet."""
    limit_mb = settings.memory_limit_mb
    tuning = Tuning(
        tile_above=settings.tile_above,
        embeds_bytes=settings.embeds_cache_mb * MIB,
        offload=settings.offload,
        memory_bytes=None if limit_mb is None else limit_mb * MIB,
    )
    return Residency(
        catalogue,
        device="cpu" if device == gpu.CPU else "cuda",
        tuning=tuning,
        warm_sizes=settings.sizes_to_warm(),
        keep=settings.models_to_keep(),
        max_resident=settings.max_resident,
        idle_s=settings.idle_unload_s,
        memory_mb=memory_mb(settings, device),
        changed=changed,
    )


def memory_mb(settings: Settings, device: str) -> int | None:
    """Return the MiB of a device that models and pictures may take; None where nobody says, as on a CPU unlimited.

    To be asked before this process has touched the device: what is in use on it then belongs to others.
    """
    reading = None if device == gpu.CPU else gpu.read(int(device))
    limit_mb = settings.memory_limit_mb
    budget = budget_bytes(
        device="cpu" if device == gpu.CPU else "cuda",
        total=None if reading is None or reading.memory_total_mb is None else reading.memory_total_mb * MIB,
        others=0 if reading is None else (reading.memory_used_mb or 0) * MIB,
        limit=None if limit_mb is None else limit_mb * MIB,
    )
    return None if budget is None else budget // MIB
