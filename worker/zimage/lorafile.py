"""A LoRA's file: read, brought into the library's form, and checked before the transformer is touched."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import ZImagePipeline
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.errors import LoraUnusable

PREFIX = "transformer."
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
TEXT_ENCODER = ("text_encoder.", "lora_te")  # as diffusers and kohya name its part
OTHER_KINDS = ("dora_scale", "lora_magnitude_vector", "lokr_", "hada_", "oft_")
METADATA = "lora_adapter_metadata"

Shapes = Mapping[str, tuple[int, int]]  # of every Linear by its name: features in, features out


class LoraWeights(NamedTuple):
    """A LoRA that fits: its tensors on the CPU by key, and what peft is to know beside them."""

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None  # by key with the same prefix; None: every module's scale is 1
    text_encoder: bool  # whether the file also has a part for the text encoder, left out here

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def linear_shapes(transformer: nn.Module) -> Shapes:
    """Return what a LoRA may attach to, of a transformer that has none yet."""
    modules = transformer.named_modules()
    return {name: (m.in_features, m.out_features) for name, m in modules if isinstance(m, nn.Linear)}


def read_lora(path: Path, shapes: Shapes, dtype: torch.dtype) -> LoraWeights:
    """Return a safetensors file's LoRA for a transformer of these shapes, as `dtype`; raises LoraUnusable.

    Keys may be diffusers' own or, as far as diffusers converts them, those of kohya, ComfyUI and ai-toolkit.
    """
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            _check_kind(path, keys)
            wanted = [key for key in keys if not key.startswith(TEXT_ENCODER)]
            raw = {key: file.get_tensor(key) for key in wanted}
            config = _config(path, file.metadata() or {})
        converted = ZImagePipeline.lora_state_dict(raw) if raw else {}
    except (SafetensorError, OSError) as error:
        raise LoraUnusable(f"LoRA {path.stem}: {path.name} cannot be read as safetensors ({error})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:  # keys or shapes nobody knows
        raise LoraUnusable(f"LoRA {path.stem}: its tensors are in no known form ({error})") from error
    mine = {key: tensor for key, tensor in converted.items() if key.startswith(PREFIX)}
    if not mine:
        raise LoraUnusable(f"LoRA {path.stem}: none of its tensors is for this model's transformer")
    for problem in _misfits(mine, shapes):
        raise LoraUnusable(f"LoRA {path.stem} does not fit this model: {problem}")
    # copied, as safetensors maps the file, which may be written over
    tensors = {key: tensor.to(dtype, copy=True) for key, tensor in mine.items()}
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise LoraUnusable(f"LoRA {path.stem}: it has values that are not numbers")
    if config is not None:
        config[PREFIX + "target_modules"] = [key[len(PREFIX) : -len(DOWN)] for key in mine if key.endswith(DOWN)]
    return LoraWeights(tensors, config, len(wanted) < len(keys))


def _check_kind(path: Path, keys: list[str]) -> None:
    for kind in OTHER_KINDS:
        if any(kind in key for key in keys):
            raise LoraUnusable(f"LoRA {path.stem}: it has {kind.strip('_')} tensors; only plain LoRA can be used here")


def _config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the scaling that diffusers' training scripts write into the header, if they did; raises LoraUnusable."""
    if METADATA not in metadata:
        return None
    try:
        found = json.loads(metadata[METADATA])
        if not isinstance(found, dict):
            raise ValueError("an object was expected")
        read = {PREFIX + name: check(found[PREFIX + name]) for name, check in SCALING.items() if PREFIX + name in found}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise LoraUnusable(f"LoRA {path.stem}: the scaling in its header cannot be read ({error})") from error
    return read or None


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("a number was expected")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false was expected")
    return value


def _by_module(value: Any) -> dict[str, float]:
    """Return numbers by the names of modules, which peft takes for regular expressions: here they are just names."""
    if not all(re.fullmatch(r"\^?[A-Za-z0-9_.]{1,200}", name) for name in value):
        raise ValueError("names of modules were expected")
    return {re.escape(name.removeprefix("^")): _number(number) for name, number in value.items()}


# Of peft's config only what scales the weights counts: other fields could have it import modules by name
SCALING: Mapping[str, Callable[[Any], Any]] = {
    "r": _number, "lora_alpha": _number, "rank_pattern": _by_module, "alpha_pattern": _by_module, "use_rslora": _flag,
}  # fmt: skip


def _misfits(tensors: Mapping[str, Tensor], shapes: Shapes) -> Iterator[str]:
    """Yield what does not fit, in words."""
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX).removesuffix(DOWN).removesuffix(UP)
        partner = key.replace(DOWN, UP) if key.endswith(DOWN) else key.replace(UP, DOWN)
        if not key.endswith((DOWN, UP)):
            yield f"{key} is no part of a LoRA"
        elif name not in shapes:
            yield f"there is no linear layer {name}"
        elif partner not in tensors:
            yield f"{key} has no counterpart"
        elif tensor.ndim != 2:
            yield f"{key} has {tensor.ndim} dimensions instead of 2"
        elif key.endswith(DOWN) and tensor.shape[1] != shapes[name][0]:
            yield f"{key} takes {tensor.shape[1]} features instead of {shapes[name][0]}"
        elif key.endswith(UP) and tensor.shape[0] != shapes[name][1]:
            yield f"{key} gives {tensor.shape[0]} features instead of {shapes[name][1]}"
        elif key.endswith(UP) and tensor.shape[1] != tensors[partner].shape[0]:
            yield f"{key} has rank {tensor.shape[1]}, its counterpart {tensors[partner].shape[0]}"
