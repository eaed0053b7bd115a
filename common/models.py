"""The model catalogue: what an alias stands for, its defaults and its limits. No torch here."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import ConfigurationError, UnknownModel

SIZE_MULTIPLE = 16  # pixels: the VAE's factor 8 times the transformer's patch of 2

Option = str | int | float | bool
Mode = Literal["text", "image", "inpaint", "control", "edit"]  # what a picture may be made from, beside a prompt


class ModelSpec(BaseModel):
    """One model that the fleet can serve."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$", description="the alias clients use")
    source: str = Field(description="a folder, a hub id, or `builtin` for a model that ships with zfleet")
    revision: str | None = Field(default=None, description="the commit of a hub id, 40 hex digits: no other is fetched")
    pipeline: str = Field(default="zimage", description="a module of worker/pipelines")
    dtype: str = Field(default="bfloat16", description="weights on a GPU; a CPU always computes in float32")

    modes: tuple[Mode, ...] = Field(
        default=("text",), description="what it can make a picture from, beside text: image, inpaint, control, edit"
    )
    controlnet: str | None = Field(default=None, description="a folder or hub id of its ControlNet; for mode control")
    controlnet_revision: str | None = Field(default=None, description="likewise")

    width: int = 1024
    height: int = 1024
    steps: int = 8
    guidance_scale: float = 0.0
    cfg_normalization: float = Field(default=0.0, ge=0, description="0: none; else how much longer guidance may make v")
    cfg_truncation: float = Field(default=1.0, ge=0, le=1, description="no guidance where 1 - sigma is above this")

    min_side: int = Field(default=256, description="pixels")
    max_side: int = Field(default=2048, description="pixels")
    max_pixels: int = Field(default=2048 * 2048, description="width x height")
    max_steps: int = 50
    max_n: int = 8
    max_tokens: int = Field(default=512, description="longer prompts are cut here, with a warning")
    max_batch: int = Field(default=4, ge=1, description="runs that advance together on one GPU")
    run_limit_s: float | None = Field(
        default=None, gt=0, description="seconds one picture may be in the making; more, and its task fails"
    )
    memory_mb: int = Field(default=0, ge=0, description="MiB of GPU memory that it takes whole")
    least_mb: int | None = Field(
        default=None,
        ge=0,
        description="MiB that do with parts of it outside; a smaller GPU is refused; None: memory_mb",
    )
    options: Mapping[str, Option] = Field(default_factory=dict, description="read by the pipeline alone")

    @property
    def takes_loras(self) -> bool:
        """Whether a task may name LoRAs: of the pipelines here `zimage` alone can do something with them."""
        return self.pipeline == "zimage"


# Weights in bfloat16 (19,600), one picture at 1024 x 1024 (2,750: decoding it) and CUDA's context (512), all estimated.
Z_IMAGE_MB = 22_900
Z_IMAGE_LEAST_MB = 11_000  # a GPU of 12 GB, where encoders and layers wait in the machine's memory

BUILT_IN: tuple[ModelSpec, ...] = (
    ModelSpec(
        name="turbo",
        source="Tongyi-MAI/Z-Image-Turbo",
        revision="f332072aa78be7aecdf3ee76d5c247082da564a6",
        modes=("text", "image", "inpaint"),
        run_limit_s=8.0,
        memory_mb=Z_IMAGE_MB,
        least_mb=Z_IMAGE_LEAST_MB,
    ),
    ModelSpec(
        name="base",
        source="Tongyi-MAI/Z-Image",
        revision="04cc4abb7c5069926f75c9bfde9ef43d49423021",
        modes=("text", "image", "inpaint"),
        steps=50,
        guidance_scale=4.0,
        max_steps=100,
        run_limit_s=120.0,
        memory_mb=Z_IMAGE_MB,
        least_mb=Z_IMAGE_LEAST_MB,
    ),
    ModelSpec(
        name="pico",
        source="builtin",
        dtype="float32",
        modes=("text", "image", "inpaint"),
        width=128,
        height=128,
        min_side=64,
        max_side=256,
        max_pixels=256 * 256,
        max_tokens=128,
        max_batch=8,
    ),
    ModelSpec(
        name="pico-stock",  # the same by the pipeline that serves other checkpoints
        source="builtin",
        pipeline="stock",
        dtype="float32",
        width=128,
        height=128,
        min_side=64,
        max_side=256,
        max_pixels=256 * 256,
        max_tokens=128,
        max_batch=1,
    ),
    ModelSpec(
        name="simulated",
        source="builtin",
        pipeline="simulated",
        modes=("text", "image", "inpaint", "control", "edit"),
        width=64,
        height=64,
        min_side=16,
        max_batch=1,
        options={"image_ms": 320.0, "load_ms": 0.0},
    ),
)


class Catalogue(Mapping[str, ModelSpec]):
    """The models of this fleet by alias, in order; the first is the default."""

    def __init__(self, specs: Iterable[ModelSpec]) -> None:
        self._specs = MappingProxyType({spec.name: spec for spec in specs})

    def __getitem__(self, name: str) -> ModelSpec:
        try:
            return self._specs[name]
        except KeyError:
            known = ", ".join(self._specs) or "none"
            raise UnknownModel.field("model", f"{name!r} is not served here; choose one of: {known}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    @property
    def default(self) -> ModelSpec:
        """The model of a request that names none."""
        return next(iter(self._specs.values()))

    def select(self, names: Iterable[str]) -> Catalogue:
        """Return the catalogue cut down to these names, in their order; raises ConfigurationError for others."""
        chosen = []
        for name in names:
            if name not in self._specs:
                raise ConfigurationError(f"model {name!r} is not in the catalogue; there are: {', '.join(self._specs)}")
            chosen.append(self._specs[name])
        if not chosen:
            raise ConfigurationError("no model is named; set ZFLEET_MODELS, for example to turbo")
        return Catalogue(chosen)


def load_catalogue(
    models_file: Path | None = None, overrides: Mapping[str, Mapping[str, Option]] | None = None
) -> Catalogue:
    """Return the built-in models plus those of the user's TOML file (a table per alias; a known alias is amended).

    `overrides` adds options by alias, last. Raises ConfigurationError naming the file, the table and the key.
    """
    specs = {spec.name: spec for spec in BUILT_IN}
    for name, table in _read(models_file).items():
        if not isinstance(table, dict):
            raise ConfigurationError(f"{models_file}: {name} must be a table, as in [{name}]")
        known = specs[name].model_dump() if name in specs else {}
        try:
            specs[name] = ModelSpec.model_validate(known | table | {"name": name})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ConfigurationError(f"{models_file}: [{name}] {where}: {first['msg']}") from None
    for name, options in (overrides or {}).items():
        specs[name] = specs[name].model_copy(update={"options": {**specs[name].options, **options}})
    return Catalogue(specs.values())


def _read(models_file: Path | None) -> dict[str, object]:
    if models_file is None:
        return {}
    try:
        return tomllib.loads(models_file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{models_file}: {error}") from None
