"""What waits in the machine's memory until it is used, where a GPU is too small for all of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

from common.telemetry import get_logger
from worker.pipelines.base import MIB, Tuning

log = get_logger()

ENCODERS = ("text_encoder", "vae", "siglip")  # used once or twice a picture; the others at every step
FORWARD = 1536 * MIB  # three forwards at 1024 x 1024, in bfloat16
MARGIN = 1280 * MIB  # with it, what a picture takes at its fullest: decoding, with room for cuDNN's copies

Choice = Literal["none", "encoders", "all"]


class Waiting(NamedTuple):
    """Which parts wait in the machine's memory: none, the encoders, or all of them."""

    choice: Choice

    def waits(self, part: str) -> bool:
        """Whether this part's weights are to be read into the machine's memory."""
        return self.choice == "all" or (self.choice == "encoders" and part in ENCODERS)


def choose(wanted: Literal["auto", "none", "encoders", "all"], *, steady: int, encoders: int, available: int) -> Choice:
    """Return what waits, for the bytes of the encoders, of the rest of the model, and of the GPU.

    `auto` lets as little wait as leaves room for one picture at 1024 x 1024.
    """
    if wanted != "auto":
        return wanted
    if steady + encoders + FORWARD + MARGIN <= available:
        return "none"
    return "encoders" if steady + FORWARD + MARGIN <= available else "all"


def choose_for(
    model: str, parts: Mapping[str, nn.Module], *, device: str, dtype: torch.dtype, tuning: Tuning
) -> Waiting:
    """Return what of these parts waits, with a log line; on a CPU nothing does. The parts need no weights yet."""
    if device != "cuda":
        return Waiting("none")
    sizes = {name: sum(weight.numel() for weight in part.parameters()) * dtype.itemsize for name, part in parts.items()}
    encoders = sum(size for name, size in sizes.items() if name in ENCODERS)
    available = available_bytes(tuning)
    choice = choose(tuning.offload, steady=sum(sizes.values()) - encoders, encoders=encoders, available=available)
    log.info(
        "offload_chosen",
        model=model,
        choice=choice,
        wanted=tuning.offload,
        gpu_mb=available // MIB,
        needed_mb=(sum(sizes.values()) + FORWARD + MARGIN) // MIB,
        **{f"{name}_mb": size // MIB for name, size in sizes.items()},
    )
    return Waiting(choice)


def available_bytes(tuning: Tuning) -> int:
    """Return what this process could have of its GPU if it held nothing yet; other models of its own can make room."""
    free, _ = torch.cuda.mem_get_info()
    available = free + torch.cuda.memory_reserved()
    return available if tuning.memory_bytes is None else min(available, tuning.memory_bytes)


def apply(parts: Mapping[str, Any], waiting: Waiting, *, device: str) -> None:
    """Have the parts that wait, whose weights are on the CPU, come to the device while they are used.

    Encoders come layer by layer, and the next is fetched meanwhile where the device has streams. Of transformer and
    ControlNet only the main layers wait, one at a time: the rest, a tenth, is shared between the two and stays.
    """
    for name, part in parts.items():
        if not waiting.waits(name):
            continue
        if name == "vae":
            # each on its own, as neither is called by way of the whole
            for half in (part.encoder, part.decoder):
                _stream(half, device, offload_type="leaf_level")
            _settle(part, device, besides=(part.encoder, part.decoder))
        elif name in ENCODERS:
            _stream(part, device, offload_type="leaf_level")
        else:
            layers = part.control_layers if name == "controlnet" else part.layers
            holder = nn.Module()  # diffusers looks for lists of blocks in a module, and takes along what is beside them
            holder.layers = layers
            _stream(holder, device, offload_type="block_level", num_blocks_per_group=1)
            _settle(part, device, besides=(layers,))


def streamed_bytes(part: nn.Module) -> int:
    """Return how many bytes of a part's waiting weights are on the device during a call: those of two layers.

    One is in use while the next is fetched; counted are the two largest. 0 where nothing of the part waits.
    """
    streamed = {module for module in part.modules() if hasattr(module, "_diffusers_hook")}
    layers = [module for module in streamed if not streamed.intersection(module.modules()) - {module}]
    return sum(sorted(sum(weight.nbytes for weight in layer.parameters()) for layer in layers)[-2:])


def _stream(part: nn.Module, device: str, **options: Any) -> None:
    streams = device == "cuda"  # and then the weights are pinned, and never copied back
    apply_group_offloading(part, torch.device(device), torch.device("cpu"), use_stream=streams, **options)


def _settle(part: nn.Module, device: str, *, besides: tuple[nn.Module, ...]) -> None:
    """Bring a part's weights to the device, but for those of some of its modules."""
    waiting = {id(tensor) for module in besides for tensor in (*module.parameters(), *module.buffers())}
    for tensor in (*part.parameters(), *part.buffers()):
        if id(tensor) not in waiting:
            tensor.data = tensor.data.to(device)
