"""Z-Image in process by diffusers: runs of different sizes, step counts and ages share each forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from diffusers.utils import logging as diffusers_logging
from numpy.typing import NDArray
from torch import Tensor
from transformers.utils import logging as transformers_logging

from common.errors import DeviceFailed, ModelLoadFailed, OutOfMemory, PipelineFailed
from common.models import SIZE_MULTIPLE
from worker import pico
from worker.pipelines.base import BasePipeline, ImageRequest, Run

CAPTION_MULTIPLE = 32  # tokens: the transformer pads every caption to a multiple of this
MIB = 1 << 20
NO_MEMORY = "the picture does not fit into the GPU's memory; ask for a smaller one, or for fewer at a time"


@contextmanager
def _named_errors() -> Iterator[None]:
    """Tell what a device does to a call by its name: OutOfMemory after which all goes on, DeviceFailed after which
    nothing does, as CUDA's context is then broken for the whole process.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(NO_MEMORY) from error
    except RuntimeError as error:  # torch.AcceleratorError, and what cuBLAS and cuDNN report through torch
        text = str(error)
        if "out of memory" in text or "ALLOC_FAILED" in text:
            raise OutOfMemory(NO_MEMORY) from error
        if isinstance(error, torch.AcceleratorError) or text.startswith(("CUDA error", "cuDNN error")):
            raise DeviceFailed(f"the GPU has failed: {text.splitlines()[0]}") from error
        raise


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

    def load(self) -> None:
        """Bring the weights onto the device; raises ModelLoadFailed with the remedy."""
        for library in (diffusers_logging, transformers_logging):
            library.disable_progress_bar()  # a worker's output is one JSON object a line
        try:
            source, local = self._source()
            self._parts = ZImagePipeline.from_pretrained(
                source,
                revision=None if local else self.spec.revision,
                local_files_only=local,
                use_safetensors=True,
                dtype=self._dtype(),
                device_map=self.device,
            )
            self._check_parts()
        except ModelLoadFailed:
            raise
        except torch.OutOfMemoryError as error:
            remedy = "free the GPU, choose a smaller model, or serve fewer models on this worker"
            raise ModelLoadFailed(f"model {self.spec.name}: not enough GPU memory; {remedy} ({error})") from error
        except Exception as error:  # the libraries raise nearly anything for a broken checkpoint
            raise ModelLoadFailed(self._load_remedy(error)) from error

    @_named_errors()
    @torch.inference_mode()
    def start(self, request: ImageRequest) -> Run:
        """Encode the prompt, draw the latents and lay out the steps.

        The noise comes from a CPU generator in float32, so that a seed means the same picture on every device.
        """
        factor = self._parts.vae_scale_factor
        shape = (self._parts.transformer.in_channels, 1, request.height // factor, request.width // factor)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(request.seed), dtype=torch.float32)
        sigmas, times = self._schedule(request)
        warnings: list[str] = []
        captions = [self._encode(request.prompt, "prompt", warnings)]
        if request.guidance_scale > 0:
            captions.append(self._encode(request.negative_prompt or "", "negative prompt", warnings))
        return ZImageRun(
            request=request,
            warnings=warnings,
            latents=noise.to(self.device),
            captions=tuple(captions),
            times=times.to(self.device),
            deltas=tuple(sigmas.diff().tolist()),
        )

    @_named_errors()
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

    @_named_errors()
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
        vae = self._parts.vae
        latents = _own(run).latents.squeeze(1).unsqueeze(0).to(vae.dtype)
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        decoded: Tensor = vae.decode(latents, return_dict=False)[0]
        # widened first: halving in bfloat16 would leave the bright half of the range with 128 levels
        return decoded.squeeze(0).permute(1, 2, 0).float().mul(0.5).add(0.5).clamp(0, 1)

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

    def _source(self) -> tuple[str, bool]:
        """Return where the weights are and whether that is a folder here, for which the hub is never asked."""
        source = self.spec.source
        if source == "builtin":
            return str(pico.FOLDER), True
        path = Path(source).expanduser()
        if path.is_dir():
            return str(path), True
        if source.startswith((".", "/", "~")):
            raise ModelLoadFailed(f"model {self.spec.name}: there is no folder {path}; correct its source")
        return source, False

    def _dtype(self) -> torch.dtype:
        if self.device == "cpu":
            return torch.float32
        dtype = getattr(torch, self.spec.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ModelLoadFailed(
                f"model {self.spec.name}: {self.spec.dtype!r} is no dtype for weights; use bfloat16, float16 or float32"
            )
        return dtype

    def _check_parts(self) -> None:
        """Raise ModelLoadFailed where the checkpoint cannot do what the model's limits promise."""
        scheduler, config = self._parts.scheduler, self._parts.transformer.config
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.stochastic_sampling:
            raise ModelLoadFailed(
                f"model {self.spec.name}: its scheduler is {type(scheduler).__name__}, but only a deterministic "
                "FlowMatchEulerDiscreteScheduler can be batched by steps; correct scheduler_config.json"
            )
        # a position past the rotary tables would be a device-side assert, which ends the whole CUDA context
        frames, rows, columns = config.axes_lens
        tokens = frames - 2 - (frames - 2) % CAPTION_MULTIPLE
        if self.spec.max_tokens > tokens:
            raise ModelLoadFailed(f"model {self.spec.name}: max_tokens must be at most {tokens} for this checkpoint")
        side = min(rows, columns) * SIZE_MULTIPLE
        if self.spec.max_side > side:
            raise ModelLoadFailed(f"model {self.spec.name}: max_side must be at most {side} for this checkpoint")

    def _load_remedy(self, error: Exception) -> str:
        if self.spec.source == "builtin":
            remedy = f"install zfleet again: {pico.FOLDER} is damaged"
        else:
            remedy = (
                "the source must be a folder or hub id of a Z-Image checkpoint, diffusers format with safetensors; "
                "for the hub, check the network, HF_TOKEN and the revision, or download it and name the folder"
            )
        return f"model {self.spec.name} from {self.spec.source}: {type(error).__name__}: {error}; {remedy}"

    def _encode(self, text: str, what: str, warnings: list[str]) -> Tensor:
        """Return the text's embedding (tokens, text width), cut to the model's limit with a warning."""
        tokenizer, limit = self._parts.tokenizer, self.spec.max_tokens
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        tokens = tokenizer(chat, return_tensors="pt", verbose=False).input_ids
        if (count := tokens.shape[1]) > limit:
            warnings.append(f"The {what} is {count} tokens long and this model reads {limit}; the rest was left out.")
            tokens = tokenizer(chat, return_tensors="pt", truncation=True, max_length=limit).input_ids
        states = self._parts.text_encoder(tokens.to(self.device), output_hidden_states=True, use_cache=False)
        embedding: Tensor = states.hidden_states[-2][0]
        return embedding

    def _schedule(self, request: ImageRequest) -> tuple[Tensor, Tensor]:
        """Return the run's sigmas (steps + 1,) from noise to picture, and the transformer's times (steps,); on the CPU.

        Sigmas fall evenly from 1 to 1/steps before the scheduler shifts them. `mu` matters only to a checkpoint that
        shifts by size: it grows linearly with the number of image tokens between the two points of its config.
        """
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self._parts.scheduler.config)
        config = scheduler.config
        tokens = (request.height // SIZE_MULTIPLE) * (request.width // SIZE_MULTIPLE)
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
        even = torch.linspace(1.0, 1 / request.steps, request.steps).tolist()
        scheduler.set_timesteps(sigmas=even, mu=mu, device="cpu")
        return scheduler.sigmas, (1000 - scheduler.timesteps) / 1000


def _own(run: Run) -> ZImageRun:
    if not isinstance(run, ZImageRun):
        raise TypeError(f"a {type(run).__name__} was not started by this pipeline")
    return run
