"""The same as tests/unit/worker/test_gpu.py, with a real driver."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from worker import gpu, gpulog


@pytest.mark.gpu
def test_the_driver_gives_every_figure() -> None:
    assert gpu.choose("all")[0] == "0"
    reading = gpu.read(0)
    assert reading is not None
    assert reading.memory_total_mb and reading.memory_total_mb > (reading.memory_used_mb or 0)
    assert None not in (reading.utilisation_percent, reading.temperature_c, reading.power_w)


@pytest.mark.gpu
def test_energy_is_told_in_joules() -> None:
    before = gpu.read(0)
    time.sleep(2.0)
    after = gpu.read(0)
    assert before and after and before.energy_j is not None and after.energy_j is not None
    assert 5 < (after.energy_j - before.energy_j) / 2.0 < 2000, "watts"


@pytest.mark.gpu
def test_energy_grows_from_look_to_look_and_never_goes_back() -> None:
    """As the fleet's counter of joules takes it to do: a reading that goes back counts as a driver that was loaded."""
    joules = []
    for _ in range(8):
        reading = gpu.read(0)
        assert reading and reading.energy_j is not None
        joules.append(reading.energy_j)
        time.sleep(0.25)
    assert joules == sorted(joules) and joules[0] < joules[-1]


@pytest.mark.gpu
def test_a_gpu_that_is_there_is_not_lost() -> None:
    assert not gpu.lost(0)
    assert (gpu.memory_mb(0) or 0) > 1000


@pytest.mark.gpu
def test_a_look_at_a_real_gpu_is_a_line_of_gpu_csv(tmp_path: Path) -> None:
    gpu.Watch([0], every_s=60, looked=gpulog.keeper(tmp_path)).look()
    header, line = (tmp_path / "gpu.csv").read_text().splitlines()
    assert header == gpulog.HEADER
    index, used, free, utilisation = (int(cell) for cell in line.split(",")[1:])
    assert index == 0 and used >= 0 and 0 <= utilisation <= 100
    assert used + free == gpu.memory_mb(0)
