"""A Z-Image checkpoint's models, loaded: pico, a local diffusers folder or a hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImageControlNetModel
from torch import nn

from common.errors import ModelLoadFailed
from common.models import SIZE_MULTIPLE, ModelSpec
from worker.pipelines.base import DEFAULT_TUNING, Tuning
from worker.zimage import offload
from worker.zimage.shape import TOKEN_MULTIPLE
from worker.zimage.skeletons import MODELS, classes_of, empty, naming
from worker.zimage.sources import Source, find, loading
from worker.zimage.weights import Component, fill_all, survey


@dataclass(kw_only=True, eq=False)
class Parts:
    """What a checkpoint is made of, by the names of its folders."""

    scheduler: Any
    vae: Any
    text_encoder: Any  # it ends with the layer before its last; see skeletons.empty_text_encoder
    tokenizer: Any
    transformer: Any
    siglip: Any = None
    siglip_processor: Any = None
    controlnet: Any = None
    loaded_from: str = ""

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of a picture to one latent, along each side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def models(self) -> dict[str, nn.Module]:
        """Return the parts that have weights, by name."""
        found = {name: getattr(self, name) for name in (*MODELS, "controlnet")}
        return {name: model for name, model in found.items() if model is not None}


def load_parts(spec: ModelSpec, device: str, tuning: Tuning = DEFAULT_TUNING) -> Parts:
    """Return a checkpoint's parts with their weights on the device, or in the machine's memory where they wait.

    Raises ModelLoadFailed with the remedy.
    """
    with loading(spec, "a Z-Image checkpoint"):
        dtype = weights_dtype(spec, device)
        source = find(spec, spec.source, spec.revision)
        controlnet = find(spec, spec.controlnet, spec.controlnet_revision) if spec.controlnet else None
        return _load(spec, source, controlnet, device=device, dtype=dtype, tuning=tuning)


def _load(
    spec: ModelSpec, source: Source, controlnet: Source | None, *, device: str, dtype: torch.dtype, tuning: Tuning
) -> Parts:
    """Read configs, then the headers of all weights, then the weights: what is wrong shows before the long part."""
    folder = source.folder
    classes = classes_of(spec, folder)
    scheduler = classes["scheduler"].from_pretrained(folder / "scheduler", local_files_only=True)
    components = {part: _component(part, classes[part], folder / part) for part in MODELS if part in classes}
    check_parts(spec, scheduler, components["transformer"].model)
    if controlnet is not None:
        components["controlnet"] = _component("controlnet", ZImageControlNetModel, controlnet.folder)
    for component in components.values():
        component.check()
    models = {part: component.model for part, component in components.items()}
    waiting = offload.choose_for(spec.name, models, device=device, dtype=dtype, tuning=tuning)
    for part, component in components.items():
        component.device = "cpu" if waiting.waits(part) else device
    fill_all(components.values(), dtype)
    others = {
        part: classes[part].from_pretrained(folder / part, local_files_only=True)
        for part in ("tokenizer", "siglip_processor")
        if part in classes
    }
    if controlnet is not None:
        ZImageControlNetModel.from_transformer(models["controlnet"], models["transformer"])
    offload.apply(models, waiting, device=device)
    if device == "cuda":
        torch.cuda.empty_cache()  # of weights in the dtype they had in their files
    return Parts(scheduler=scheduler, loaded_from=source.name, **models, **others)


def _component(part: str, cls: Any, folder: Path) -> Component:
    model = empty(part, cls, folder)
    return Component(name=part, model=model, stored=survey(folder, naming(part, model)))


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


def check_parts(spec: ModelSpec, scheduler: Any, transformer: Any) -> None:
    """Raise ModelLoadFailed where the checkpoint cannot do what the model's limits promise."""
    if scheduler.config.stochastic_sampling:
        raise ModelLoadFailed(
            f"model {spec.name}: its scheduler draws noise at every step, but only a deterministic "
            "FlowMatchEulerDiscreteScheduler can be batched by steps; correct scheduler_config.json"
        )
    # a position past the rotary tables would be a device-side assert, which ends the whole CUDA context
    frames, rows, columns = transformer.config.axes_lens
    tokens = frames - 2 - (frames - 2) % TOKEN_MULTIPLE
    if spec.max_tokens > tokens:
        raise ModelLoadFailed(f"model {spec.name}: max_tokens must be at most {tokens} for this checkpoint")
    side = min(rows, columns) * SIZE_MULTIPLE
    if spec.max_side > side:
        raise ModelLoadFailed(f"model {spec.name}: max_side must be at most {side} for this checkpoint")
