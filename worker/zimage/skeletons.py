"""A checkpoint's models built from their configs, without weights.

Only classes named here are ever imported, whatever a checkpoint asks for. All this belongs to one thread: accelerate
and the libraries patch torch's modules while they build.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import nn

from common.errors import ModelLoadFailed
from common.models import ModelSpec

KNOWN: Mapping[str, tuple[str, Mapping[str, str]]] = {  # by part: the library, and its class for each name it goes by
    "scheduler": ("diffusers", {"FlowMatchEulerDiscreteScheduler": "FlowMatchEulerDiscreteScheduler"}),
    "vae": ("diffusers", {"AutoencoderKL": "AutoencoderKL"}),
    "text_encoder": ("transformers", {"Qwen3Model": "Qwen3Model", "Qwen3ForCausalLM": "Qwen3Model"}),
    "tokenizer": ("transformers", {"Qwen2Tokenizer": "Qwen2Tokenizer", "Qwen2TokenizerFast": "Qwen2Tokenizer"}),
    "transformer": ("diffusers", {"ZImageTransformer2DModel": "ZImageTransformer2DModel"}),
    "siglip": ("transformers", {"Siglip2VisionModel": "Siglip2VisionModel"}),
    "siglip_processor": (
        "transformers",
        # the one that needs no torchvision, and says nothing about its absence on stderr, where each line is JSON
        dict.fromkeys(
            ("Siglip2ImageProcessor", "Siglip2ImageProcessorFast", "Siglip2ImageProcessorPil"),
            "Siglip2ImageProcessorPil",
        ),
    ),
    "controlnet": ("diffusers", {"ZImageControlNetModel": "ZImageControlNetModel"}),
}
OPTIONAL = ("siglip", "siglip_processor", "controlnet")
MODELS = ("text_encoder", "transformer", "vae", "siglip")  # the parts that have weights, in their own folders
SHARED = (  # what a ControlNet takes from the transformer, and a checkpoint of it may hold once more
    "t_embedder.",
    "all_x_embedder.",
    "cap_embedder.",
    "noise_refiner.",
    "context_refiner.",
    "x_pad_token",
    "cap_pad_token",
)

Rename = Callable[[str], str | None]


def classes_of(spec: ModelSpec, folder: Path) -> dict[str, Any]:
    """Return the class of every part that model_index.json names; raises ModelLoadFailed for one not known here."""
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    classes: dict[str, Any] = {}
    for part, (library, known) in KNOWN.items():
        name: Any = (index.get(part) or (None, None))[1]
        if name is None and part in OPTIONAL:
            continue
        if name not in known:
            raise ModelLoadFailed(
                f"model {spec.name}: its {part} is {name}, but only {' or '.join(sorted(set(known.values())))} can be "
                "served; correct model_index.json"
            )
        classes[part] = getattr(importlib.import_module(library), known[name])
    return classes


def empty(part: str, cls: Any, folder: Path) -> nn.Module:
    """Return a part's model from the config in its folder: parameters on the meta device, computed buffers real."""
    model: nn.Module
    with init_empty_weights(include_buffers=False):
        if part == "text_encoder":
            model = empty_text_encoder(cls, cls.config_class.from_pretrained(folder, local_files_only=True))
        elif part == "siglip":
            model = cls(cls.config_class.from_pretrained(folder, local_files_only=True))
        else:
            model = cls.from_config(cls.load_config(folder, local_files_only=True))
    return model


def empty_text_encoder(cls: Any, config: Any) -> Any:
    """Return a text encoder that ends with the layer before its last, whose output is all that Z-Image reads.

    So `last_hidden_state` is what `hidden_states[-2]` of the whole model is.
    """
    config.num_hidden_layers -= 1
    config.layer_types = config.layer_types[: config.num_hidden_layers]
    model = cls(config)
    model.norm = nn.Identity()
    return model


def naming(part: str, model: Any) -> Rename:
    """Return how the names in a part's files become the model's; None for what it does not need."""
    if part == "text_encoder":
        return _text_naming(model.config.num_hidden_layers)
    if part == "controlnet":
        return lambda name: None if name.startswith(SHARED) else name
    return lambda name: name


def _text_naming(layers: int) -> Rename:
    unused = (f"layers.{layers}.", "norm.", "lm_head.")

    def rename(name: str) -> str | None:
        own = name.removeprefix("model.")  # of a checkpoint that was saved with its language head
        return None if own.startswith(unused) else own

    return rename
