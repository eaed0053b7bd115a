"""One forward of the transformer for everything that takes a step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.models import SIZE_MULTIPLE
from worker.zimage.control import Control, Padded
from worker.zimage.omni import References
from worker.zimage.shape import PATCH, TOKEN_MULTIPLE


def length_class(width: int, height: int) -> int:
    """Return the same number for pictures, sizes in pixels, that waste little on padding in one forward.

    Within a class the longest has at most sqrt(2) times the tokens of the shortest.
    """
    return round(2 * math.log2(width * height / SIZE_MULTIPLE**2))


class Item(NamedTuple):
    """One sequence of a forward: a run's latents with its prompt or with its negative prompt."""

    latents: Tensor  # (channels, 1, height / 8, width / 8)
    time: Tensor  # (), 1 - sigma
    caption: tuple[Tensor, ...]  # (tokens, text width) each: one piece, more with references
    control: Control | None
    references: References | None

    @property
    def tokens(self) -> int:
        """Return how long the sequence is where the caption is one piece."""
        rows, columns = (side // PATCH for side in self.latents.shape[-2:])
        return sum(count + -count % TOKEN_MULTIPLE for count in (rows * columns, len(self.caption[0])))


def predict(parts: Any, items: Sequence[Item]) -> list[Tensor]:
    """Return the transformer's output for each item, of its latents' shape.

    Items with a control stand first. All have references, or none has.
    """
    latents = [item.latents for item in items]
    times = torch.stack([item.time for item in items])
    if parts.siglip is not None:
        return _predict_omni(parts.transformer, latents, times, items)
    outputs: list[Tensor] = parts.transformer(
        latents,
        times,
        [item.caption[0] for item in items],
        controlnet_block_samples=_block_samples(parts.controlnet, latents, times, items),
        return_dict=False,
    )[0]
    return outputs


def _block_samples(
    controlnet: Any, latents: Sequence[Tensor], times: Tensor, items: Sequence[Item]
) -> Mapping[int, Tensor] | None:
    """Return what the ControlNet adds after each layer, from one forward for the items that have a control."""
    controls = [item.control for item in items if item.control]
    if not controls:
        return None
    count = len(controls)
    samples: dict[int, Tensor] = controlnet(
        latents[:count],
        times[:count],
        [item.caption[0] for item in items[:count]],
        [control.latents for control in controls],
        conditioning_scale=torch.stack([control.scale for control in controls]),
    )
    if count == len(items):
        return samples
    return Padded(samples, items=len(items), tokens=max(item.tokens for item in items))


def _predict_omni(transformer: Any, latents: Sequence[Tensor], times: Tensor, items: Sequence[Item]) -> list[Tensor]:
    """Return the outputs of a checkpoint that reads pictures: clean ones (mask 0) before the noisy one (mask 1)."""
    references = [item.references or References((), ()) for item in items]
    outputs: list[Tensor] = transformer(
        [[*reference.latents, own] for reference, own in zip(references, latents, strict=True)],
        times,
        [list(item.caption) for item in items],
        siglip_feats=[[*reference.features, None] if reference.features else None for reference in references],
        image_noise_mask=[[0] * len(reference.latents) + [1] for reference in references],
        return_dict=False,
    )[0]
    return outputs
