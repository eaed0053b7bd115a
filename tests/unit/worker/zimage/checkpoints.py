"""Checkpoints in miniature, with random weights, on disk as the libraries save them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImageControlNetModel, ZImageTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Siglip2ImageProcessor, Siglip2VisionConfig, Siglip2VisionModel

from common.models import BUILT_IN, ModelSpec
from worker import pico

PICO = next(spec for spec in BUILT_IN if spec.name == "pico")
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"


def spec_of(source: Path | str, **changes: Any) -> ModelSpec:
    """pico's model, from another place."""
    return ModelSpec.model_validate(PICO.model_dump() | {"source": str(source)} | changes)


def copy_of_pico(folder: Path) -> Path:
    return shutil.copytree(pico.FOLDER, folder)


def sharded(folder: Path, *, head: bool) -> Path:
    """pico with an untrained transformer and text encoder in several files each; `head`: saved as a language model."""
    copy_of_pico(folder)
    torch.manual_seed(1)
    language: Any = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=768, hidden_size=128, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32,
        )
    )  # fmt: skip
    for part in ("text_encoder", "transformer"):
        shutil.rmtree(folder / part)
    (language if head else language.model).save_pretrained(folder / "text_encoder", max_shard_size="300KB")
    transformer(siglip=None).save_pretrained(folder / "transformer", max_shard_size="300KB")
    if head:
        amend(folder, text_encoder=["transformers", "Qwen3ForCausalLM"])
    return folder


def omni(folder: Path) -> Path:
    """pico with a transformer that reads pictures, and what sees them."""
    copy_of_pico(folder)
    torch.manual_seed(2)
    shutil.rmtree(folder / "transformer")
    transformer(siglip=32).save_pretrained(folder / "transformer")
    seeing: Any = Siglip2VisionModel(
        Siglip2VisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_patches=16
        )
    )
    seeing.save_pretrained(folder / "siglip")
    Siglip2ImageProcessor(max_num_patches=12).save_pretrained(folder / "siglip_processor")
    amend(
        folder,
        siglip=["transformers", "Siglip2VisionModel"],
        siglip_processor=["transformers", "Siglip2ImageProcessor"],
    )
    return folder


def controlnet(folder: Path) -> Path:
    """A ControlNet for pico, saved together with what it borrows from a transformer."""
    torch.manual_seed(3)
    made: Any = ZImageControlNetModel(
        control_layers_places=[0, 2], control_in_dim=16, dim=192, n_refiner_layers=1, n_heads=6, n_kv_heads=6
    )
    lender = ZImageTransformer2DModel.from_pretrained(pico.FOLDER / "transformer", local_files_only=True)
    ZImageControlNetModel.from_transformer(made, lender).save_pretrained(folder)
    return folder


def transformer(*, siglip: int | None) -> Any:
    return ZImageTransformer2DModel(
        dim=96, n_layers=3, n_refiner_layers=1, n_heads=3, n_kv_heads=3, cap_feat_dim=128, siglip_feat_dim=siglip,
        axes_dims=[8, 12, 12], axes_lens=[1024, 128, 128],
    )  # fmt: skip


def amend(folder: Path, **parts: list[str]) -> None:
    """Change what model_index.json says of some parts."""
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | parts), "utf-8")


def rewrite(file: Path, *, drop: str = "", add: str = "", reshape: str = "") -> None:
    """Take a weight out of a file, put one in, or give one another shape."""
    weights = load_file(file)
    weights.pop(drop, None)
    if add:
        weights[add] = torch.zeros(2)
    if reshape:
        weights[reshape] = torch.zeros(2, 3)
    save_file(weights, file)
