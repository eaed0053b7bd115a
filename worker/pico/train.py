"""Train pico: `python -m worker.pico.train OUT` writes the folder that `from_pretrained` reads.

First the tokenizer, then the VAE, then the text encoder alone, then it and the transformer together. Progress is kept
in --work, from where an interrupted training goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import torch
from diffusers import ZImagePipeline

from worker.pico import evaluate, parts
from worker.pico.training import denoiser, text_encoder, vae
from worker.pico.training.hints import Heads
from worker.pico.training.progress import Kept
from worker.pico.training.steps import SEED

HERE = Path(__file__).parent
ORIGIN = {"_name_or_path", "is_local", "local_files_only"}  # what the libraries note in a config they loaded


def untrained() -> ZImagePipeline:
    """Return the pipeline before training; only its tokenizer has learnt already."""
    torch.manual_seed(SEED)
    return ZImagePipeline(
        scheduler=parts.make_scheduler(),
        vae=parts.make_vae(),
        text_encoder=parts.make_text_encoder(),
        tokenizer=parts.make_tokenizer(text_encoder.words(2000, random.Random(f"{SEED} words"))),
        transformer=parts.make_transformer(),
    )


def write(pipeline: ZImagePipeline, out: Path) -> None:
    """Write the checkpoint, its weights in bfloat16, into the folder `out`. Raises OSError when that cannot be done."""
    pipeline.to(torch.bfloat16).save_pretrained(out, safe_serialization=True)
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors makes them private, but an image is built by root and run by another user
    for path in out.rglob("*.json"):
        forget_origin(path)


def forget_origin(path: Path) -> None:
    """Take out of a config where its part was loaded from, which is nobody's business elsewhere."""
    config = json.loads(path.read_text("utf-8"))
    if ORIGIN & config.keys():
        kept = {name: value for name, value in config.items() if name not in ORIGIN}
        path.write_text(json.dumps(kept, indent=2) + "\n", "utf-8")


def at_least(least: int) -> Callable[[str], int]:
    """Return argparse's type of a whole number from `least` on."""

    def whole_number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return int(text)

    return whole_number


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m worker.pico.train",
        description="Train pico.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    steps = at_least(0)
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--work", type=Path, default=Path("out/pico"), help="keeps the state of an unfinished training")
    parser.add_argument("--begin", type=Path, help="a checkpoint to go on from, with new optimizers; else from nothing")
    parser.add_argument("--vae-steps", type=steps, default=vae.STEPS, help="of the VAE")
    parser.add_argument("--reading-steps", type=steps, default=text_encoder.STEPS, help="of the text encoder alone")
    parser.add_argument("--steps", type=steps, default=denoiser.STEPS, help="of transformer and text encoder together")
    parser.add_argument("--pool", type=at_least(2), default=denoiser.POOL, help="scenes to learn from")
    parser.add_argument("--eager", action="store_true", help="compile nothing: slower, but needs no C++ compiler")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=sorted({"cpu", device}), default=device)
    return parser


def main(arguments: Sequence[str]) -> None:
    """Train all of pico and write it. What is wrong with the arguments is told before anything is trained."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.begin and not evaluate.is_checkpoint(options.begin):
        parser.error(f"--begin: {options.begin} is no checkpoint: it has no model_index.json")
    course = [options.begin, options.vae_steps, options.reading_steps, options.steps, options.pool]
    recipe = "".join([str(course), *(path.read_text("utf-8") for path in sorted(HERE.rglob("*.py")))])
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        kept = Kept(options.work, recipe)
    except OSError as error:
        parser.error(f"{error.filename} cannot be a folder to write: {error.strerror}")
    pipeline = evaluate.load(options.begin) if options.begin else untrained()
    vae.train(pipeline.vae, options.vae_steps, kept, options.device)
    torch.manual_seed(SEED)  # whatever came before, and whether it was taken up again
    heads = Heads(pipeline.transformer.config.dim)
    text_encoder.train(pipeline, heads, options.reading_steps, kept, options.device)
    pools = denoiser.Pools(
        square=denoiser.make_pool(pipeline.vae, options.pool // 2, options.device, mixed=False),
        mixed=denoiser.make_pool(pipeline.vae, options.pool // 2, options.device, mixed=True),
    )
    denoiser.train(pipeline, heads, pools, options.steps, kept, options.device, eager=options.eager)
    write(pipeline, options.out)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo("\nInterrupted. The same command goes on from what was last kept.", err=True)
        sys.exit(130)
