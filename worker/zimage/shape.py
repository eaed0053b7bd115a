"""What a checkpoint's configs say that its memory depends on, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from worker.zimage.offload import streamed_bytes

PATCH = 2  # latent pixels along a token's side
TOKEN_MULTIPLE = 32  # SEQ_MULTI_OF: the transformer pads pictures and each piece of a caption to a multiple of this


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlNet:
    """ZImageControlNetModel."""

    channels: int  # of what it reads: the control picture's latents, and a mask and more in some
    layers: int  # blocks; each adds to one layer of the transformer
    refiners: int = 0  # blocks that run over the noise refiner's input and keep what each has made
    refined: int = 0  # layers of the noise refiner that they add to


@dataclass(frozen=True, kw_only=True, slots=True)
class Transformer:
    """ZImageTransformer2DModel."""

    dim: int
    heads: int
    channels: int  # of the latents
    caption_dim: int
    dtype_bytes: int
    features_dim: int = 0  # of SigLIP, for a checkpoint that reads pictures
    features_tokens: int = 0  # of one picture at most
    streamed: int = 0  # bytes of its weights, or the ControlNet's, that come for a call where they wait elsewhere
    controlnet: ControlNet | None = None

    @property
    def feed_forward(self) -> int:
        """The inner width of a block's SwiGLU, as ZImageTransformerBlock fixes it."""
        return int(self.dim / 3 * 8)

    @property
    def head_dim(self) -> int:
        """The width of an attention head."""
        return self.dim // self.heads


@dataclass(frozen=True, kw_only=True, slots=True)
class Autoencoder:
    """AutoencoderKL."""

    blocks: tuple[int, ...]  # channels (block_out_channels), from the picture's size down to the latents'
    layers: int  # resnets in a block of the encoder; the decoder's blocks have one more
    channels: int  # of the latents
    dtype_bytes: int

    @property
    def factor(self) -> int:
        """Pixels along the side of one latent pixel."""
        return 1 << (len(self.blocks) - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoder:
    """Qwen3Model."""

    layers: int
    dim: int
    feed_forward: int
    heads: int  # of the queries
    head_dim: int
    dtype_bytes: int
    streamed: int = 0  # bytes of its weights that come for a call, where they wait elsewhere


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A checkpoint's models."""

    transformer: Transformer
    autoencoder: Autoencoder
    text_encoder: TextEncoder


def shape_of(parts: Any) -> Shape:
    """Read the shape of loaded models: transformer, vae, text_encoder; controlnet and siglip_processor if any."""
    return Shape(
        transformer=_transformer(
            parts.transformer, getattr(parts, "controlnet", None), getattr(parts, "siglip_processor", None)
        ),
        autoencoder=_autoencoder(parts.vae),
        text_encoder=_text_encoder(parts.text_encoder),
    )


def _transformer(model: Any, controlnet: Any, processor: Any) -> Transformer:
    config = model.config
    return Transformer(
        dim=config.dim,
        heads=config.n_heads,
        channels=config.in_channels,
        caption_dim=config.cap_feat_dim,
        dtype_bytes=model.dtype.itemsize,
        features_dim=config.siglip_feat_dim or 0,
        features_tokens=0 if processor is None else processor.max_num_patches,
        streamed=max(streamed_bytes(network) for network in (model, controlnet) if network is not None),
        controlnet=None if controlnet is None else _controlnet(controlnet.config),
    )


def _controlnet(config: Any) -> ControlNet:
    layers = len(config.control_layers_places)
    refiners = {"control_layers": layers, "control_noise_refiner": config.n_refiner_layers}
    return ControlNet(
        channels=config.control_in_dim,
        layers=layers,
        refiners=refiners.get(config.add_control_noise_refiner, 0),
        refined=len(config.control_refiner_layers_places or ()) if config.add_control_noise_refiner else 0,
    )


def _autoencoder(model: Any) -> Autoencoder:
    config = model.config
    return Autoencoder(
        blocks=tuple(config.block_out_channels),
        layers=config.layers_per_block,
        channels=config.latent_channels,
        dtype_bytes=model.dtype.itemsize,
    )


def _text_encoder(model: Any) -> TextEncoder:
    config = model.config
    return TextEncoder(
        layers=config.num_hidden_layers,
        dim=config.hidden_size,
        feed_forward=config.intermediate_size,
        heads=config.num_attention_heads,
        head_dim=config.head_dim,
        dtype_bytes=model.dtype.itemsize,
        streamed=streamed_bytes(model),
    )
