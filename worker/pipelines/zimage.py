"""Z-Image in process by diffusers: runs of different sizes, step counts and ages share each forward."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import PipelineFailed
from worker.pipelines.base import MIB, BasePipeline, ImageRequest, Run
from worker.zimage.adapters import PLAIN, Adapters, Blend
from worker.zimage.control import Control, prepare_control
from worker.zimage.decoding import decode
from worker.zimage.errors import named_errors
from worker.zimage.forward import Item, length_class, predict
from worker.zimage.guidance import guide, guided_steps
from worker.zimage.inputs import Kept, begin
from worker.zimage.memory import peak_bytes
from worker.zimage.modes import check_modes
from worker.zimage.omni import References, check_room, prepare_references
from worker.zimage.parts import Parts, load_parts
from worker.zimage.previews import Previews, predicted
from worker.zimage.prompts import Prompts
from worker.zimage.residue import Traces, allocated_bytes, release_cache, weight_bytes
from worker.zimage.schedule import schedule
from worker.zimage.shape import shape_of


@dataclass(kw_only=True, eq=False)
class ZImageRun(Run):
    """A picture in the making, with its tensors on the pipeline's device."""

    latents: Tensor  # (channels, 1, height / 8, width / 8), float32; the 1 is the transformer's frame axis
    captions: tuple[Tensor, ...]  # (tokens, text width) each: the prompt's one piece, more beside references
    negatives: tuple[Tensor, ...]  # the negative prompt's; empty without guidance
    guided: tuple[bool, ...]  # (steps,): whether the step is guided
    times: Tensor  # (steps,), float32: 1 - sigma before each step, so 0 is pure noise
    deltas: tuple[float, ...]  # sigma after a step minus sigma before it; below zero
    blend: Blend  # its LoRAs, which this reference keeps loaded
    kept: Kept | None = None
    control: Control | None = None
    references: References | None = None
    before: Tensor | None = None  # the latents before the last step

    def items(self, dtype: torch.dtype) -> list[Item]:
        """Return what the run brings to its next forward: one item or, for a guided step, two."""
        captions = (self.captions, self.negatives) if self.guided[self.step] else (self.captions,)
        latents, time = self.latents.to(dtype), self.times[self.step]
        return [Item(latents, time, caption, self.control, self.references) for caption in captions]

    def moved(self, outputs: Iterator[Tensor]) -> Tensor:
        """Return the latents after the next step, by what the transformer made of its items.

        That is an Euler step, x += (sigma' - sigma) v, with v minus the output.
        """
        output = next(outputs).float()
        if self.guided[self.step]:
            scale, normalization = self.request.guidance_scale, self.request.cfg_normalization
            output = guide(output, next(outputs).float(), scale=scale, normalization=normalization)
        latents = self.latents + self.deltas[self.step] * -output
        return self.kept.restore(latents, self.step + 1) if self.kept else latents


