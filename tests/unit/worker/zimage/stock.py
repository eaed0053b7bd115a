"""The stock calls that the batched pipeline is compared with, over weights that they load themselves."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    ZImageControlNetModel,
    ZImageControlNetPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImageOmniPipeline,
    ZImagePipeline,
)
from PIL import Image
from torch import Tensor

from common.models import ModelSpec
from tests.miniatures import PICO
from tests.unit.worker.zimage.driving import Floats
from worker import pico
from worker.pipelines.base import ImageRequest
from worker.pipelines.zimage import Pipeline
from worker.zimage.decoding import decode


class Stock:
    """The stock pipelines of pico, with a ControlNet where the model has one."""

    def __init__(self, spec: ModelSpec = PICO) -> None:
        self.text = ZImagePipeline.from_pretrained(pico.FOLDER, local_files_only=True, dtype=torch.float32)
        parts = self.text.components
        self.image = ZImageImg2ImgPipeline(**parts)
        self.inpaint = ZImageInpaintPipeline(**parts)
        self.all = [self.text, self.image, self.inpaint]
        if spec.controlnet:
            controlnet = ZImageControlNetModel.from_pretrained(spec.controlnet)
            self.control = ZImageControlNetPipeline(**parts, controlnet=controlnet)
            self.all.append(self.control)
        for made in self.all:
            made.set_progress_bar_config(disable=True)

    def schedule_by(self, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        for made in self.all:
            made.scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)

    def picture(self, request: ImageRequest) -> Floats:
        """Make the picture by the stock call of its mode."""
        call, own = self.text, {}
        if request.init_image is not None:
            call, own = self.image, {"image": Image.fromarray(request.init_image), "strength": request.strength}
        if request.mask_image is not None:
            call, own = self.inpaint, own | {"mask_image": Image.fromarray(request.mask_image)}
        if request.control_image is not None:
            assert request.init_image is None, "there is no stock call for both"
            picture = Image.fromarray(request.control_image)
            call, own = (
                self.control,
                {
                    "control_image": picture,
                    "controlnet_conditioning_scale": request.control_scale,
                },
            )
        made: Floats = call(**arguments(request), **own, output_type="np").images[0]
        return made


class OmniStock:
    """The stock pipeline of an Omni checkpoint.

    It casts a picture to bfloat16 for its VAE, so there both sides encode by a VAE in bfloat16 (`share_vae`). What is
    compared are float32 latents, decoded by one VAE in float32.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.omni = ZImageOmniPipeline.from_pretrained(spec.source, local_files_only=True, dtype=torch.float32)
        self.omni.set_progress_bar_config(disable=True)
        self.decoder = copy.deepcopy(self.omni.vae)
        self.omni.vae.to(torch.bfloat16)

    def share_vae(self, pipeline: Pipeline) -> None:
        pipeline._parts.vae = self.omni.vae

    def decode(self, latents: Tensor) -> Floats:
        """Decode latents (channels, 1, height / 8, width / 8)."""
        with torch.inference_mode():
            made: Floats = decode(self.decoder, latents).numpy()
        return made

    def picture(self, request: ImageRequest) -> Floats:
        pictures = [Image.fromarray(reference) for reference in request.reference_images]
        made = self.omni(**arguments(request), image=pictures or None, output_type="latent").images[0]
        return self.decode(made.unsqueeze(1))


def arguments(request: ImageRequest) -> dict[str, Any]:
    """Return what every stock call is told."""
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "cfg_normalization": request.cfg_normalization,
        "cfg_truncation": request.cfg_truncation,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        "max_sequence_length": PICO.max_tokens,
    }
