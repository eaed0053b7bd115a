"""What the driver says of the GPUs of this machine, through NVML; on a machine without any, nothing and no error."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Self, TypeVar

import pynvml

from common.cards import GpuReading
from common.errors import ConfigurationError
from common.settings import granted_gpus

T = TypeVar("T")

MIB = 1024 * 1024
SILENT_S = 30.0  # a reading is good for so long; a driver that stumbles once is no news
CPU = "cpu"
_GONE = (
    pynvml.NVML_ERROR_GPU_IS_LOST,
    pynvml.NVML_ERROR_NOT_FOUND,
    pynvml.NVML_ERROR_INVALID_ARGUMENT,  # fewer GPUs than there were
    pynvml.NVML_ERROR_UNKNOWN,  # what a GPU says that has fallen off the bus
)


@contextlib.contextmanager
def _nvml() -> Iterator[bool]:
    """Yield whether a driver is there."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield False
        return
    try:
        yield True
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def count() -> int:
    """Return the number of GPUs."""
    with _nvml() as there:
        return int(pynvml.nvmlDeviceGetCount()) if there else 0


def choose(devices: str) -> list[str]:
    """Return what `devices` (`all`, `cpu`, or indices as in `0,2`) means here: GPU indices, or `cpu`.

    `all` keeps to what CUDA_VISIBLE_DEVICES grants, and falls back to the CPU where there is no GPU.

    Raises ConfigurationError for an index that is not there.
    """
    there = count()
    if devices == "all":
        granted = granted_gpus()
        return [str(i) for i in range(there) if granted is None or str(i) in granted] or [CPU]
    if devices == CPU:
        return [CPU]
    chosen = [part.strip() for part in devices.split(",")]
    for part in chosen:
        if not (part.isascii() and part.isdigit()) or int(part) >= there:
            raise ConfigurationError(f"devices: {part!r} is not a GPU of this machine, which has {there}; or say cpu")
    return chosen


class Watch:
    """Asks the driver in a thread of its own, so that one which hangs holds up nobody. Readings are the latest had."""

    def __init__(
        self,
        indices: Iterable[int],
        *,
        every_s: float,
        looked: Callable[[Sequence[GpuReading]], None] = lambda _readings: None,
    ) -> None:
        """`looked` is called in that thread with what the driver told, each time."""
        self._every_s = every_s
        self._looked = looked
        self._readings: dict[int, tuple[float, GpuReading]] = {}  # each with when it was had, by time.monotonic
        self._missed = dict.fromkeys(indices, 0)

    def start(self) -> Self:
        """Ask from now on, where there is anything to ask about."""
        if self._missed:
            threading.Thread(target=self._run, name="nvml", daemon=True).start()
        return self

    def reading(self, index: int) -> GpuReading | None:
        """Return the state of a GPU, or None while the driver has not told for half a minute, as one that hangs."""
        had = self._readings.get(index)
        return had[1] if had and time.monotonic() - had[0] < SILENT_S else None

    def is_lost(self, index: int) -> bool:
        """Whether a GPU was gone the last two times, as once may be a driver that stumbles."""
        return self._missed.get(index, 0) > 1

    def look(self) -> None:
        """Ask once."""
        readings = []
        for index in self._missed:
            if (reading := read(index)) is not None:
                self._readings[index] = (time.monotonic(), reading)
                readings.append(reading)
            self._missed[index] = self._missed[index] + 1 if lost(index) else 0
        self._looked(readings)

    def _run(self) -> None:
        while True:
            self.look()
            time.sleep(self._every_s)


def memory_mb(index: int) -> int | None:
    """Return the size of one GPU's memory in MiB, or None when the driver does not say."""
    reading = read(index)
    return reading.memory_total_mb if reading else None


def lost(index: int) -> bool:
    """Whether a GPU that was there is gone: fallen off the bus, or its driver with it."""
    with _nvml() as there:
        if not there:
            return True
        try:
            pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(index))
        except pynvml.NVMLError as error:
            return error.value in _GONE
    return False


def read(index: int) -> GpuReading | None:
    """Return the state of one GPU, or None when the driver does not answer; a figure it does not give is null."""
    with _nvml() as there:
        return _maybe(lambda: _read(index)) if there else None


def _read(index: int) -> GpuReading:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = _maybe(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
    power = _maybe(lambda: float(pynvml.nvmlDeviceGetPowerUsage(handle)))
    energy = _maybe(lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)))
    name = pynvml.nvmlDeviceGetName(handle)
    return GpuReading(
        name=name.decode() if isinstance(name, bytes) else name,
        index=index,
        memory_used_mb=memory.used // MIB if memory else None,
        memory_total_mb=memory.total // MIB if memory else None,
        utilisation_percent=_maybe(lambda: int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)),
        temperature_c=_maybe(lambda: int(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))),
        power_w=power / 1000 if power is not None else None,
        energy_j=energy / 1000 if energy is not None else None,
    )


def _maybe(ask: Callable[[], T]) -> T | None:
    try:
        return ask()
    except pynvml.NVMLError:
        return None
