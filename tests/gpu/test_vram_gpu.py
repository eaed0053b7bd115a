"""On a GPU: what calls of a model of middling size take is what they are estimated to take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from worker.zimage.calls import Item, decode_bytes, denoise_bytes, encode_bytes, text_bytes
from worker.zimage.inputs import encode
from worker.zimage.memory import CUDA_WORKSPACE, SAFETY
from worker.zimage.shape import shape_of

pytestmark = pytest.mark.gpu

TEXT_DIM = 1024
LOOSEST = 2.0  # a decoder whose convolutions need no copies in another order takes half of what is allowed for them


@pytest.fixture(scope="module")
def parts() -> Iterator[Any]:
    """Half of Z-Image's width, its head width, its text encoder's sort, and Flux's autoencoder; random, in bfloat16."""
    with torch.device("cuda"):
        transformer: Any = ZImageTransformer2DModel(
            dim=1920, n_layers=4, n_refiner_layers=1, n_heads=15, n_kv_heads=15, cap_feat_dim=TEXT_DIM
        )
        vae: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        text_encoder: Any = Qwen3Model(
            Qwen3Config(
                vocab_size=1024,
                hidden_size=TEXT_DIM,
                intermediate_size=3072,
                num_hidden_layers=8,
                num_attention_heads=16,
                num_key_value_heads=8,
                head_dim=128,
            )
        )
    models = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder}
    yield SimpleNamespace(**{name: model.to(torch.bfloat16).eval() for name, model in models.items()})
    torch.cuda.empty_cache()


def taken(call: Callable[[], Any]) -> int:
    """Return the peak of a call, its inputs apart; the second time, as the first brings in what libraries keep."""
    with torch.inference_mode():
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize(
    "sizes",
    [
        [(1024, 1024, 40)],
        [(512, 512, 40)] * 4,
        [(1024, 1024, 200), (768, 512, 20), (1536, 1024, 60)],
        [(2048, 2048, 100)] * 2,
    ],
    ids=["one", "equal", "mixed", "large"],
)
def test_a_forward(parts: Any, sizes: list[tuple[int, int, int]]) -> None:
    latents = [draw(16, 1, height // 8, width // 8) for width, height, _ in sizes]
    captions = [draw(tokens, TEXT_DIM) for *_, tokens in sizes]
    times = torch.rand(len(sizes), device="cuda")
    peak = taken(lambda: parts.transformer(latents, times, captions, return_dict=False))
    items = [Item(picture=width // 16 * (height // 16), caption=(tokens,)) for width, height, tokens in sizes]
    estimate = denoise_bytes(shape_of(parts).transformer, items)
    assert peak <= estimate * SAFETY + CUDA_WORKSPACE
    assert estimate <= 1.3 * peak


@pytest.mark.parametrize(("width", "height"), [(512, 512), (1024, 1024), (768, 1280)])
def test_decoding_and_encoding(parts: Any, width: int, height: int) -> None:
    shape = shape_of(parts).autoencoder
    latents, picture = draw(1, 16, height // 8, width // 8), draw(1, 3, height, width)
    decoding = taken(lambda: parts.vae.decode(latents, return_dict=False))
    encoding = taken(lambda: parts.vae.encode(picture, return_dict=False)[0].mode())
    for peak, estimate in (
        (decoding, decode_bytes(shape, width, height)),
        (encoding, encode_bytes(shape, width, height)),
    ):
        assert peak <= estimate * SAFETY + CUDA_WORKSPACE
        assert estimate <= LOOSEST * peak


@pytest.mark.parametrize(("width", "height"), [(1040, 1040), (2048, 2048)])
def test_encoding_in_tiles(parts: Any, width: int, height: int) -> None:
    shape, tile = shape_of(parts).autoencoder, 1024 * 1024
    parts.vae.register_to_config(shift_factor=0.1)
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    peak = taken(lambda: encode(parts.vae, picture, "cuda", tile_above=tile))
    estimate = encode_bytes(shape, width, height, tile=tile)
    assert peak <= estimate * SAFETY + CUDA_WORKSPACE
    assert estimate < encode_bytes(shape, 2048, 2048) / 3


def test_encoding_a_text(parts: Any) -> None:
    ids = torch.randint(0, 1024, (1, 512), device="cuda")
    peak = taken(lambda: parts.text_encoder(ids, output_hidden_states=True, use_cache=False))
    assert peak <= text_bytes(shape_of(parts).text_encoder, 512) * SAFETY + CUDA_WORKSPACE