class Pipeline(BasePipeline):
    """A Z-Image checkpoint: `builtin` (pico), a local diffusers folder or a hub id."""

    _parts: Parts
    _prompts: Prompts
    _previews: Previews
    _adapters: Adapters

    def load(self) -> None:
        """Bring the weights onto the device; raises ModelLoadFailed with the remedy."""
        self.adopt(load_parts(self.spec, self.device, self.tuning))

    def adopt(self, parts: Parts) -> None:
        """Take parts whose weights are on the device already, wherever they come from."""
        self._parts = parts
        self._prompts = Prompts(
            parts.tokenizer,
            parts.text_encoder,
            max_tokens=self.spec.max_tokens,
            device=self.device,
            max_bytes=self.tuning.embeds_bytes,
        )
        self._previews = Previews(parts.vae, self.device)
        self._adapters = Adapters(parts.transformer)
        self._dtype = parts.transformer.dtype
        self._shape = shape_of(parts)
        self.loaded_from = parts.loaded_from

    def unload(self) -> int:
        """Drop all that `load` made, for good; return how many bytes of the weights are still held by somebody.

        Runs must have been discarded before.
        """
        if not self._loaded:
            return 0
        for name in [name for name in vars(self) if name.startswith("_") and name != "_parts"]:
            delattr(self, name)
        traces = Traces(self._parts.models().values())
        del self._parts
        left = traces.left()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return left

    @property
    def _loaded(self) -> bool:
        return hasattr(self, "_parts")

    @named_errors()
    @torch.inference_mode()
    def start(self, request: ImageRequest) -> Run:
        """Encode the prompt and the pictures, draw the latents and lay out the steps.

        Raises PipelineFailed, naming the remedy, for what this model cannot make.
        """
        parts, device = self._parts, self.device
        check_modes(self.spec.name, parts, request)
        sigmas, times = schedule(parts.scheduler, width=request.width, height=request.height, steps=request.steps)
        factor = parts.vae_scale_factor
        shape = (parts.transformer.in_channels, 1, request.height // factor, request.width // factor)
        tile_above = self.tuning.tile_above
        begun = begin(
            request, parts.vae, shape=shape, sigmas=tuple(sigmas.tolist()), device=device, tile_above=tile_above
        )
        guided = guided_steps(request, times)
        references = prepare_references(request, parts, device, tile_above=tile_above)
        warnings: list[str] = []
        captions = self._encode(request.prompt, "prompt", warnings, references)
        negatives: tuple[Tensor, ...] = ()
        if any(guided[begun.step :]):
            negatives = self._encode(request.negative_prompt or "", "negative prompt", warnings, references)
        elif request.negative_prompt and request.guidance_scale <= 0:
            warnings.append("The negative prompt was left out, as there is no guidance; set guidance_scale above 0.")
        return ZImageRun(
            request=request,
            step=begun.step,
            warnings=warnings,
            latents=begun.latents,
            captions=captions,
            negatives=negatives,
            guided=guided,
            times=times.to(device),
            deltas=tuple(sigmas.diff().tolist()),
            kept=begun.kept,
            control=prepare_control(request, parts.controlnet, parts.vae, device, tile_above=tile_above),
            references=references,
            blend=self._adapters.hold(request.loras, warnings),
        )

    def _encode(self, text: str, what: str, warnings: list[str], references: References | None) -> tuple[Tensor, ...]:
        if self._parts.siglip is None:
            return (self._prompts.encode(text, what, warnings),)
        pictures = len(references.latents) if references else 0
        pieces = self._prompts.encode_pieces(text, what, warnings, pictures=pictures)
        check_room(self._parts.transformer.config.axes_lens, pieces, references)
        return pieces

    @named_errors()
    @torch.inference_mode()
    def step(self, runs: Sequence[Run]) -> None:
        """Advance every run by one Euler step, all by one forward. When it fails no run has moved."""
        batch = sorted((_own(run) for run in runs), key=lambda run: run.control is None)  # as `predict` wants them
        if not batch:
            return
        if not all(run.captions and not run.done for run in batch):
            raise ValueError("a run that is done or discarded cannot be stepped")
        if len({self.sharing(run) for run in batch}) > 1:
            raise ValueError("runs with references and without, or with different LoRAs, cannot share a step")
        self._adapters.activate(batch[0].blend)
        outputs = iter(predict(self._parts, [item for run in batch for item in run.items(self._dtype)]))
        moved = [run.moved(outputs) for run in batch]
        for run, latents in zip(batch, moved, strict=True):
            run.before, run.latents = run.latents, latents
            run.step += 1

    def batch_key(self, run: Run) -> Hashable:
        """Return what runs have in common that may and should share a step: about as many tokens, too.

        A forward pads all its runs to the longest of them, and what is padded is computed.
        """
        return self.sharing(run), length_class(run.request.width, run.request.height)

    def sharing(self, run: Run) -> Hashable:
        """Return what runs must have in common to share a forward: their LoRAs, which are part of the weights, and
        whether there are reference pictures, which the transformer reads for a whole batch or for none.
        """
        own = _own(run)
        return own.references is not None, own.blend.parts

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
        return decode(self._parts.vae, _own(run).latents, tile_above=self.tuning.tile_above)

    @named_errors()
    @torch.inference_mode()
    def preview(self, run: Run) -> NDArray[np.uint8] | None:
        """Return a small picture, (rows, columns, 3), of what the run is heading for; None before its first step."""
        own = _own(run)
        if own.before is None:
            return None
        sigma, delta = -sum(own.deltas[own.step :]), own.deltas[own.step - 1]
        return self._previews.draw(predicted(own.latents, own.before, sigma=sigma, delta=delta))

    def discard(self, run: Run) -> None:
        """Drop the run's tensors. Safe to call twice, and on a run that was stopped early."""
        own = _own(run)
        own.captions = own.negatives = ()
        own.blend = PLAIN
        own.latents = own.times = torch.empty(0)
        own.kept = own.control = own.references = None
        own.before = None

    def release_memory(self) -> None:
        """Give memory that no run uses any more back to the device, where it is worth waiting for."""
        if self.device == "cuda":
            release_cache()

    def weight_bytes(self) -> int:
        """Return how many bytes the model's weights are, those that wait in the machine's memory included."""
        return weight_bytes(self._parts.models().values()) if self._loaded else 0

    def allocated_bytes(self) -> int:
        """Return the device memory in live tensors of this process; 0 on a CPU."""
        return allocated_bytes() if self.device == "cuda" else 0

    def counters(self) -> Mapping[str, float]:
        """Return what is counted about encoded prompts, and the bytes of the LoRAs that are loaded."""
        prompts, adapters = getattr(self, "_prompts", None), getattr(self, "_adapters", None)
        if prompts is None or adapters is None:  # not loaded, or being unloaded by another thread
            return {}
        return {**prompts.counters(), "loras_bytes": adapters.nbytes}

    def peak_bytes(self, requests: Sequence[ImageRequest]) -> int:
        """Return an estimate, from above, of what these pictures take while made together.

        LoRAs that are on the device already are not of it: they are among what is kept (`loras_bytes`).
        """
        return peak_bytes(
            self._shape,
            requests,
            count=self._prompts.count,
            tile_above=self.tuning.tile_above,
            device=self.device,
            loras=self._adapters.needed_bytes(lora for request in requests for lora in request.loras),
        )

    def evict(self) -> None:
        """Let go of encoded prompts, and of LoRAs that no run holds."""
        self._prompts.evict()
        self._adapters.evict()

    def memory_used_mb(self) -> int:
        """Device memory in live tensors of this process, in MiB; 0 on a CPU.

        What torch keeps for the next picture is not counted: it is no sign of a leak.
        """
        return self.allocated_bytes() // MIB


def _own(run: Run) -> ZImageRun:
    if not isinstance(run, ZImageRun):
        raise TypeError(f"a {type(run).__name__} was not started by this pipeline")
    return run
