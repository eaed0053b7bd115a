"""Z-Image's networks in their real shape and with random weights, made on the device: nothing is downloaded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import nn
from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

from worker import pico
from worker.zimage.parts import Parts
from worker.zimage.skeletons import empty_text_encoder

NETWORKS = ("transformer", "text_encoder", "vae")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the three networks' classes are told."""

    transformer: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    vae: Mapping[str, Any]


FULL = Shape(
    transformer={
        "dim": 3840,
        "n_layers": 30,
        "n_refiner_layers": 2,
        "n_heads": 30,
        "n_kv_heads": 30,
        "cap_feat_dim": 2560,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1024, 512, 512],
    },
    text_encoder={  # Qwen3-4B
        "vocab_size": 151_936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "tie_word_embeddings": True,
    },
    vae={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},  # Flux's
)

TINY = Shape(
    transformer=dict(FULL.transformer)
    | {"dim": 96, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": 64}
    | {"axes_dims": [8, 12, 12]},
    text_encoder=dict(FULL.text_encoder)
    | {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    vae={"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
)


@dataclass(frozen=True, kw_only=True)
class Models:
    """A whole model, as a checkpoint holds it."""

    scheduler: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    transformer: Any

    def parts(self) -> Parts:
        """Return the model as our pipeline would have loaded it, on the same weights."""
        return Parts(
            scheduler=self.scheduler,
            vae=self.vae,
            text_encoder=shortened(self.text_encoder),
            tokenizer=self.tokenizer,
            transformer=self.transformer,
            loaded_from="random weights",
        )

    def stock(self) -> Any:
        """Return the stock pipeline around the same networks.

        Its VAE decodes a batch picture by picture, as ours does: eight of 1024 x 1024 at once are 2^31 values in one
        layer, more than some kernels count.
        """
        stock: Any = ZImagePipeline(
            scheduler=self.scheduler,
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            transformer=self.transformer,
        )
        stock.vae.enable_slicing()
        stock.set_progress_bar_config(disable=True)
        return stock

    def parameters(self) -> dict[str, int]:
        """Return how many parameters each network has."""
        return {name: count(getattr(self, name)) for name in NETWORKS}

    def weight_bytes(self) -> int:
        """Return how many bytes the networks' parameters take."""
        networks = (getattr(self, name) for name in NETWORKS)
        return sum(weight.nbytes for network in networks for weight in network.parameters())


def skeletons(shape: Shape) -> dict[str, Any]:
    """Return the networks on the meta device: shapes, and no memory."""
    with torch.device("meta"):
        return {
            "transformer": ZImageTransformer2DModel(**shape.transformer),
            "text_encoder": Qwen3Model(Qwen3Config(**shape.text_encoder)),
            "vae": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                latent_channels=16,
                norm_num_groups=32,
                use_quant_conv=False,
                use_post_quant_conv=False,
                scaling_factor=0.3611,
                shift_factor=0.1159,
                **shape.vae,
            ),
        }


def make(shape: Shape, *, device: str, dtype: torch.dtype, seed: int, say: Callable[[str], None]) -> Models:
    """Return the models with seeded random weights on the device; the tokenizer is pico's."""
    networks = skeletons(shape)
    for place, (name, network) in enumerate(networks.items()):
        size = torch.finfo(dtype).bits / 8 * count(network) / 1e9
        say(f"drawing the weights of the {name}: {count(network) / 1e6:.1f} million, {size:.2f} GB")
        fill(network, device=device, dtype=dtype, seed=seed + place)
    return Models(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False),
        tokenizer=AutoTokenizer.from_pretrained(pico.FOLDER / "tokenizer", local_files_only=True),
        **networks,
    )


def fill(network: nn.Module, *, device: str, dtype: torch.dtype, seed: int) -> None:
    """Bring a network from the meta device to this one, with weights that keep activations near their size.

    Matrices and kernels are normal with a variance of 1 / inputs, norms pass what they get, biases add nothing. The
    same seed draws the same weights on the same kind of device.
    """
    nn.Module.to(network, dtype).to_empty(device=device)  # past a warning that does not concern us: nothing is loaded
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, weight[0].numel() ** -0.5, generator=generator)
            else:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
    _make_buffers(network, device)
    network.eval().requires_grad_(False)


def shortened(encoder: Any) -> Any:
    """Return a text encoder of the same layers that ends with the one before the last, as ours are loaded."""
    with torch.device("meta"):
        own = empty_text_encoder(type(encoder), copy.deepcopy(encoder.config))
    own.embed_tokens, own.layers, own.rotary_emb = encoder.embed_tokens, encoder.layers[:-1], encoder.rotary_emb
    return own.eval()


def count(network: nn.Module) -> int:
    """Return the number of a network's parameters."""
    return sum(weight.numel() for weight in network.parameters())


def _make_buffers(network: nn.Module, device: str) -> None:
    """Compute what no checkpoint holds: the rotary frequencies of the text encoder, in float32 whatever its dtype."""
    if isinstance(network, Qwen3Model):
        network.rotary_emb = type(network.rotary_emb)(network.config).to(device)
    others = [name for name, _ in network.named_buffers() if not name.startswith("rotary_emb.")]
    if others:
        raise RuntimeError(f"{type(network).__name__} has buffers whose values are not known here: {', '.join(others)}")
