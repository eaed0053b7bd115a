"""Train pico: `python -m worker.pico.train OUT` writes the folder that `from_pretrained` reads.

First the tokenizer, then the VAE, then text encoder and transformer together by flow matching: x_σ = (1 − σ) x + σ ε,
and the transformer learns x − ε, the negative velocity, as in Z-Image. Progress is kept in --work, from where an
interrupted training goes on.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import ZImagePipeline
from torch import Tensor, nn
from torch.nn import functional

from worker.pico import captions, evaluate, parts, scenes
from worker.pico.progress import Kept, Progress
from worker.pico.scenes import LANGUAGES, Scene

HERE = Path(__file__).parent
SEED = 3
SIDES = range(64, 257, 16)
SMALL = range(64, 129, 16)  # more outline to the pixel, so more to learn for the VAE

VAE_STEPS = 2900
VAE_PIXELS = 9 * 128 * 128  # in a batch
VAE_RATE = 1.5e-3
EDGES = 0.3  # weight of the differences between neighbouring pixels beside the pixels' own
KL = 3e-4  # a decoder that has learnt to live with noise forgives the transformer's errors too

STEPS = 5000
POOL = 14_000  # scenes whose latents are kept: words, noise and σ are drawn anew each time
TOKENS = 32 * (64 + 32)  # image patches and caption tokens in a batch
RATE = 1.5e-3
EMA = 0.999
TRIAL = 1000  # steps between two looks at what has been learnt; the best is kept
TRIAL_PROMPTS = 120
EMPTY = 0.1  # share of captions left out, for guidance
HIGH = 1 / 3  # share of σ above 0.94: the background is settled in the first step
PURE = 0.12  # share of σ at 1: every schedule starts there


@dataclass(frozen=True, slots=True)
class Batch:
    """Scenes of one size and their normalised latents (count, 16, height / 8, width / 8)."""

    scenes: tuple[Scene, ...]
    latents: Tensor


def pick_size(rng: random.Random) -> tuple[int, int]:
    """Return width and height in pixels: 45% are 128 x 128, the others of any side, rather small than large."""
    kind = rng.random()
    if kind < 0.45:
        return 128, 128
    sides = SIDES if kind < 0.65 else [side for side in SIDES if side <= 160]
    return rng.choice(sides), rng.choice(sides)


def learnable(rng: random.Random) -> Scene:
    """Return a scene that is not kept for evaluation."""
    while (scene := scenes.invent(rng)).held_out:
        pass
    return scene


def pixels(drawn: Sequence[Scene], width: int, height: int, rng: random.Random) -> Tensor:
    """Return pictures of the scenes as (count, 3, height, width) in -1..1."""
    stack = np.stack([np.asarray(scenes.draw(scene, width, height, rng)) for scene in drawn])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 127.5 - 1


def words(count: int, rng: random.Random) -> Iterator[str]:
    """Yield what the tokenizer learns from: English captions, Chinese words, and the chat's own."""
    for _ in range(count):
        yield captions.caption(learnable(rng), "en", rng)
        yield "user\n"
        yield "assistant\n"
    for _ in range(count // 10):
        yield from captions.lexicon()


def cosine(step: int, steps: int, warm_up: int) -> float:
    """Return the share of the learning rate at a step: up in a line, down along a cosine to a hundredth."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2


def train_vae(vae: Any, steps: int, kept: Kept, device: str) -> None:
    """Train the VAE on pictures of many sizes, then scale and shift latents to mean 0 and spread 1."""
    vae.to(device).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_RATE, weight_decay=1e-4)
    log = Progress("vae", steps)
    for step in kept.steps("vae", steps, {"vae": vae, "optimizer": optimizer}):
        rng = random.Random(f"{SEED} vae {step}")
        torch.manual_seed(rng.getrandbits(32))
        for group in optimizer.param_groups:
            group["lr"] = VAE_RATE * cosine(step, steps, 50)
        width, height = pick_size(rng) if rng.random() < 0.3 else (rng.choice(SMALL), rng.choice(SMALL))
        count = max(2, VAE_PIXELS // (width * height))
        target = pixels([scenes.invent(rng) for _ in range(count)], width, height, rng).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            latents = vae.encode(target).latent_dist
            output = vae.decode(latents.sample()).sample.float()
        error = functional.l1_loss(output, target)
        edges = sum(functional.l1_loss(output.diff(dim=axis), target.diff(dim=axis)) for axis in (2, 3))
        loss = error + EDGES * edges + KL * latents.kl().mean() / latents.mean[0].numel()
        descend(loss, optimizer)
        log(step + 1, l1=error.item(), loss=loss.item())
    vae.eval().requires_grad_(False)
    rng = random.Random(f"{SEED} scale")
    with torch.inference_mode():
        sample = pixels([scenes.invent(rng) for _ in range(256)], 128, 128, rng).to(device)
        means = torch.cat([vae.encode(part).latent_dist.mean for part in torch.split(sample, 32)])
    vae.register_to_config(scaling_factor=1 / means.std().item(), shift_factor=means.mean().item())


@torch.inference_mode()
def make_pool(vae: Any, count: int, device: str) -> list[Batch]:
    """Return batches of `count` scenes in all, drawn and encoded."""
    rng, pool, made = random.Random(f"{SEED} pool"), [], 0
    log = Progress("latents", count)
    while made < count:
        width, height = pick_size(rng)
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


def embed(text_encoder: Any, tokenizer: Any, texts: Sequence[str], device: str) -> list[Tensor]:
    """Return each text's embedding (tokens, text width); padding at the end changes nothing for a causal model."""
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        for text in texts
    ]
    tokens = tokenizer(chats, return_tensors="pt", padding=True)
    states = text_encoder(tokens.input_ids.to(device), output_hidden_states=True, use_cache=False).hidden_states[-2]
    return [row[:length] for row, length in zip(states, tokens.attention_mask.sum(dim=1).tolist(), strict=True)]


