"""The soak's method: it tells a leak from noise; and a short one, of a real fleet."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.faults import soak
from tests.faults.rig import LONG
from tests.faults.soak import Figure
from tests.faults.trend import trend

TIMES = np.arange(0.0, 480.0, soak.SAMPLE_S)  # what a run of ten minutes samples
RSS = Figure("worker 0", "RSS MiB")


def series(seed: int, *, leak: float = 0.0, noise: float = 1.5) -> NDArray[np.float64]:
    """Return a level of 100 MiB that wavers by `noise` MiB, with a leak of so many MiB over the run."""
    leaking = leak * TIMES / TIMES[-1]
    wavering: NDArray[np.float64] = np.random.default_rng(seed).normal(100, noise, len(TIMES)) + leaking
    return wavering


@pytest.mark.parametrize("seed", range(10))
def test_a_leak_is_told_from_noise(seed: int) -> None:
    tolerance = RSS.tolerance(100)
    assert not trend(TIMES, series(seed), tolerance).drifts
    leaking = trend(TIMES, series(seed, leak=8), tolerance)
    assert leaking.drifts
    assert leaking.growth == pytest.approx(8, abs=1.5)
    assert leaking.low < leaking.growth < leaking.high


def test_what_is_too_small_or_falls_is_no_drift() -> None:
    small = trend(TIMES, series(1, leak=2, noise=0.1), RSS.tolerance(100))
    assert small.low > 0 and not small.drifts
    assert not trend(TIMES, series(1, leak=-20), RSS.tolerance(100)).drifts


def test_outliers_and_steps() -> None:
    spiky = series(2)
    spiky[::10] += 500  # what a collection that is due looks like
    assert not trend(TIMES, spiky, RSS.tolerance(100)).drifts
    constant = trend(TIMES, np.full(len(TIMES), 12.0), 3.0)
    assert (constant.level, constant.growth, constant.low, constant.high) == (12, 0, 0, 0)
    one_file_a_minute = trend(TIMES, 12 + TIMES // 60, Figure("gunicorn", "files").tolerance(12))
    assert one_file_a_minute.drifts
    with pytest.raises(ValueError, match="too few"):
        trend([0, 1], [0, 1], 1)


@pytest.mark.alone
def test_a_short_soak(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if not LONG:  # enough samples for a trend, and records that are gone soon enough for their number to level off
        monkeypatch.setattr(soak, "SAMPLE_S", 1.0)
        monkeypatch.setattr(soak, "SHORTEST_RETENTION_S", 4.0)
    assert soak.main(["--minutes", "1" if LONG else "0.25", "--model", "simulated"]) == 0, capsys.readouterr().out
    told = capsys.readouterr().out
    for subject in ("Redis server", "gunicorn", "gateway 0", "supervisor", "worker 0", "worker 1"):
        assert f"| {subject} | RSS MiB |" in told, told
    assert "| Redis | keys |" in told and "| tasks | latency ms |" in told
    assert "lost 0, doubled 0, broken 0" in told
