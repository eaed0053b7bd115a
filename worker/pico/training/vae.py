"""Train the VAE on pictures of many sizes."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from worker.pico import scenes
from worker.pico.training.progress import Kept, Progress
from worker.pico.training.steps import SEED, cosine, descend, pick_size, pixels

SMALL = range(64, 129, 16)  # more outline to the pixel, so more to learn for the VAE

STEPS = 7000
PIXELS = 9 * 128 * 128  # in a batch
RATE = 1.5e-3
OUTLINE = 4.0  # added weight of pixels by an outline: they are few, and they are the shape
EDGES = 0.3  # weight of the differences between neighbouring pixels beside the pixels' own
SAMPLE = 256  # pictures whose latents tell the scale
KL = 1e-4  # a decoder that has learnt to live with noise forgives the transformer's errors too


def outlines(pictures: Tensor) -> Tensor:
    """Return 1 within two pixels of where colours meet and 0 elsewhere, (count, 1, height, width)."""
    span = functional.max_pool2d(pictures, 5, 1, 2) + functional.max_pool2d(-pictures, 5, 1, 2)
    return (span.amax(dim=1, keepdim=True) > 0.1).float()


def train(vae: Any, steps: int, kept: Kept, device: str) -> None:
    """Train the VAE on pictures of many sizes, then scale and shift latents to mean 0 and spread 1."""
    vae.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=RATE, weight_decay=1e-4)
    log = Progress("vae", steps)
    for step in kept.steps("vae", steps, {"vae": vae, "optimizer": optimizer}):
        rng = random.Random(f"{SEED} vae {step}")
        torch.manual_seed(rng.getrandbits(32))
        for group in optimizer.param_groups:
            group["lr"] = RATE * cosine(step, steps, 50)
        width, height = pick_size(rng) if rng.random() < 0.3 else (rng.choice(SMALL), rng.choice(SMALL))
        count = max(2, PIXELS // (width * height))
        target = pixels([scenes.invent(rng) for _ in range(count)], width, height, rng)
        target = target.to(device, memory_format=torch.channels_last)
        with torch.autocast(device, dtype=torch.bfloat16):
            latents = vae.encode(target).latent_dist
            output = vae.decode(latents.sample()).sample.float()
        error = (output - target).abs()
        edges = sum(functional.l1_loss(output.diff(dim=axis), target.diff(dim=axis)) for axis in (2, 3))
        likeness = (error * (1 + OUTLINE * outlines(target))).mean() + EDGES * edges
        loss = likeness + KL * latents.kl().mean() / latents.mean[0].numel()
        descend(loss, optimizer)
        log(step + 1, l1=error.mean().item(), loss=loss.item())
    vae.eval().requires_grad_(False)
    if not steps and vae.config.shift_factor is not None:
        return  # latents keep the scale that others have learnt
    rng = random.Random(f"{SEED} scale")
    with torch.inference_mode():
        sample = pixels([scenes.invent(rng) for _ in range(SAMPLE)], 128, 128, rng).to(device)
        means = torch.cat([vae.encode(part).latent_dist.mean for part in torch.split(sample, 32)])
    vae.register_to_config(scaling_factor=1 / means.std().item(), shift_factor=means.mean().item())
