"""What is timed: pictures of one size alone and eight at a time, mixed sizes, and what emptying the cache costs."""

from __future__ import annotations

import gc
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench.flops import synchronize
from bench.gpu_makers import Made, Maker, StepBatches
from bench.gpu_meter import Meter
from common.errors import OutOfMemory
from worker.pipelines.base import ImageRequest

STEPS = 8
SIDES = (512, 1024)  # pixels
SHARES = {512: 0.15, 768: 0.25, 1024: 0.45, 1536: 0.15}  # of the mixed load
TOGETHER = 8
STREAM_TOGETHER = 4
PROMPT = "a lighthouse above the sea"  # with its number and the chat's frame it stays below 32 tokens
MORE = " by night"
MORE_TIMES = (0, 5, 20, 60)  # in the prompts of a mixed load, by turns
GIB = 1 << 30

Say = Callable[[str], None]
Stat = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured; every shape is warmed once more than that."""

    repeats: int = 5
    mixed: int = 20  # pictures
    mixed_repeats: int = 3
    stream: int = 16  # pictures
    shrink: int = 1  # what the sides are divided by


@dataclass(frozen=True, kw_only=True)
class Case:
    """Some pictures to make, by each maker in turn."""

    name: str
    number: int  # goes into the prompts
    sides: tuple[int, ...]  # of the pictures, which are square
    together: int
    repeats: int

    def requests(self, repeat: int) -> list[ImageRequest]:
        """Return requests that no other case or repeat has: the embedding of a known prompt may come from a cache."""
        more = MORE_TIMES if len(set(self.sides)) > 1 else (0,)
        return [
            ImageRequest(
                prompt=f"{PROMPT}{MORE * more[index % len(more)]}, {self.number}{repeat:02d}{index:02d}",
                width=side,
                height=side,
                steps=STEPS,
                guidance_scale=0.0,
                seed=1000 * repeat + index,
            )
            for index, side in enumerate(self.sides)
        ]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One repeat of a case by one maker."""

    whole_ms: float
    forward_ms: list[float]
    text_ms: float
    vae_ms: float
    items: list[int]
    captions: list[int]
    flops: int
    useful: float  # of the tokens computed, the share that is not padding to a common length
    peak_bytes: int
    made: Made


