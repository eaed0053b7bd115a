"""Train transformer and text encoder together by flow matching.

x_σ = (1 − σ) x + σ ε, and the transformer learns x − ε, the negative velocity, as in Z-Image.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import click
import torch
from diffusers import ZImagePipeline
from torch import Tensor, nn
from torch.nn import functional

from worker.pico import captions, evaluate
from worker.pico.scenes import LANGUAGES, Scene
from worker.pico.training.hints import Heads
from worker.pico.training.progress import Kept, Progress
from worker.pico.training.steps import SEED, cosine, descend, learnable, pick_size, pixels
from worker.pico.training.text_encoder import embed

STEPS = 11_000
SQUARE = 0.4  # share of the steps before pictures of other sizes than 128 x 128 come in,
MIXED = 0.6  # and their share from then on
POOL = 32_000  # scenes whose latents are kept, half of them 128 x 128: words, noise and σ are drawn anew each time
TOKENS = 32 * (64 + 32)  # in a batch: a picture's patches, and 32 for its caption, which may be up to 64
RATE = 1.5e-3
TEXT_RATE = 0.2  # of that for the text encoder, which can read already
HINTS = 0.1  # weight of what the heads say
EMA = 0.999
TRIAL = 2000  # steps between two looks at what has been learnt; the best is kept
TRIAL_PROMPTS = 60  # at each size
EMPTY = 0.1  # share of captions left out, for guidance
HIGH = 1 / 3  # share of σ drawn above 0.94 on purpose: the background is settled in the first step
PURE = 0.12  # share of σ at 1, of those: every schedule starts there


@dataclass(frozen=True, slots=True)
class Batch:
    """Scenes of one size and their normalised latents (count, 16, height / 8, width / 8)."""

    scenes: tuple[Scene, ...]
    latents: Tensor


class Pools(NamedTuple):
    """What there is to learn from: batches of 128 x 128, and batches of many sizes."""

    square: Sequence[Batch]
    mixed: Sequence[Batch]


@torch.inference_mode()
def make_pool(vae: Any, count: int, device: str, *, mixed: bool) -> list[Batch]:
    """Return batches of `count` scenes in all, drawn and encoded: of many sizes, or all 128 x 128."""
    name = "many sizes" if mixed else "128 x 128"
    rng, pool, made = random.Random(f"{SEED} pool {name}"), [], 0
    log = Progress(f"latents, {name}", count)
    while made < count:
        width, height = pick_size(rng) if mixed else evaluate.MAIN
        size = max(1, TOKENS // (width * height // 256 + 32))
        drawn = tuple(learnable(rng) for _ in range(size))
        with torch.autocast(device, dtype=torch.bfloat16):
            chunks = torch.split(pixels(drawn, width, height, rng).to(device), 16)
            found = [vae.encode(chunk).latent_dist.mean for chunk in chunks]
        latents = (torch.cat(found).float() - vae.config.shift_factor) * vae.config.scaling_factor
        pool.append(Batch(drawn, latents))
        made += size
        log(made)
    return pool


def draw_sigmas(count: int) -> Tensor:
    """Return σ (count,) in 0..1: some at 1, a share near it, the others as a schedule with shift 3 meets them."""
    even = torch.rand(count)
    shifted = 3 * even / (1 + 2 * even)
    kind = torch.rand(count)
    return torch.where(kind < PURE, 1.0, torch.where(kind < HIGH, 0.94 + 0.06 * even, shifted))


def train(
    pipeline: ZImagePipeline,
    heads: Heads,
    pools: Pools,
    steps: int,
    kept: Kept,
    device: str,
    *,
    eager: bool,
) -> None:
    """Train transformer and text encoder together; they end as the best moving average of their weights.

    Unless `eager`, the transformer's blocks are compiled, which takes a C++ compiler and a minute, and saves a quarter
    of each step.
    """
    transformer, text_encoder = pipeline.transformer, pipeline.text_encoder
    if not eager:
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)
    both = nn.ModuleDict({"transformer": transformer, "text_encoder": text_encoder}).to(device).train()
    averaging = torch.optim.swa_utils.get_ema_multi_avg_fn(EMA)  # type: ignore[no-untyped-call]
    average: Any = torch.optim.swa_utils.AveragedModel(both, multi_avg_fn=averaging)
    groups = [
        {"params": [*transformer.parameters(), *heads.parameters()], "peak": RATE},
        {"params": [*text_encoder.parameters()], "peak": RATE * TEXT_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    stateful = {"both": both, "heads": heads.to(device), "average": average, "optimizer": optimizer}
    log = Progress("denoiser", steps)
    with heads.listening(transformer):  # from here on, so that the average has no ears
        for step in kept.steps("denoiser", steps, stateful):
            rng = random.Random(f"{SEED} denoiser {step}")
            torch.manual_seed(rng.getrandbits(32))
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * cosine(step, steps, 150)
            mixed = step >= SQUARE * steps and rng.random() < MIXED
            batch = rng.choice(pools.mixed if mixed else pools.square)
            error, read, seen = lesson(pipeline, heads, batch, rng, device)
            descend(error + HINTS * (read + seen), optimizer)
            average.update_parameters(both)
            log(step + 1, loss=error.item(), read=read.item(), seen=seen.item())
            if (step + 1) % TRIAL == 0 or step + 1 == steps:
                keep_best(ZImagePipeline(**pipeline.components | dict(average.module.items())), kept)
    if best := kept.load("best"):  # there is none where no step was asked for
        transformer.load_state_dict(best["transformer"])
        text_encoder.load_state_dict(best["text_encoder"])


def lesson(
    pipeline: ZImagePipeline, heads: Heads, batch: Batch, rng: random.Random, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the flow's error on a batch, and how wrong the heads are about its captions and about its patches."""
    told = [None if rng.random() < EMPTY else scene for scene in batch.scenes]
    texts = [captions.caption(scene, rng.choice(LANGUAGES), rng) if scene else "" for scene in told]
    noise = torch.randn(batch.latents.shape).to(device)
    sigmas = draw_sigmas(len(texts)).to(device)
    mix = sigmas[:, None, None, None]
    noisy = (1 - mix) * batch.latents + mix * noise
    with torch.autocast(device, dtype=torch.bfloat16):
        embeddings = [each.float() for each in embed(pipeline.text_encoder, pipeline.tokenizer, texts, device)]
        output = pipeline.transformer(list(noisy.unsqueeze(2)), 1 - sigmas, embeddings, return_dict=False)[0]
        read = heads.misread(embeddings, told)
        seen = heads.misplaced(told, batch.latents.shape[2] // 2, batch.latents.shape[3] // 2)
    error = functional.mse_loss(torch.stack(output).squeeze(2).float(), batch.latents - noise)
    return error, read, seen


def keep_best(pipeline: ZImagePipeline, kept: Kept) -> None:
    """Score the pipeline by held-out prompts, others than those of `evaluate`; keep its weights if it is the best."""
    pipeline.set_progress_bar_config(disable=True)
    evaluated = {prompt.text for prompt in captions.held_out(evaluate.SCENES * len(LANGUAGES))}
    prompts = [prompt for prompt in captions.held_out(TRIAL_PROMPTS, seed=SEED) if prompt.text not in evaluated]
    shares: list[float] = []
    for size in (evaluate.MAIN, *evaluate.OTHERS):
        scores = evaluate.score(pipeline, prompts, size)
        told = {kind: scores.share(kind) for kind, _ in scores.asked}
        shares += told.values()
        click.echo(f"trial {size}  " + "  ".join(f"{kind} {share:.3f}" for kind, share in told.items()))
    mean = sum(shares) / len(shares)
    best = kept.load("best")
    if best is None or mean >= best["score"]:
        weights = {name: getattr(pipeline, name).state_dict() for name in ("transformer", "text_encoder")}
        kept.save("best", score=mean, **weights)
