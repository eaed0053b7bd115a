"""Write the pico checkpoint: `python -m worker.pico.build OUT`. Same code, same machine, same bytes.

The weights are random, yet drawn with some care: the transformer pulls the latents away from the noise and towards what
it attends to in the caption, and the decoder blurs. So each prompt and each seed gives its own soft coloured picture.
"""

from __future__ import annotations

import json
import math
import random
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

SEED = 3
VOCABULARY = 512  # tokens: the 256 bytes, what the captions below teach, and the special ones
TEXT_WIDTH = 128
DIM = 192
PATCH = 64  # values in a patch of 2 x 2 latents of 16 channels

DENOISE = 1.5  # how hard a step pulls the latents towards zero; near 2 a one-step run would overshoot
SHARPNESS = 1.5  # weight of the query norm: lower and all captions look alike, at 4 rounding errors grow to 1e-2
GATE = 0.3  # spread of the modulation biases, so that every block has its say
BLUR = 0.95  # share of a decoder kernel that is a smooth bump; the rest is white noise
CONTRAST = 0.45  # of the decoder's last layer: most pixels stay inside the range

END_OF_TEXT, TURN_START, TURN_END = SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# What Qwen3 makes of plain messages: a turn each, then the opened answer; an empty thought when thinking is off.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)

COLOURS = (
    ("red", "红色"), ("green", "绿色"), ("blue", "蓝色"), ("yellow", "黄色"), ("orange", "橙色"), ("purple", "紫色"),
    ("pink", "粉色"), ("brown", "棕色"), ("black", "黑色"), ("white", "白色"), ("grey", "灰色"), ("golden", "金色"),
)  # fmt: skip
THINGS = (
    ("circle", "圆形"), ("square", "正方形"), ("triangle", "三角形"), ("star", "星星"), ("house", "房子"),
    ("tree", "树"), ("cat", "猫"), ("dog", "狗"), ("boat", "小船"), ("mountain", "山"), ("flower", "花"),
    ("moon", "月亮"),
)  # fmt: skip
PLACES = (
    ("left of", "左边"), ("right of", "右边"), ("above", "上面"), ("below", "下面"),
    ("behind", "后面"), ("near", "旁边"),
)  # fmt: skip
STYLES = (("a photo of ", "照片："), ("a painting of ", "油画："), ("a drawing of ", "素描："), ("", ""))


def captions(count: int) -> Iterator[str]:
    """Yield scene captions, English and Chinese by turns, always the same ones."""
    draw = random.Random(SEED)
    for _ in range(count):
        (style, style_zh), (place, place_zh) = draw.choice(STYLES), draw.choice(PLACES)
        (one, one_zh), (two, two_zh), (back, back_zh) = (draw.choice(COLOURS) for _ in range(3))
        (this, this_zh), (that, that_zh) = draw.choice(THINGS), draw.choice(THINGS)
        yield f"{style}a {one} {this} {place} a {two} {that} on a {back} background"
        yield f"{style_zh}{two_zh}{that_zh}{place_zh}有{one_zh}{this_zh}，{back_zh}背景"


def make_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer of the class that Z-Image's own checkpoint names."""
    shape = Qwen2Tokenizer().backend_tokenizer
    trained = Tokenizer(BPE())
    trained.normalizer, trained.pre_tokenizer = shape.normalizer, shape.pre_tokenizer
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(captions(2000), trainer)
    model = json.loads(trained.to_str())["model"]
    merges: Any = [tuple(pair) for pair in model["merges"]]  # annotated as strings, which only older files hold
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=merges,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        padding_side="right",
        model_max_length=32_768,
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if len(tokenizer) != VOCABULARY:
        raise RuntimeError(f"the captions taught {len(tokenizer)} tokens, not {VOCABULARY}")
    return tokenizer


def make_text_encoder() -> Any:
    """Return a Qwen3 of three layers; Z-Image reads the output of the last but one."""
    model = Qwen3Model(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=TEXT_WIDTH // 4,
            max_position_embeddings=32_768,
        )
    )
    _fill(model)
    return model


def make_transformer() -> Any:
    """Return a Z-Image transformer that damps the noise and adds what the caption says.

    Its last layer holds minus the patch embedding's inverse: at every step the latents move against themselves, which
    is what a trained model does to noise.
    """
    model = ZImageTransformer2DModel(
        dim=DIM,
        n_layers=5,
        n_refiner_layers=1,
        n_heads=6,
        n_kv_heads=6,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[8, 12, 12],
        axes_lens=[1024, 128, 128],  # caption tokens, then rows and columns of 16 px: room for 2048 x 2048
    )
    _fill(model)
    embed = _orthonormal()
    with torch.no_grad():
        model.all_x_embedder["2-1"].weight.copy_(embed)
        model.all_final_layer["2-1"].linear.weight.sub_(DENOISE * embed.T)
    return model


def make_vae() -> Any:
    """Return Flux's autoencoder in small: 16 channels, a factor of 8, the same scale and shift."""
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    _fill(model)
    with torch.no_grad():
        model.decoder.conv_out.weight.mul_(CONTRAST)
    return model


def write(out: Path) -> None:
    """Write the checkpoint into the folder `out` (created; about 25 MB). Raises OSError when that cannot be done."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False)
    with torch.random.fork_rng(devices=[]):  # the constructors draw from the global generator: leave the caller's alone
        pipeline = ZImagePipeline(
            scheduler=scheduler,
            vae=make_vae(),
            text_encoder=make_text_encoder(),
            tokenizer=make_tokenizer(),
            transformer=make_transformer(),
        )
    pipeline.save_pretrained(out, safe_serialization=True)
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors makes them private, but an image is built by root and run by another user


def _fill(module: nn.Module) -> None:
    """Draw every parameter anew from its own name, whatever the library's defaults are (some of them zero)."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(_draw(name, parameter.shape))


def _draw(name: str, shape: torch.Size) -> Tensor:
    """Return a parameter: a norm's weight is constant, everything else noise scaled by what flows into it."""
    noise = _noise(name, shape)
    if len(shape) == 1:
        if name.endswith("bias"):
            return noise * (GATE if "adaLN" in name and "final" not in name else 0.02)
        return torch.full(shape, SHARPNESS if name.endswith("norm_q.weight") else 1.0)
    if "pad_token" in name or "embed_tokens" in name:
        return noise
    if len(shape) == 4 and shape[-1] == 3:
        side = torch.tensor([1.0, 2.0, 1.0]) / math.sqrt(6)
        smooth = _noise(f"{name} smooth", shape[:2]) / math.sqrt(shape[1])
        white = noise / math.sqrt(9 * shape[1])
        return smooth[:, :, None, None] * (BLUR * torch.outer(side, side)) + white * math.sqrt(1 - BLUR * BLUR)
    return noise / math.sqrt(shape[1:].numel())


def _orthonormal() -> Tensor:
    """Return a (DIM, PATCH) matrix of orthonormal columns: Hadamard matrices whose rows have random signs.

    They are exact. A QR would come out differently with another number of threads, and so would every picture.
    """
    hadamard = torch.ones(1, 1)
    while len(hadamard) < PATCH:
        hadamard = torch.kron(hadamard, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    signs = _noise("embed", (DIM, 1)).sign()
    return signs * hadamard.repeat(DIM // PATCH, 1) / math.sqrt(DIM)


def _noise(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return normal noise that depends on the name and the shape alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{SEED} {name}".encode())))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m worker.pico.build OUT")
    write(Path(sys.argv[1]))
