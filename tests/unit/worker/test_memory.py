"""What a worker may use of its device, and what it tells the gateway that fits there."""

from __future__ import annotations

import pytest

from common.cards import GpuReading
from common.models import load_catalogue
from common.settings import Settings
from worker import gpu, memory
from worker.vram import CUDA_CONTEXT

MIB = 1 << 20
CONTEXT_MB = CUDA_CONTEXT // MIB


def reading(total_mb: int | None, used_mb: int | None) -> GpuReading:
    return GpuReading(name="GPU", index=0, memory_total_mb=total_mb, memory_used_mb=used_mb)


@pytest.mark.parametrize(
    ("read", "limit_mb", "expected"),
    [
        (reading(24_000, 1_000), None, 23_000 - CONTEXT_MB),
        (reading(24_000, None), 12_000, 12_000 - CONTEXT_MB),
        (reading(None, None), None, None),
        (None, None, None),
        (None, 8_000, 8_000 - CONTEXT_MB),
    ],
)
def test_a_gpu_is_shared_with_what_was_there_before(
    monkeypatch: pytest.MonkeyPatch, read: GpuReading | None, limit_mb: int | None, expected: int | None
) -> None:
    monkeypatch.setattr(gpu, "read", lambda _: read)
    settings = Settings(memory_limit_mb=limit_mb)
    assert memory.memory_mb(settings, "0") == expected


def test_a_cpu_has_the_limit_or_none() -> None:
    assert memory.memory_mb(Settings(), "cpu") is None
    assert memory.memory_mb(Settings(memory_limit_mb=500), "cpu") == 500


def test_what_fits_beside_a_model_in_memory_is_told() -> None:
    catalogue = load_catalogue().select(["pico"])
    told = []
    for limit_mb in (None, 36, 500):
        models = memory.residency(Settings(memory_limit_mb=limit_mb), catalogue, "cpu", lambda: None)
        assert models.largest == {}, "nothing was in memory yet"
        assert models.acquire("pico") is not None
        told.append(models.largest["pico"])
    unlimited, tight, ample = told
    assert 0 < tight < ample == unlimited == catalogue["pico"].max_pixels
