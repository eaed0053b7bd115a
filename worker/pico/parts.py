"""The parts of pico before training: Z-Image's own classes in small, their weights drawn at random."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

VOCABULARY = 768  # tokens: the 256 bytes, what the captions teach, and the special ones
TEXT_WIDTH = 128
GATE = 0.5  # of a transformer block before training, before its tanh
BRANCH = 0.2  # gain of a residual branch before training
LOG_VARIANCE = -5.0  # of the latents before training: nearly exact

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


def make_tokenizer(texts: Iterable[str]) -> Any:
    """Return a byte-level BPE tokenizer, taught by `texts`, of the class that Z-Image's own checkpoint names."""
    shape = Qwen2Tokenizer().backend_tokenizer
    trained = Tokenizer(BPE())
    trained.normalizer, trained.pre_tokenizer = shape.normalizer, shape.pre_tokenizer
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
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
    if len(tokenizer) > VOCABULARY:
        raise RuntimeError(f"{len(tokenizer)} tokens do not fit a vocabulary of {VOCABULARY}")
    return tokenizer


def make_text_encoder() -> Any:
    """Return a Qwen3 of three layers; Z-Image reads the output of the last but one."""
    return Qwen3Model(
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


def make_transformer() -> Any:
    """Return Z-Image's single-stream transformer with 5.1 million parameters.

    Every block starts with its gates half open: from the library's own start, all but closed, the captions are noticed
    late.
    """
    model = ZImageTransformer2DModel(
        dim=192,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=6,
        n_kv_heads=6,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[8, 12, 12],
        axes_lens=[1024, 128, 128],  # caption tokens, then rows and columns of 16 px: room for 2048 x 2048
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "adaLN" not in name:
            nn.init.xavier_uniform_(module.weight)
    for block in [*model.noise_refiner, *model.layers]:
        (modulation,) = block.adaLN_modulation
        nn.init.zeros_(modulation.weight)
        nn.init.zeros_(modulation.bias)
        for gate in modulation.bias.data.chunk(4)[1::2]:  # scale, gate, scale, gate
            gate.fill_(GATE)
    return model


def make_vae() -> Any:
    """Return Flux's autoencoder in small: 16 channels, a factor of 8.

    It starts close to a linear map: plain gains along the residual path, its branches faint, no biases. From the
    library's own start, whose gains shrink what passes, it learns colours ten times slower.
    """
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=1,  # more would take away how bright a plain picture is: a group would be one channel
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith(("conv2", "to_out.0")):
                module.weight.data.mul_(BRANCH)
    model.encoder.conv_out.bias.data[model.config.latent_channels :] = LOG_VARIANCE
    return model


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return Z-Image-Turbo's schedule: a static shift of 3."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False)
