"""The bench's miniature on a GPU: events instead of a clock, and memory that is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import gpu
from bench.gpu_models import FULL, TINY

pytestmark = pytest.mark.gpu


def test_a_gpu_tells_times_and_memory() -> None:
    found: dict[str, Any] = {}
    for part in gpu.measure(TINY, gpu.TINY, device="cuda", dtype=torch.bfloat16, say=lambda text: None):
        found |= part
    assert found["matmul"]["tflop_per_s"] > 1
    for case in [each for each in found["cases"] if "maker" in each]:
        assert case["peak_gib"] > found["weights"]["gib"]
        assert 0 < case["step_ms"]["median"] * case["forwards"] < case["whole_ms"]["max"]
        assert 0 < case["dit_tflop_per_s"]["median"] < found["matmul"]["tflop_per_s"]
    for each in [each for each in found["cases"] if "difference" in each]:
        assert each["difference"]["latents_relative"] < 0.05
    assert found["emptying"]["empty_cache_ms"]["median"] > 0


def test_a_gpu_that_has_or_has_not_room_for_the_full_size_is_told_apart() -> None:
    free, _ = torch.cuda.mem_get_info()
    assert (gpu.refusal(FULL) is None) == (free >= gpu.needed_bytes(FULL))
