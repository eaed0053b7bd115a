"""How much of a device a worker has, and what it does with it: its settings as residency and pipelines take them."""

from __future__ import annotations

from collections.abc import Callable

from common.models import Catalogue
from common.settings import Settings
from worker import gpu
from worker.pipelines.base import MIB, Tuning
from worker.residency import Residency


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
        memory_mb=memory_mb(device, limit_mb),
        changed=changed,
    )


def memory_mb(device: str, limit_mb: int | None) -> int | None:
    """Return the MiB of a device that a worker may use; None where nobody says, as on a CPU without a limit."""
    total_mb = None if device == gpu.CPU else gpu.memory_mb(int(device))
    if total_mb is None or limit_mb is None:
        return total_mb or limit_mb
    return min(total_mb, limit_mb)
