"""LoRA files of random weights for pico, in each of the forms that are read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

Form = Literal["diffusers", "comfy", "kohya", "fused"]

PICO_SHAPES = {  # features in, features out
    "attention.to_q": (192, 192),
    "attention.to_k": (192, 192),
    "attention.to_v": (192, 192),
    "attention.to_out.0": (192, 192),
    "feed_forward.w1": (192, 512),
}
ATTENTION = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
BLOCKS = ("layers.0", "layers.3", "noise_refiner.0", "context_refiner.0")


def pairs(
    seed: int, *, rank: int, blocks: Iterable[str] = BLOCKS, layers: Sequence[str] = ATTENTION, size: float = 0.3
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return by module a LoRA's random (rank, in) and (out, rank), strong enough to be seen in a picture."""
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{block}.{layer}": (
            torch.randn(rank, PICO_SHAPES[layer][0], generator=draw) * size,
            torch.randn(PICO_SHAPES[layer][1], rank, generator=draw) * size,
        )
        for block in blocks
        for layer in layers
    }


def write_lora(
    path: Path,
    seed: int = 1,
    *,
    rank: int = 4,
    form: Form = "diffusers",
    alpha: float | None = None,
    layers: Sequence[str] = ATTENTION,
    extra: dict[str, Tensor] | None = None,
    config: dict[str, object] | None = None,
) -> Path:
    """Write a LoRA file; `config` goes into the header as diffusers' training scripts put it there."""
    tensors: dict[str, Tensor] = {}
    made = pairs(seed, rank=rank, layers=layers)
    if form == "fused":
        made = pairs(seed, rank=rank, layers=["attention.to_q"])
    for module, (down, up) in made.items():
        if form == "diffusers":
            names = f"transformer.{module}.lora_A.weight", f"transformer.{module}.lora_B.weight"
            base = f"transformer.{module}"
        elif form == "comfy":
            names = f"diffusion_model.{module}.lora_A.weight", f"diffusion_model.{module}.lora_B.weight"
            base = f"diffusion_model.{module}"
        else:
            if form == "fused":
                module, up = module.replace("to_q", "qkv"), torch.cat([up, up * 0.5, -up])
            base = f"lora_unet_{module.replace('.', '_')}"
            names = f"{base}.lora_down.weight", f"{base}.lora_up.weight"
        tensors |= dict(zip(names, (down, up), strict=True))
        if alpha is not None:
            tensors[f"{base}.alpha"] = torch.tensor(alpha)
    metadata = None
    if config is not None:
        metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    save_file(tensors | (extra or {}), path, metadata)
    return path
