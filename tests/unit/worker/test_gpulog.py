from __future__ import annotations

import csv
from datetime import UTC, datetime, timedelta
from pathlib import Path

from common.cards import GpuReading
from common.settings import Settings
from tests.unit.worker.test_gpu import two_gpus
from worker import gpu, gpulog
from worker.supervisor import Supervisor

__all__ = ["two_gpus"]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_each_look_at_the_driver_is_a_line_for_each_gpu(tmp_path: Path, two_gpus: None) -> None:
    gpu.Watch([0, 1], every_s=60, looked=gpulog.keeper(tmp_path)).look()
    lines = rows(tmp_path / "gpu.csv")
    assert [(line["gpu"], line["used_mb"], line["free_mb"], line["utilisation"]) for line in lines] == [
        ("0", "3", "997", "97"),
        ("1", "3", "997", "97"),
    ]
    assert abs(datetime.fromisoformat(lines[0]["timestamp"]) - datetime.now(UTC)) < timedelta(minutes=1)


def test_what_the_driver_does_not_give_is_empty_and_a_second_supervisor_has_a_file_of_its_own(tmp_path: Path) -> None:
    for keep in (gpulog.keeper(tmp_path), gpulog.keeper(tmp_path)):
        keep([GpuReading(name="NVIDIA H200", index=3)])
    for name in ("gpu.csv", "gpu-1.csv"):
        assert (tmp_path / name).read_text().splitlines()[0] == gpulog.HEADER
        (line,) = rows(tmp_path / name)
        assert list(line.values())[1:] == ["3", "", "", ""]


def test_a_supervisor_keeps_one_where_there_are_gpus_and_a_folder_for_logs(
    settings: Settings, tmp_path: Path, two_gpus: None
) -> None:
    logs = tmp_path / "logs"
    chosen = {"models": ("simulated",), "log_dir": logs}
    Supervisor(settings.model_copy(update=chosen))._gpus.look()
    assert not (logs / "gpu.csv").exists(), "it was told to use the CPU"
    Supervisor(settings.model_copy(update=chosen | {"devices": "all", "log_dir": None}))._gpus.look()
    Supervisor(settings.model_copy(update=chosen | {"devices": "1"}))._gpus.look()
    assert [line["gpu"] for line in rows(logs / "gpu.csv")] == ["1"]
