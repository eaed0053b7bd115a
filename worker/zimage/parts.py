"""A Z-Image checkpoint's models, loaded: pico, a local diffusers folder or a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageControlNetModel, ZImagePipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from common.errors import ModelLoadFailed
from common.models import SIZE_MULTIPLE, ModelSpec
from worker import pico

CAPTION_MULTIPLE = 32  # tokens: the transformer pads every caption to a multiple of this


def load_parts(spec: ModelSpec, device: str) -> Any:
    """Return the stock pipeline with its weights on the device, for its models; its own __call__ is never used.

    Raises ModelLoadFailed with the remedy.
    """
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()  # a worker's output is one JSON object a line
    try:
        source, local = find(spec, spec.source)
        omni = (Path(source) / "siglip").is_dir()
        parts: Any = (_omni_pipeline() if omni else ZImagePipeline).from_pretrained(
            source,
            revision=None if local else spec.revision,
            local_files_only=local,
            use_safetensors=True,
            dtype=weights_dtype(spec, device),
            device_map=device,
        )
        if not omni:
            parts.siglip = parts.siglip_processor = None
        parts.controlnet = _load_controlnet(spec, parts.transformer, device) if spec.controlnet else None
        check_parts(spec, parts)
    except ModelLoadFailed:
        raise
    except torch.OutOfMemoryError as error:
        remedy = "free the GPU, choose a smaller model, or serve fewer models on this worker"
        raise ModelLoadFailed(f"model {spec.name}: not enough GPU memory; {remedy} ({error})") from error
    except Exception as error:  # the libraries raise nearly anything for a broken checkpoint
        raise ModelLoadFailed(_load_remedy(spec, error)) from error
    return parts


def _omni_pipeline() -> Any:
    from diffusers import ZImageOmniPipeline  # not for every model: it brings in SigLIP's image processors

    return ZImageOmniPipeline


def _load_controlnet(spec: ModelSpec, transformer: Any, device: str) -> Any:
    """Return the ControlNet, which shares the transformer's embedders and refiners."""
    source, local = find(spec, str(spec.controlnet))
    controlnet = ZImageControlNetModel.from_pretrained(
        source,
        revision=None if local else spec.controlnet_revision,
        local_files_only=local,
        use_safetensors=True,
        torch_dtype=weights_dtype(spec, device),
        device_map=device,
    )
    return ZImageControlNetModel.from_transformer(controlnet, transformer)


def find(spec: ModelSpec, source: str) -> tuple[str, bool]:
    """Return where weights are and whether that is a folder here, for which the hub is never asked."""
    if source == "builtin":
        return str(pico.FOLDER), True
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path), True
    if source.startswith((".", "/", "~")):
        raise ModelLoadFailed(f"model {spec.name}: there is no folder {path}; correct its source")
    return source, False


def weights_dtype(spec: ModelSpec, device: str) -> torch.dtype:
    """Return the dtype of the weights on this device."""
    if device == "cpu":
        return torch.float32
    dtype = getattr(torch, spec.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelLoadFailed(
            f"model {spec.name}: {spec.dtype!r} is no dtype for weights; use bfloat16, float16 or float32"
        )
    return dtype


def check_parts(spec: ModelSpec, parts: Any) -> None:
    """Raise ModelLoadFailed where the checkpoint cannot do what the model's limits promise."""
    scheduler, config = parts.scheduler, parts.transformer.config
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.stochastic_sampling:
        raise ModelLoadFailed(
            f"model {spec.name}: its scheduler is {type(scheduler).__name__}, but only a deterministic "
            "FlowMatchEulerDiscreteScheduler can be batched by steps; correct scheduler_config.json"
        )
    # a position past the rotary tables would be a device-side assert, which ends the whole CUDA context
    frames, rows, columns = config.axes_lens
    tokens = frames - 2 - (frames - 2) % CAPTION_MULTIPLE
    if spec.max_tokens > tokens:
        raise ModelLoadFailed(f"model {spec.name}: max_tokens must be at most {tokens} for this checkpoint")
    side = min(rows, columns) * SIZE_MULTIPLE
    if spec.max_side > side:
        raise ModelLoadFailed(f"model {spec.name}: max_side must be at most {side} for this checkpoint")


def _load_remedy(spec: ModelSpec, error: Exception) -> str:
    if spec.source == "builtin":
        remedy = f"install zfleet again: {pico.FOLDER} is damaged"
    else:
        remedy = (
            "the source must be a folder or hub id of a Z-Image checkpoint, diffusers format with safetensors; "
            "for the hub, check the network, HF_TOKEN and the revision, or download it and name the folder"
        )
    return f"model {spec.name} from {spec.source}: {type(error).__name__}: {error}; {remedy}"
