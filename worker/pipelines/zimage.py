"""Z-Image in process by diffusers: runs of different sizes, step counts and ages share each forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import PipelineFailed
from worker.pipelines.base import MIB, BasePipeline, ImageRequest, Run
from worker.zimage.decoding import decode
from worker.zimage.errors import named_errors
from worker.zimage.parts import load_parts
from worker.zimage.prompts import Prompts
from worker.zimage.schedule import schedule


@dataclass(kw_only=True, eq=False)
class ZImageRun(Run):
    """A picture in the making, with its tensors on the pipeline's device."""

    latents: Tensor  # (channels, 1, height / 8, width / 8), float32; the 1 is the transformer's frame axis
    captions: tuple[Tensor, ...]  # (tokens, text width) each: the prompt's and, with guidance, the negative prompt's
    times: Tensor  # (steps,), float32: 1 - sigma before each step, so 0 is pure noise
    deltas: tuple[float, ...]  # sigma after a step minus sigma before it; below zero


class Pipeline(BasePipeline):
    """A Z-Image checkpoint: `builtin` (pico), a local diffusers folder or a hub id."""

    _parts: Any  # the stock pipeline; it loads and holds the models, its own __call__ is never used
    _prompts: Prompts

    def load(self) -> None:
        """Bring the weights onto the device; raises ModelLoadFailed with the remedy."""
        self._parts = load_parts(self.spec, self.device)
        self._prompts = Prompts(
            self._parts.tokenizer, self._parts.text_encoder, max_tokens=self.spec.max_tokens, device=self.device
        )

    @named_errors()
    @torch.inference_mode()
    def start(self, request: ImageRequest) -> Run:
        """Encode the prompt, draw the latents and lay out the steps.

        The noise comes from a CPU generator in float32, so that a seed means the same picture on every device.
        """
        factor = self._parts.vae_scale_factor
        shape = (self._parts.transformer.in_channels, 1, request.height // factor, request.width // factor)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(request.seed), dtype=torch.float32)
        sigmas, times = schedule(self._parts.scheduler, width=request.width, height=request.height, steps=request.steps)
        warnings: list[str] = []
        captions = [self._prompts.encode(request.prompt, "prompt", warnings)]
        if request.guidance_scale > 0:
            captions.append(self._prompts.encode(request.negative_prompt or "", "negative prompt", warnings))
        return ZImageRun(
            request=request,
            warnings=warnings,
            latents=noise.to(self.device),
            captions=tuple(captions),
            times=times.to(self.device),
            deltas=tuple(sigmas.diff().tolist()),
        )

    @named_errors()
    @torch.inference_mode()
    def step(self, runs: Sequence[Run]) -> None:
        """Advance every run by one Euler step: x += (sigma' - sigma) v, with v minus the transformer's output.

        One forward serves them all: a run brings one item or, with guidance, two. When it fails no run has moved.
        """
        batch = [_own(run) for run in runs]
        if not batch:
            return
        if not all(run.captions and not run.done for run in batch):
            raise ValueError("a run that is done or discarded cannot be stepped")
        items = [(run, caption) for run in batch for caption in run.captions]
        transformer = self._parts.transformer
        outputs = transformer(
            [run.latents.to(transformer.dtype) for run, _ in items],
            torch.stack([run.times[run.step] for run, _ in items]),
            [caption for _, caption in items],
            return_dict=False,
        )[0]
        predictions = iter(outputs)
        moved = []
        for run in batch:
            prediction = next(predictions).float()
            if len(run.captions) == 2:
                negative = next(predictions).float()
                prediction = prediction + run.request.guidance_scale * (prediction - negative)
            moved.append(run.latents + run.deltas[run.step] * -prediction)
        for run, latents in zip(batch, moved, strict=True):
            run.latents = latents
            run.step += 1

    @named_errors()
    @torch.inference_mode()
    def finish(self, run: Run) -> NDArray[np.uint8]:
        """Decode a run that is done into an array of shape (height, width, 3); raises PipelineFailed for NaNs."""
        picture = self.decode(run)
        if not bool(picture.isfinite().all()):
            raise PipelineFailed("the model produced values that are not numbers; another seed or size may work")
        array: NDArray[np.uint8] = picture.mul(255).round().to(torch.uint8).contiguous().cpu().numpy()
        return array

    @torch.inference_mode()
    def decode(self, run: Run) -> Tensor:
        """Return the picture of a run's latents as float32 in 0..1, (height, width, 3), on the device."""
        return decode(self._parts.vae, _own(run).latents)

    def discard(self, run: Run) -> None:
        """Drop the run's tensors. Safe to call twice, and on a run that was stopped early."""
        own = _own(run)
        own.captions = ()
        own.latents = own.times = torch.empty(0)

    def release_memory(self) -> None:
        """Give memory that no run uses any more back to the device."""
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def memory_used_mb(self) -> int:
        """Device memory that this process's torch holds, in MiB, free blocks of its cache included; 0 on a CPU."""
        return torch.cuda.memory_reserved() // MIB if self.device == "cuda" else 0


def _own(run: Run) -> ZImageRun:
    if not isinstance(run, ZImageRun):
        raise TypeError(f"a {type(run).__name__} was not started by this pipeline")
    return run
