"""ControlNet: what a control picture adds to the transformer's layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from worker.pipelines.base import ImageRequest
from worker.zimage.inputs import encode


class Control(NamedTuple):
    """A control picture, ready for the ControlNet: both in its dtype and on its device."""

    latents: Tensor  # (control channels, 1, height / 8, width / 8)
    scale: Tensor  # (1, 1): how strongly it counts


def prepare_control(
    request: ImageRequest, controlnet: Any, vae: Any, device: str, *, tile_above: int | None = None
) -> Control | None:
    """Return what the ControlNet reads of the request, or None where there is no control picture."""
    if request.control_image is None:
        return None
    latents = encode(vae, request.control_image, device, tile_above=tile_above)
    # version 2.0 has room for a picture to paint into, which stays empty here
    room = controlnet.config.control_in_dim - latents.shape[0]
    latents = pad(latents, (0, 0, 0, 0, 0, 0, 0, room)).to(controlnet.dtype)
    return Control(latents, torch.full((1, 1), request.control_scale, device=device, dtype=controlnet.dtype))


class Padded(Mapping[int, Tensor]):
    """Block samples (controlled, tokens, width) by layer, with zeros for the items behind and the tokens past them.

    Each is widened as its layer asks for it: all at once they would take hundreds of megabytes.
    """

    def __init__(self, samples: Mapping[int, Tensor], *, items: int, tokens: int) -> None:
        self._samples = samples
        self._items = items
        self._tokens = tokens

    def __getitem__(self, layer: int) -> Tensor:
        sample = self._samples[layer]
        return pad(sample, (0, 0, 0, self._tokens - sample.shape[1], 0, self._items - sample.shape[0]))

    def __contains__(self, layer: object) -> bool:
        return layer in self._samples  # the mixin's way would widen one to tell

    def __iter__(self) -> Iterator[int]:
        return iter(self._samples)

    def __len__(self) -> int:
        return len(self._samples)
