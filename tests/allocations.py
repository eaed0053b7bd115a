"""Counts what torch allocates on a CPU: the peak of all live bytes while a function runs.

The profiler reports every block that torch's CPU allocator hands out or takes back, by whomever it was asked for: so
temporaries inside fused operators (attention's buffers, the reordered inputs of a convolution) count too, which a
TorchDispatchMode cannot see as it meets only what operators return. A view costs nothing, as it is no block. Not
counted: what libraries below allocate by themselves, and what was alive before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")

MEMORY = "[memory]"


class Allocations(NamedTuple):
    """What a function allocated on the CPU."""

    peak: int  # bytes, the most alive at once, beyond what was alive before
    left: int  # bytes still alive at the end; with what the function returned
    operators: frozenset[str]  # the names of what ran


def measure(function: Callable[[], T]) -> tuple[T, Allocations]:
    """Call the function and return its result with what it allocated. Not for use within itself."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    traced = profiler.profiler
    assert traced is not None and traced.kineto_results is not None
    events = traced.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == MEMORY)
    live = peak = 0
    for _, size in changes:
        live += size
        peak = max(peak, live)
    return result, Allocations(peak, live, frozenset(event.name() for event in events) - {MEMORY})