def cases(plan: Plan) -> list[Case]:
    """Return the cases in the order in which they are measured."""
    even = [
        Case(
            name=f"{side // plan.shrink} × {side // plan.shrink}, {together} at a time",
            number=number,
            sides=(side // plan.shrink,) * together,
            together=together,
            repeats=plan.repeats,
        )
        for number, (side, together) in enumerate(itertools.product(SIDES, (1, TOGETHER)))
    ]
    sides = mix(plan.mixed, plan.shrink)
    name = f"mixed {min(sides)} to {max(sides)}, {TOGETHER} at a time"
    mixed = Case(name=name, number=len(even), sides=sides, together=TOGETHER, repeats=plan.mixed_repeats)
    return [*even, mixed]


def mix(count: int, shrink: int) -> tuple[int, ...]:
    """Return so many sides in the shares of the mixed load, in an order that is always the same."""
    bounds = np.cumsum([0.0, *SHARES.values()]).round(6) * count
    sides = [
        side // shrink
        for side, low, high in zip(SHARES, bounds[:-1], bounds[1:], strict=True)
        for _ in range(round(high) - round(low))
    ]
    random.Random(0).shuffle(sides)
    return tuple(sides)


def measure(case: Case, makers: Sequence[Maker], meter: Meter, *, device: str, say: Say) -> Iterator[dict[str, Any]]:
    """Yield each maker's figures, then how far their pictures differ. Makers take turns, repeat by repeat."""
    samples: dict[str, list[Sample]] = {maker.name: [] for maker in makers}
    failed: dict[str, str] = {}
    gc.collect()
    torch.cuda.empty_cache()
    for repeat in range(case.repeats + 1):
        for maker in makers:
            if maker.name in failed:
                continue
            try:
                sample = _sample(case, maker, meter, repeat, device)
            except (OutOfMemory, torch.OutOfMemoryError) as error:
                failed[maker.name] = f"out of memory: {str(error).splitlines()[0]}"
                say(f"{case.name}, {maker.name}: {failed[maker.name]}")
                torch.cuda.empty_cache()
                continue
            if repeat:
                samples[maker.name].append(sample)
            told = f"repeat {repeat} of {case.repeats}" if repeat else "warm-up"
            say(f"{case.name}, {maker.name}, {told}: {sample.whole_ms:.0f} ms")
    for maker in makers:
        about = {"case": case.name, "maker": maker.name}
        yield about | (
            {"error": failed[maker.name]} if maker.name in failed else _figures(case, samples[maker.name], device)
        )
    if not failed:
        ours, stock = (samples[maker.name][-1].made for maker in makers)
        yield {"case": case.name, "difference": difference(ours, stock)}


def emptying(ours: StepBatches, meter: Meter, plan: Plan, *, device: str, say: Say) -> dict[str, Any]:
    """Return what `torch.cuda.empty_cache()` after every picture does to a stream of pictures in which runs of several
    ages share the steps: pictures that retire give their memory back while others go on.
    """
    sides = mix(plan.stream, plan.shrink)
    calls: list[float] = []
    whole: dict[str, list[float]] = {"kept": [], "emptied": []}
    steps: dict[str, list[float]] = {"kept": [], "emptied": []}

    def empty() -> None:
        began = time.perf_counter()
        torch.cuda.empty_cache()
        calls.append((time.perf_counter() - began) * 1000)

    for repeat in range(plan.mixed_repeats + 1):
        for number, (policy, retired) in enumerate((("kept", _nothing), ("emptied", empty)), start=8):
            case = Case(name=policy, number=number, sides=sides, together=STREAM_TOGETHER, repeats=plan.mixed_repeats)
            meter.clear()
            synchronize(device)
            began = time.perf_counter()
            ours.make(case.requests(repeat), case.together, retired=retired)
            synchronize(device)
            spent = (time.perf_counter() - began) * 1000 / len(sides)
            say(f"a stream of {len(sides)}, cache {policy} after each picture: {spent:.1f} ms a picture")
            if repeat:  # the first warms up
                whole[policy].append(spent)
                steps[policy].append(statistics.fmean(meter.ms("transformer")))
    found = {
        policy: {"picture_ms": stat(whole[policy]), "step_ms": stat(steps[policy])} for policy in ("kept", "emptied")
    }
    return {"images": len(sides), "together": STREAM_TOGETHER, "empty_cache_ms": stat(calls), **found}


def _nothing() -> None:
    """Leave the cache as it is."""


def stat(values: Sequence[float]) -> Stat:
    """Return median, least and greatest of some figures."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def difference(ours: Made, stock: Made) -> dict[str, Any]:
    """Return how close pictures and latents are, and how close two pictures are that should differ.

    PSNR in dB of uint8 values; null where nothing differs, or no two pictures are of one size. The worst of all
    pictures. Latents: the greatest difference's norm as a share of the stock latents' norm.
    """
    psnrs = [psnr_db(mine, theirs) for mine, theirs in zip(ours.pictures, stock.pictures, strict=True)]
    other = [
        psnr_db(first, second)
        for index, first in enumerate(stock.pictures)
        for second in stock.pictures[index + 1 :]
        if first.shape == second.shape
    ]
    shares = [
        float((mine - theirs).norm() / theirs.norm()) for mine, theirs in zip(ours.latents, stock.latents, strict=True)
    ]
    return {
        "psnr_db": _least(psnrs),
        "psnr_of_other_seeds_db": _least(other),
        "latents_relative": max(shares),
    }


def psnr_db(first: Any, second: Any) -> float:
    """Return the peak signal-to-noise ratio of two uint8 pictures in dB; infinite where they are equal."""
    error = float(np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def _least(psnrs: Sequence[float]) -> float | None:
    least = min(psnrs, default=math.inf)
    return least if math.isfinite(least) else None


def _sample(case: Case, maker: Maker, meter: Meter, repeat: int, device: str) -> Sample:
    requests = case.requests(repeat)
    meter.clear()
    synchronize(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    made = maker.make(requests, case.together)
    synchronize(device)
    whole = (time.perf_counter() - began) * 1000
    if sum(meter.items) != STEPS * len(requests):
        raise RuntimeError(f"{maker.name} took {sum(meter.items)} forwards of one picture, not {STEPS} for each")
    return Sample(
        whole_ms=whole,
        forward_ms=meter.ms("transformer"),
        text_ms=sum(meter.ms("text_encoder")),
        vae_ms=sum(meter.ms("vae")),
        items=meter.items,
        captions=meter.captions,
        flops=meter.flops,
        useful=meter.tokens / meter.computed,
        peak_bytes=torch.cuda.max_memory_allocated() if device == "cuda" else 0,
        made=made,
    )


def _figures(case: Case, samples: Sequence[Sample], device: str) -> dict[str, Any]:
    images = len(case.sides)
    last = samples[-1]
    others = [each.whole_ms - sum(each.forward_ms) - each.text_ms - each.vae_ms for each in samples]
    return {
        "images": images,
        "together": case.together,
        "steps": STEPS,
        "repeats": len(samples),
        "forwards": len(last.items),
        "items_per_forward": {"min": min(last.items), "mean": statistics.fmean(last.items), "max": max(last.items)},
        "useful_share_of_tokens": last.useful,
        "caption_tokens": {"min": min(last.captions), "max": max(last.captions)},
        "whole_ms": stat([each.whole_ms for each in samples]),
        "step_ms": stat([statistics.fmean(each.forward_ms) for each in samples]),
        "text_ms_per_image": stat([each.text_ms / images for each in samples]),
        "vae_ms_per_image": stat([each.vae_ms / images for each in samples]),
        "other_ms": stat(others),
        "images_per_s": stat([images / each.whole_ms * 1000 for each in samples]),
        "peak_gib": max(each.peak_bytes for each in samples) / GIB if device == "cuda" else None,
        "dit_tflop_per_image": last.flops / images / 1e12,
        "dit_tflop_per_s": stat([each.flops / sum(each.forward_ms) / 1e9 for each in samples]),
    }
