"""Python, torch, the driver, CUDA, and the GPUs' memory against the models."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

from common.cards import GpuReading
from common.models import ModelSpec
from zfleet.doctor.report import Finding, Patient

TESTED = ((3, 11), (3, 13))
TORCH = (2, 9)
PROBE_S = 30.0
WORKER_ONLY = "needed on a worker's host alone: pip install 'zfleet[worker]'"

# In a process of its own: a broken CUDA may take it down. One small sum on each device shows that it computes.
PROBE = """
import json, torch
there = torch.cuda.is_available()
count = torch.cuda.device_count() if there else 0
sums = [float(torch.ones(8, device=f"cuda:{i}").sum()) for i in range(count)]
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "devices": count, "sums": sums}))
"""


class Driver(NamedTuple):
    """NVIDIA's driver: its version and the newest CUDA that it can serve."""

    version: str
    cuda: tuple[int, int]


def check(patient: Patient) -> Iterator[Finding]:
    """Look at what computes."""
    yield python(sys.version_info[:2])
    driver, gpus = look()
    yield from torch(driver, gpus, PROBE)
    yield driver_says(driver)
    for spec in patient.settings.catalogue().values():
        yield from memory(spec, gpus, patient.settings.devices)


def python(found: tuple[int, int]) -> Finding:
    """Judge the interpreter."""
    oldest, newest = TESTED
    says = f"{found[0]}.{found[1]} ({sys.executable})"
    if found < oldest:
        return Finding("python", "problem", says, f"zfleet needs Python {oldest[0]}.{oldest[1]} or later")
    if found > newest:
        return Finding("python", "warning", says, f"tested up to Python {newest[0]}.{newest[1]}")
    return Finding("python", "ok", says)


def look() -> tuple[Driver | None, list[GpuReading]]:
    """Return what NVML tells of this machine; nothing where it is not there."""
    if importlib.util.find_spec("pynvml") is None:
        return None, []
    import pynvml

    from worker import gpu

    try:
        pynvml.nvmlInit()
        cuda = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
        driver = Driver(str(pynvml.nvmlSystemGetDriverVersion()), (cuda // 1000, cuda % 1000 // 10))
    except pynvml.NVMLError:
        return None, []
    return driver, [reading for index in range(gpu.count()) if (reading := gpu.read(index))]


def torch(driver: Driver | None, gpus: Sequence[GpuReading], probe: str) -> Iterator[Finding]:
    """Judge torch and CUDA by what a process that uses them says."""
    if importlib.util.find_spec("torch") is None:
        yield Finding("torch", "skipped", f"is not installed; {WORKER_ONLY}")
        return
    installed = version("torch")
    try:
        done = subprocess.run(
            [sys.executable, "-c", probe], capture_output=True, text=True, timeout=PROBE_S, check=False
        )
    except subprocess.TimeoutExpired:
        remedy = "see `nvidia-smi` and `dmesg`: the driver may hang"
        yield Finding("torch", "problem", f"{installed} said nothing for {PROBE_S:g} s", remedy)
        return
    try:
        said = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        remedy = "reinstall it for this machine's CUDA, or mend the driver"
        yield Finding("torch", "problem", f"{installed} cannot be used ({how}): {last}", remedy)
        return
    numbers = tuple(int(part) for part in installed.split("+")[0].split(".")[:2])
    if numbers < TORCH:
        yield Finding("torch", "problem", installed, f"zfleet needs torch {TORCH[0]}.{TORCH[1]} or later")
    else:
        yield Finding("torch", "ok", installed)
    yield cuda(said, driver, gpus)


def cuda(said: dict[str, Any], driver: Driver | None, gpus: Sequence[GpuReading]) -> Finding:
    """Judge whether torch can use the GPUs that the driver shows."""
    if not gpus:
        return Finding("cuda", "skipped", "there is no NVIDIA GPU here; workers compute on the CPU")
    built = said["cuda"]
    if built is None:
        says = f"torch is built without CUDA, and there are {len(gpus)} GPUs"
        return Finding("cuda", "problem", says, "install a build of torch with CUDA")
    if driver and int(built.split(".")[0]) > driver.cuda[0]:
        newest = ".".join(map(str, driver.cuda))
        says = f"torch wants CUDA {built}; driver {driver.version} serves {newest} at most"
        return Finding("cuda", "problem", says, "update the driver, or install torch for that CUDA")
    if not said["devices"]:
        remedy = "see CUDA_VISIBLE_DEVICES, and the rights to /dev/nvidia*"
        return Finding("cuda", "problem", "torch finds no GPU, though the driver does", remedy)
    return Finding("cuda", "ok", f"{built}, {said['devices']} of {len(gpus)} GPUs compute")


def driver_says(driver: Driver | None) -> Finding:
    """Tell the driver's version."""
    if driver is not None:
        return Finding("driver", "ok", f"{driver.version}, for CUDA up to {'.'.join(map(str, driver.cuda))}")
    if importlib.util.find_spec("pynvml") is None:
        return Finding("driver", "skipped", f"nvidia-ml-py is not installed; {WORKER_ONLY}")
    return Finding("driver", "skipped", "there is no NVIDIA driver here")


def memory(spec: ModelSpec, gpus: Sequence[GpuReading], devices: str) -> Iterator[Finding]:
    """Judge each GPU that workers are to use by what a model needs."""
    check = f"gpu memory for {spec.name}"
    if not spec.memory_mb:
        yield Finding(check, "ok", "it needs none to speak of")
        return
    if devices == "cpu" or not gpus:
        yield Finding(check, "skipped", "there is no GPU to use here; on a CPU a picture takes minutes")
        return
    least = spec.memory_mb if spec.least_mb is None else spec.least_mb
    chosen = {part.strip() for part in devices.split(",")}
    for gpu in gpus:
        if devices == "all" or str(gpu.index) in chosen:
            yield fits(check, gpu, least, spec.memory_mb)


def fits(check: str, gpu: GpuReading, least_mb: int, whole_mb: int) -> Finding:
    """Judge one GPU by what a model needs at least, and what it takes whole, in MiB."""
    size = gpu.memory_total_mb
    name = f"GPU {gpu.index} ({gpu.name})"
    if size is None:
        return Finding(check, "skipped", f"{name} does not tell its size; {least_mb} MiB are needed")
    says = f"{name} has {size} MiB; whole it takes {whole_mb}"
    if size < least_mb:
        remedy = "serve a smaller model there (ZFLEET_MODELS), or leave it out (ZFLEET_DEVICES)"
        return Finding(check, "problem", f"{says}, in parts {least_mb}", remedy)
    if size < whole_mb:
        remedy = "parts of it wait in the machine's memory (ZFLEET_OFFLOAD), which costs time"
        return Finding(check, "warning", says, remedy)
    return Finding(check, "ok", says)