def draw_sigmas(count: int) -> Tensor:
    """Return σ (count,) in 0..1: some at 1, a share near it, the others as a schedule with shift 3 meets them."""
    even = torch.rand(count)
    shifted = 3 * even / (1 + 2 * even)
    kind = torch.rand(count)
    return torch.where(kind < PURE, 1.0, torch.where(kind < HIGH, 0.94 + 0.06 * even, shifted))


def train_denoiser(pipeline: ZImagePipeline, pool: Sequence[Batch], steps: int, kept: Kept, device: str) -> None:
    """Train transformer and text encoder together; they end as the best moving average of their weights."""
    transformer, text_encoder, tokenizer = pipeline.transformer, pipeline.text_encoder, pipeline.tokenizer
    both = nn.ModuleDict({"transformer": transformer, "text_encoder": text_encoder}).to(device).train()
    averaging = torch.optim.swa_utils.get_ema_multi_avg_fn(EMA)  # type: ignore[no-untyped-call]
    average: Any = torch.optim.swa_utils.AveragedModel(both, multi_avg_fn=averaging)
    optimizer = torch.optim.AdamW(both.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    log = Progress("denoiser", steps)
    for step in kept.steps("denoiser", steps, {"both": both, "average": average, "optimizer": optimizer}):
        rng = random.Random(f"{SEED} denoiser {step}")
        torch.manual_seed(rng.getrandbits(32))
        for group in optimizer.param_groups:
            group["lr"] = RATE * cosine(step, steps, 150)
        batch = rng.choice(pool)
        texts = [
            "" if rng.random() < EMPTY else captions.caption(scene, rng.choice(LANGUAGES), rng)
            for scene in batch.scenes
        ]
        noise = torch.randn(batch.latents.shape).to(device)
        sigmas = draw_sigmas(len(texts)).to(device)
        mix = sigmas[:, None, None, None]
        noisy = (1 - mix) * batch.latents + mix * noise
        with torch.autocast(device, dtype=torch.bfloat16):
            embeddings = [each.float() for each in embed(text_encoder, tokenizer, texts, device)]
            output = transformer(list(noisy.unsqueeze(2)), 1 - sigmas, embeddings, return_dict=False)[0]
        loss = functional.mse_loss(torch.stack(output).squeeze(2).float(), batch.latents - noise)
        descend(loss, optimizer)
        average.update_parameters(both)
        log(step + 1, loss=loss.item())
        if (step + 1) % TRIAL == 0 or step + 1 == steps:
            keep_best(ZImagePipeline(**pipeline.components | dict(average.module.items())), kept)
    if best := kept.load("best"):  # there is none where no step was asked for
        transformer.load_state_dict(best["transformer"])
        text_encoder.load_state_dict(best["text_encoder"])


def keep_best(pipeline: ZImagePipeline, kept: Kept) -> None:
    """Score the pipeline by held-out prompts, others than those of `evaluate`; keep its weights if it is the best."""
    pipeline.set_progress_bar_config(disable=True)
    scores = evaluate.score(pipeline, captions.held_out(TRIAL_PROMPTS, seed=SEED), evaluate.MAIN)
    shares = {kind: scores.share(kind) for kind in evaluate.GOALS}
    mean = sum(shares.values()) / len(shares)
    click.echo("trial  " + "  ".join(f"{kind} {share:.3f}" for kind, share in shares.items()))
    best = kept.load("best")
    if best is None or mean >= best["score"]:
        weights = {name: getattr(pipeline, name).state_dict() for name in ("transformer", "text_encoder")}
        kept.save("best", score=mean, **weights)


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take one step down, however steep it is there."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_([each for group in optimizer.param_groups for each in group["params"]], 1.0)
    optimizer.step()


def untrained() -> ZImagePipeline:
    """Return the pipeline before training; only its tokenizer has learnt already."""
    torch.manual_seed(SEED)
    return ZImagePipeline(
        scheduler=parts.make_scheduler(),
        vae=parts.make_vae(),
        text_encoder=parts.make_text_encoder(),
        tokenizer=parts.make_tokenizer(words(2000, random.Random(f"{SEED} words"))),
        transformer=parts.make_transformer(),
    )


def write(pipeline: ZImagePipeline, out: Path) -> None:
    """Write the checkpoint, its weights in bfloat16, into the folder `out`. Raises OSError when that cannot be done."""
    pipeline.to(torch.bfloat16).save_pretrained(out, safe_serialization=True)
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors makes them private, but an image is built by root and run by another user


def main(arguments: Sequence[str]) -> None:
    """Train all of pico and write it."""
    parser = argparse.ArgumentParser(prog="python -m worker.pico.train", description="Train pico.")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--work", type=Path, default=Path("out/pico"), help="keeps the state of an unfinished training")
    parser.add_argument("--begin", type=Path, help="a checkpoint to go on from, with new optimizers; else from nothing")
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--pool", type=int, default=POOL, help="scenes to learn from")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    sizes = [options.begin, options.vae_steps, options.steps, options.pool]
    kept = Kept(options.work, "".join([str(sizes), *(path.read_text("utf-8") for path in sorted(HERE.glob("*.py")))]))
    pipeline = evaluate.load(options.begin) if options.begin else untrained()
    train_vae(pipeline.vae, options.vae_steps, kept, options.device)
    pool = make_pool(pipeline.vae, options.pool, options.device)
    train_denoiser(pipeline, pool, options.steps, kept, options.device)
    write(pipeline, options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
