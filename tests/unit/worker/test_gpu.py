"""What the driver says, with a mocked driver; tests/gpu has the real one."""

from __future__ import annotations

from types import SimpleNamespace

import pynvml
import pytest

from common.errors import ConfigurationError
from worker import gpu


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda _: "NVIDIA H200",
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(used=3 * gpu.MIB, total=1000 * gpu.MIB),
        "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=97),
        "nvmlDeviceGetTemperature": unsupported,
        "nvmlDeviceGetPowerUsage": lambda _: 412_345,
        "nvmlDeviceGetTotalEnergyConsumption": lambda _: 7_654_321,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)


def test_without_a_driver_there_is_nothing_and_no_error(no_driver: None) -> None:
    assert gpu.count() == 0
    assert gpu.read(0) is None
    assert gpu.choose("all") == ["cpu"]
    with pytest.raises(ConfigurationError, match="which has 0"):
        gpu.choose("0")


def test_devices_are_chosen_by_index(two_gpus: None) -> None:
    assert gpu.choose("all") == ["0", "1"]
    assert gpu.choose("1") == ["1"]
    assert gpu.choose(" 1, 0") == ["1", "0"]
    assert gpu.choose("cpu") == ["cpu"]


def test_all_keeps_to_what_was_granted(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpu.choose("all") == ["1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.choose("all") == ["cpu"]


@pytest.mark.parametrize("devices", ["2", "0,7", "cuda", "-1", "", "0,,1"])
def test_a_device_that_is_not_there_is_refused(two_gpus: None, devices: str) -> None:
    with pytest.raises(ConfigurationError, match="not a GPU of this machine, which has 2"):
        gpu.choose(devices)


def test_a_figure_the_driver_does_not_give_is_null(two_gpus: None) -> None:
    reading = gpu.read(1)
    assert reading is not None
    assert (reading.name, reading.index, reading.memory_used_mb, reading.memory_total_mb) == ("NVIDIA H200", 1, 3, 1000)
    assert (reading.utilisation_percent, reading.temperature_c, reading.power_w) == (97, None, 412.345)
    assert reading.energy_j == 7654.321, "NVML has mJ"


def test_a_driver_that_stumbles_is_no_error(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, "nvmlShutdown", lost)
    assert gpu.read(0) is not None
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lost)
    assert gpu.read(0) is None


def test_a_gpu_that_is_gone_is_told_from_one_that_only_stumbles(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_with(code: int) -> None:
        def fail(*_: object) -> None:
            raise pynvml.NVMLError(code)

        monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", fail)

    assert (gpu.memory_mb(0), gpu.lost(0)) == (1000, False)
    for code, lost in (
        (pynvml.NVML_ERROR_GPU_IS_LOST, True),
        (pynvml.NVML_ERROR_UNKNOWN, True),
        (pynvml.NVML_ERROR_IN_USE, False),
        (pynvml.NVML_ERROR_TIMEOUT, False),
    ):
        fail_with(code)
        assert gpu.lost(0) is lost


def test_a_gpu_counts_as_lost_when_it_is_gone_twice(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = gpu.Watch([0], every_s=60)
    watch.look()
    reading = watch.reading(0)
    assert (reading and reading.name, watch.is_lost(0)) == ("NVIDIA H200", False)
    with monkeypatch.context() as patched:
        patched.setattr(gpu, "lost", lambda _: True)
        watch.look()
        assert not watch.is_lost(0)
        watch.look()
        assert watch.is_lost(0)
    watch.look()
    assert not watch.is_lost(0)


def test_a_reading_is_kept_while_the_driver_stumbles_and_not_while_it_hangs(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = gpu.Watch([0], every_s=60)
    assert watch.reading(0) is None, "it has not been asked yet"
    watch.look()
    monkeypatch.setattr(gpu, "read", lambda _: None)
    watch.look()
    assert watch.reading(0)
    later = gpu.time.monotonic() + gpu.SILENT_S
    monkeypatch.setattr(gpu.time, "monotonic", lambda: later)
    assert watch.reading(0) is None


def test_a_driver_that_went_away_took_its_gpus_with_it(no_driver: None) -> None:
    assert gpu.lost(0)
