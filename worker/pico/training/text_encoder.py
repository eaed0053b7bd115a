"""Train the text encoder to read, before there is anything to paint."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import ZImagePipeline
from torch import Tensor, nn

from worker.pico import captions
from worker.pico.scenes import LANGUAGES
from worker.pico.training.hints import Heads
from worker.pico.training.progress import Kept, Progress
from worker.pico.training.steps import SEED, cosine, descend, learnable

STEPS = 2400
RATE = 3e-3
CAPTIONS = 64  # in a batch of the text encoder's own training


def words(count: int, rng: random.Random) -> Iterator[str]:
    """Yield what the tokenizer learns from: English captions, Chinese words, and the chat's own."""
    for _ in range(count):
        yield captions.caption(learnable(rng), "en", rng)
        yield "user\n"
        yield "assistant\n"
    for _ in range(count // 10):
        yield from captions.lexicon()


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


def train(pipeline: ZImagePipeline, heads: Heads, steps: int, kept: Kept, device: str) -> None:
    """Train the text encoder to read: the last tokens of a prompt have to tell its scene."""
    text_encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    both = nn.ModuleDict({"text_encoder": text_encoder, "caption": heads.caption}).to(device).train()
    optimizer = torch.optim.AdamW(both.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    log = Progress("reading", steps)
    for step in kept.steps("reading", steps, {"both": both, "optimizer": optimizer}):
        rng = random.Random(f"{SEED} reading {step}")
        for group in optimizer.param_groups:
            group["lr"] = RATE * cosine(step, steps, 100)
        read = [learnable(rng) for _ in range(CAPTIONS)]
        texts = [captions.caption(scene, rng.choice(LANGUAGES), rng) for scene in read]
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = heads.misread(embed(text_encoder, tokenizer, texts, device), read)
        descend(loss, optimizer)
        log(step + 1, loss=loss.item())
