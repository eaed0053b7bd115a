"""Arithmetic: what one forward of Z-Image's transformer takes, and how much of it this device can do at best."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

SEQUENCE_MULTIPLE = (
    32  # tokens: captions and pictures are each padded to a multiple of this, and the padding is computed
)
MODULATION_WIDTH = 256  # of the time embedding, or the transformer's width where that is smaller
TIME_FREQUENCIES = 256
TIME_HIDDEN = 1024

MATMUL_SIDES = (4096, 8192, 16384)  # on a GPU; the best of them counts
MATMUL_SIDE_CPU = 512
MATMULS = 10  # in a row, timed together
MATMUL_TRIALS = 5


def dit_flops(config: Mapping[str, Any], *, rows: int, columns: int, caption: int) -> int:
    """Return the floating-point operations of one forward for one picture: two for each multiply-add of its matrix
    products, as `torch.utils.flop_counter` counts them; norms, rotations and activations are left out.

    `rows` and `columns` are the latents', `caption` is in tokens. With I picture tokens, C caption tokens (both padded
    to 32), width d, hidden width h and N tokens in a block, a block takes 8 N d² (query, key, value, output), 6 N d h
    (the gated feed-forward's three), 4 N² d (scores and their sum over the values), and its modulation 8 m d. N is I in
    the noise refiner, C in the context refiner, which is not modulated, and I + C in the layers.
    """
    dim, channels = int(config["dim"]), int(config["in_channels"])
    patch = int(config["all_patch_size"][0])
    hidden, modulation = int(dim / 3 * 8), min(dim, MODULATION_WIDTH)
    patch_values = patch * patch * channels
    image, text = tokens(config, rows=rows, columns=columns, caption=caption)

    def block(length: int) -> int:
        return 8 * length * dim**2 + 6 * length * dim * hidden + 4 * length**2 * dim

    modulated = 8 * modulation * dim
    refiners, layers = int(config["n_refiner_layers"]), int(config["n_layers"])
    embedded = 2 * dim * (image * patch_values + text * int(config["cap_feat_dim"]))
    time_embedded = 2 * TIME_HIDDEN * (TIME_FREQUENCIES + modulation)
    refined = refiners * (block(image) + modulated + block(text))
    final = 2 * (image + text) * dim * patch_values + 2 * modulation * dim
    return embedded + time_embedded + refined + layers * (block(image + text) + modulated) + final


def tokens(config: Mapping[str, Any], *, rows: int, columns: int, caption: int) -> tuple[int, int]:
    """Return the picture's and the caption's tokens as the transformer computes them, each padded to 32."""
    patch = int(config["all_patch_size"][0])
    return _padded((rows // patch) * (columns // patch)), _padded(caption)


def matmul(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Return the best rate of a square matrix product on this device: its TFLOP/s, its side and its milliseconds.

    Of normal random numbers: a GPU multiplies zeros faster, as they take less power.
    """
    sides = MATMUL_SIDES if device == "cuda" else (MATMUL_SIDE_CPU,)
    return max((_rate(side, device, dtype) for side in sides), key=lambda found: found["tflop_per_s"])


def _rate(side: int, device: str, dtype: torch.dtype) -> dict[str, float]:
    left, right = (torch.randn(side, side, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    out = torch.empty(side, side, device=device, dtype=dtype)
    trials = []
    for _ in range(MATMUL_TRIALS + 1):  # the first warms up
        synchronize(device)
        began = time.perf_counter()
        for _ in range(MATMULS):
            torch.mm(left, right, out=out)
        synchronize(device)
        trials.append((time.perf_counter() - began) / MATMULS)
    best = min(trials[1:])
    return {"tflop_per_s": 2 * side**3 / best / 1e12, "side": side, "product_ms": best * 1000}


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def _padded(count: int) -> int:
    return count + -count % SEQUENCE_MULTIPLE
