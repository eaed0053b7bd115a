"""Z-Image's variants in small, their weights drawn at random, on disk as diffusers saves them for the real code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import ZImageControlNetModel, ZImageTransformer2DModel
from torch import nn

from common.models import BUILT_IN, ModelSpec
from worker import pico

PICO = next(spec for spec in BUILT_IN if spec.name == "pico")
GATE = 0.5  # of every block, before its tanh: from the library's own start nothing is noticed
SIGLIP_WIDTH = 32
SIGLIP_PATCHES = 12  # most of one picture

Refiner = Literal["control_layers", "control_noise_refiner"] | None
REFINERS: tuple[Refiner, ...] = (None, "control_layers", "control_noise_refiner")


def control_checkpoint(folder: Path, refiner: Refiner = None, *, channels: int = 16, seed: int = 0) -> ModelSpec:
    """Save a ControlNet of pico's shape; return the model that is pico with it. Version 2.0 has 33 channels."""
    torch.manual_seed(seed)
    model = ZImageControlNetModel(
        control_layers_places=[0, 2, 4],
        control_refiner_layers_places=[0],
        control_in_dim=channels,
        add_control_noise_refiner=refiner,
        dim=192,
        n_refiner_layers=1,
        n_heads=6,
        n_kv_heads=6,
    )
    _wake(model)
    model.save_pretrained(folder)
    return _spec(name="control", controlnet=str(folder), modes=("text", "image", "inpaint", "control"))


def omni_checkpoint(folder: Path, *, seed: int = 0) -> ModelSpec:
    """Save pico with an untrained transformer that reads pictures, and a SigLIP that sees them; return the model."""
    from transformers import Siglip2ImageProcessor, Siglip2VisionConfig, Siglip2VisionModel

    shutil.copytree(pico.FOLDER, folder, ignore=shutil.ignore_patterns("transformer"))
    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        dim=96,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=128,
        siglip_feat_dim=SIGLIP_WIDTH,
        axes_dims=[8, 12, 12],
        axes_lens=[1024, 128, 128],
    )
    _wake(transformer)
    transformer.save_pretrained(folder / "transformer")
    config: Any = Siglip2VisionConfig(
        hidden_size=SIGLIP_WIDTH,
        intermediate_size=2 * SIGLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_patches=16,
    )
    siglip: Any = Siglip2VisionModel(config)
    siglip.save_pretrained(folder / "siglip")
    Siglip2ImageProcessor(max_num_patches=SIGLIP_PATCHES).save_pretrained(folder / "siglip_processor")
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    index |= {
        "_class_name": "ZImageOmniPipeline",
        "siglip": ["transformers", "Siglip2VisionModel"],
        "siglip_processor": ["transformers", "Siglip2ImageProcessor"],
    }
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    return _spec(name="omni", source=str(folder), modes=("text", "image", "inpaint", "edit"))


def _wake(model: Any) -> None:
    """Give every part of a new model a say: projections that are not zero, gates half open, pad tokens of their own."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "adaLN" not in name:
            nn.init.xavier_uniform_(module.weight)
        if name.endswith("adaLN_modulation") and len(module) == 1:
            nn.init.normal_(module[0].weight, std=0.02)
            nn.init.constant_(module[0].bias, GATE)
    for name, parameter in model.named_parameters():
        if name.endswith("pad_token"):
            nn.init.normal_(parameter)


def _spec(**changes: object) -> ModelSpec:
    return ModelSpec.model_validate(PICO.model_dump() | changes)
