"""All settings, frozen, and the only reader of the environment. Each one is ZFLEET_<NAME>."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from common.errors import ConfigurationError
from common.models import SIZE_MULTIPLE, Catalogue, load_catalogue

PREFIX = "ZFLEET_"
SECRET = "api_key"  # the one setting that is one
SERVICE_MANAGER = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")  # systemd's, for the process that it started alone
_OTEL = (
    "SDK_DISABLED", "TRACES_EXPORTER", "EXPORTER_OTLP_ENDPOINT", "EXPORTER_OTLP_TRACES_ENDPOINT",
    "EXPORTER_OTLP_PROTOCOL", "EXPORTER_OTLP_TRACES_PROTOCOL",
)  # fmt: skip
_SIZE = re.compile(r"([1-9][0-9]{1,4})x([1-9][0-9]{1,4})")
_ALIAS = re.compile(r"[A-Za-z0-9._:-]{1,64}=[^=]+")
_BUCKET = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9][A-Za-z0-9._-]*)*/?")
_ADDRESS = re.compile(r"https?://[^\s/?#]+[^\s?#]*")

Names = Annotated[tuple[str, ...], NoDecode]


class Settings(BaseSettings):
    """One process's settings. Durations say their unit in the name; sizes are in bytes."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="ignore", protected_namespaces=()
    )

    redis_url: str = Field("redis://127.0.0.1:6379/0", description="redis://, rediss://, unix:// or redis+sentinel://")
    redis_timeout_s: float = Field(1.0, gt=0, description="one Redis command may take this long")
    redis_patience_s: float = Field(2.5, gt=0, description="the gateway answers 503 after trying this long")
    redis_replicas: int | None = Field(
        None, ge=0, description="/health misses fewer; unset: 1 through Sentinel, else none is missed"
    )
    redis_lag_s: float = Field(10.0, gt=0, description="/health is degraded while a replica is silent for longer")
    redis_lag_mb: float = Field(16.0, gt=0, description="/health is degraded while a replica is further behind, in MiB")
    url: str = Field("http://127.0.0.1:8080", description="where the CLI and the Python client find the gateway")
    host: str = Field("127.0.0.1", description="the gateway listens here")
    port: int = Field(8080, ge=0, le=65535)
    public_url: str = Field("", description="the gateway's address in links to pictures; unset: as a request names it")
    api_key: SecretStr | None = Field(None, description="what the CLI and the Python client show the gateway")
    insecure: bool = Field(False, description="while no API key was made, serve other machines too")
    data_dir: Path = Field(Path("~/.zfleet"), description="results and the embedded Redis")
    log_dir: Path | None = Field(
        None, description="JSON log files and gpu.csv, rotated; unset: stderr, with `up` data_dir/logs"
    )
    alive_file: Path | None = Field(None, description="written every 5 s while a part runs well; see `zfleet alive`")
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    models: Names = Field(("turbo",), description="aliases served here; the first is the default")
    models_file: Path | None = Field(None, description="a TOML file with more models, a table each")
    dialects: Names = Field(("native", "openai"), description="HTTP dialects the gateway speaks")
    model_aliases: Names = Field(
        (), description="names=models for clients of other services, as gpt-image-2=turbo; for dialects but `native`"
    )
    templates_dir: Path | None = Field(
        None, description="a folder of prompt templates, <name>.toml, beside those that ship with zfleet"
    )
    storage: str = Field("local", description="a module of common/storage")
    s3_url: str = Field("", description="for ZFLEET_STORAGE=s3: the bucket, and a folder in it, as s3://bucket/folder")
    s3_endpoint: str = Field("", description="the S3 server's address, as https://s3.example; unset: AWS's")
    s3_public_endpoint: str = Field("", description="that address as clients reach it, where it is another one")
    s3_region: str = Field("", description="unset: as the AWS tools would find it")
    s3_timeout_s: float = Field(
        10.0, gt=0, description="a call to S3 that stands still fails after this long, its second try included"
    )
    x_accel: str = Field(
        "", description="Nginx's internal location for results, as /_results/; unset: the gateway sends"
    )
    gateway_workers: int = Field(1, ge=1, description="gunicorn processes")
    gateway_connections: int = Field(10_000, ge=1, description="open connections one gunicorn process holds")
    body_limit_bytes: int = Field(100 * 1024 * 1024, ge=1024)
    queue_cap: int = Field(10_000, ge=1, description="tasks one queue holds before submits are refused")
    fleet_cap: int = Field(100_000, ge=1, description="tasks, queued or running, before submits are refused")
    ageing_s: float = Field(60.0, gt=0, description="a task that waited this long behind higher priorities gets a turn")
    webhook_allow: Names = Field((), description="host or host:port that webhooks may reach by http, and inside too")
    retention_days: float = Field(7.0, gt=0, le=3650, description="results are kept this long")
    housekeeping_s: float = Field(1800.0, gt=0, description="results past their retention are removed this often")
    disk_pause_percent: float = Field(90.0, gt=0, le=100, description="no new tasks while the results' disk is as full")
    disk_resume_percent: float = Field(85.0, ge=0, description="new tasks again once it is less full than this")

    input_max_pixels: int = Field(
        16 * 1024 * 1024, ge=256, description="a picture sent by a client may have as many, by its header"
    )
    lora_dir: Path | None = Field(None, description="a folder of LoRAs, <name>.safetensors, that tasks may name")
    prewarm: Names | None = Field(
        None, description="models loaded at start, and kept when idle; unset: the first of ZFLEET_MODELS"
    )
    max_resident: int | None = Field(None, ge=1, description="models that stay in memory; unset: as many as fit")
    idle_unload_s: float = Field(600.0, gt=0, description="a model not used this long leaves memory")
    resident_wait_s: float = Field(
        20.0, ge=0, description="a task may wait this long behind tasks whose model is in memory already"
    )
    warm_sizes: Names = Field((), description="sizes warmed up before a worker is ready, as 1024x1024,512x512")
    tile_above: int = Field(1024 * 1024, ge=64 * 64, description="pixels; larger pictures pass the VAE in tiles")
    embeds_cache_mb: int = Field(256, ge=0, description="memory for encoded prompts")
    offload: Literal["auto", "none", "encoders", "all"] = Field(
        "auto", description="what waits in the machine's memory until it is used; auto: as little as the GPU allows"
    )
    memory_limit_mb: int | None = Field(None, ge=1, description="device memory a worker may use; unset: all of it")

    devices: str = Field("all", description="GPUs by index (0,1), `all`, or `cpu`")
    workers_per_device: int = Field(1, ge=1, description="more than one only makes sense for the simulated model")
    max_batch: int | None = Field(
        None, ge=1, description="runs that advance together; the model's own limit when unset"
    )
    cpu_threads: int | None = Field(None, ge=1, description="torch threads of a worker on the CPU")
    lease_s: float = Field(15.0, gt=0, description="a silent worker loses its tasks after this long")
    beat_s: float = Field(3.0, gt=0, description="leases are renewed this often")
    drain_s: float = Field(30.0, ge=0, description="on SIGTERM runs may finish for this long, then are given back")
    crash_limit: int = Field(3, ge=1, description="a task that took its worker down this often is failed")
    run_limits: bool = Field(True, description="whether a picture past its model's run_limit_s is stopped")
    step_limit_s: float = Field(
        30.0, gt=0, validate_default=True, description="a worker whose step stands still this long is killed"
    )
    load_limit_s: float = Field(1800.0, gt=0, description="a worker that has not loaded its models by then is killed")
    drift_mb: int = Field(200, ge=1, description="a worker whose memory grew by more than this is renewed between runs")
    drift_window_s: float = Field(300.0, gt=0, description="that growth is measured over this long")
    drift_warmup_s: float = Field(300.0, ge=0, description="a worker's memory is not judged before this age")
    gpu_lost: Literal["report", "cpu"] = Field(
        "report", description="when a GPU is lost: `report` it and wait for it, or work on the `cpu` meanwhile"
    )
    simulated_image_ms: float = Field(320.0, gt=0, description="what one picture costs the simulated model")
    simulated_load_ms: float = Field(0.0, ge=0)

    @field_validator("models", "dialects", "model_aliases", "prewarm", "warm_sizes", "webhook_allow", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("warm_sizes")
    @classmethod
    def _are_sizes(cls, sizes: tuple[str, ...]) -> tuple[str, ...]:
        for size in sizes:
            sides = _SIZE.fullmatch(size)
            if not sides or any(int(side) % SIZE_MULTIPLE for side in sides.groups()):
                raise ValueError(f"must be sizes as 1024x1024, multiples of {SIZE_MULTIPLE} pixels")
        return sizes

    @field_validator("model_aliases")
    @classmethod
    def _are_aliases(cls, aliases: tuple[str, ...]) -> tuple[str, ...]:
        if not all(_ALIAS.fullmatch(alias) for alias in aliases):
            raise ValueError("must be name=model, as gpt-image-2=turbo; names of 1 to 64 of A-Z a-z 0-9 . _ : -")
        return aliases

    @field_validator("s3_url")
    @classmethod
    def _is_a_bucket(cls, url: str) -> str:
        if url and not _BUCKET.fullmatch(url):
            raise ValueError("must be a bucket and a folder in it, as s3://bucket/folder")
        return url.rstrip("/")

    @field_validator("public_url", "s3_endpoint", "s3_public_endpoint")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        if url and not _ADDRESS.fullmatch(url):
            raise ValueError("must be an address as https://pictures.example, with no query")
        return url.rstrip("/")

    @field_validator("url")
    @classmethod
    def _can_be_read(cls, url: str) -> str:
        _ = urlsplit(url).port  # raises ValueError with what is wrong
        return url

    @field_validator("beat_s")
    @classmethod
    def _beats_fit_into_a_lease(cls, beat_s: float, info: ValidationInfo) -> float:
        lease_s = info.data.get("lease_s", beat_s * 2)
        if not beat_s * 2 <= lease_s:
            raise ValueError(f"must be at most half of ZFLEET_LEASE_S ({lease_s:g})")
        return beat_s

    @field_validator("step_limit_s")
    @classmethod
    def _calls_to_s3_fit_into_a_step(cls, step_limit_s: float, info: ValidationInfo) -> float:
        s3_timeout_s = info.data.get("s3_timeout_s", 0.0)
        if info.data.get("storage") == "s3" and not s3_timeout_s * 2 <= step_limit_s:
            raise ValueError(f"must be at least twice ZFLEET_S3_TIMEOUT_S ({s3_timeout_s:g})")
        return step_limit_s

    @field_validator("disk_resume_percent")
    @classmethod
    def _resumes_below_the_pause(cls, resume: float, info: ValidationInfo) -> float:
        pause = info.data.get("disk_pause_percent", 100.0)
        if not resume < pause:
            raise ValueError(f"must be below ZFLEET_DISK_PAUSE_PERCENT ({pause:g})")
        return resume

    @field_validator("data_dir", "log_dir", "alive_file", "models_file", "lora_dir", "templates_dir")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return path.expanduser().absolute() if path else None

    @property
    def results_dir(self) -> Path:
        """Where local storage keeps pictures."""
        return self.data_dir / "results"

    @property
    def expected_replicas(self) -> int:
        """How many replicas Redis should have."""
        if self.redis_replicas is not None:
            return self.redis_replicas
        return int("+sentinel://" in self.redis_url)

    def catalogue(self) -> Catalogue:
        """Return the models this process serves; raises ConfigurationError for one nobody defined."""
        simulated = {"image_ms": self.simulated_image_ms, "load_ms": self.simulated_load_ms}
        return load_catalogue(self.models_file, {"simulated": simulated}).select(self.models)

    def aliases(self) -> dict[str, str]:
        """Return what clients of other services may call the models served here, by that name.

        Raises ConfigurationError for a model that is not served here.
        """
        named = dict(alias.split("=") for alias in self.model_aliases)
        if strangers := sorted(set(named.values()) - set(self.models)):
            raise ConfigurationError(
                f"{PREFIX}MODEL_ALIASES: {strangers[0]!r} is not among {PREFIX}MODELS, which are: "
                f"{', '.join(self.models)}"
            )
        return named

    def models_to_keep(self) -> tuple[str, ...]:
        """Return the models that are loaded ahead; raises ConfigurationError for one that is not served here."""
        if self.prewarm is None:
            return self.models[:1]
        if strangers := [name for name in self.prewarm if name not in self.models]:
            raise ConfigurationError(
                f"{PREFIX}PREWARM: {strangers[0]!r} is not among {PREFIX}MODELS, which are: {', '.join(self.models)}"
            )
        return self.prewarm

    def sizes_to_warm(self) -> list[tuple[int, int]]:
        """Return the sizes to warm models for, each as width and height in pixels."""
        sides = (size.split("x") for size in self.warm_sizes)
        return [(int(width), int(height)) for width, height in sides]

    def environment(self) -> dict[str, str]:
        """Return the variables that make a child process read these same settings, but for the API key."""
        fields = self.model_dump(exclude_none=True, exclude={SECRET})
        return {
            PREFIX + name.upper(): _as_text(value) for name, value in fields.items() if name in self.model_fields_set
        }


class Sourced(NamedTuple):
    """A setting's value, where it came from and what it means."""

    name: str
    value: str
    source: Literal["default", "environment", "flag"]
    description: str


def load_settings(flags: Mapping[str, Any] | None = None) -> Settings:
    """Read the settings; `flags` (by field name, None for unset) go before the environment.

    Raises ConfigurationError naming the variable and what it accepts.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        where = f"--{name.replace('_', '-')}" if name in given else PREFIX + name.upper()
        raise ConfigurationError(f"{where}: {first['msg']}, not {first['input']!r}") from None


def sources(settings: Settings, flags: Mapping[str, Any] | None = None) -> list[Sourced]:
    """Return every setting with its source, for `zfleet settings`; secrets in URLs are masked."""
    rows = []
    for name, field in Settings.model_fields.items():
        variable = PREFIX + name.upper()
        flagged = (flags or {}).get(name) is not None
        source: Literal["default", "environment", "flag"] = (
            "flag" if flagged else "environment" if os.environ.get(variable) else "default"
        )
        value = getattr(settings, name)
        text = mask_url(value) if name in ("redis_url", "url") else "" if value is None else _as_text(value)
        rows.append(Sourced(variable, text, source, field.description or ""))
    return rows


def child_environment(settings: Settings, **extra: str) -> dict[str, str]:
    """Return this process's environment with the settings and `extra` on top, for a child process.

    Without the API key: no server needs it, and another process's environment is easily read. And without what systemd
    gave this process to report by.
    """
    kept_back = {PREFIX + SECRET.upper(), *SERVICE_MANAGER}
    inherited = {name: value for name, value in os.environ.items() if name.upper() not in kept_back}
    return {**inherited, **settings.environment(), **extra}


def take_service_manager() -> dict[str, str]:
    """Take out of the environment what systemd gave this process to report by, and return it; see sd_notify(3)."""
    return {name: os.environ.pop(name) for name in SERVICE_MANAGER if name in os.environ}


def granted_gpus() -> list[str] | None:
    """Return the GPU indices that a scheduler or the operator granted by CUDA_VISIBLE_DEVICES; None: all of them."""
    granted = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if granted is None else [part.strip() for part in granted.split(",") if part.strip().isdecimal()]


def traces_wanted() -> bool:
    """Return whether OpenTelemetry's variables ask for traces; the other ones its SDK reads itself.

    Raises ConfigurationError for an exporter or protocol that zfleet does not have.
    """
    said = {name: os.environ.get(f"OTEL_{name}", "").strip() for name in _OTEL}
    exporter = said["TRACES_EXPORTER"]
    if said["SDK_DISABLED"].lower() == "true" or exporter == "none":
        return False
    if exporter not in ("", "otlp"):
        raise ConfigurationError(f"OTEL_TRACES_EXPORTER: must be otlp or none, not {exporter!r}")
    if not (exporter or said["EXPORTER_OTLP_ENDPOINT"] or said["EXPORTER_OTLP_TRACES_ENDPOINT"]):
        return False
    protocol = said["EXPORTER_OTLP_TRACES_PROTOCOL"] or said["EXPORTER_OTLP_PROTOCOL"]
    if protocol not in ("", "http/protobuf"):
        raise ConfigurationError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL: must be http/protobuf, which collectors take at port 4318, not {protocol!r}"
        )
    return True


def mask_url(url: str) -> str:
    """Return the URL with its password, if any, replaced by ***."""
    scheme, separator, rest = url.partition("://")
    credentials, at, host = rest.rpartition("@")
    if not at:
        return url
    user, colon, _ = credentials.partition(":")
    return f"{scheme}{separator}{user}{colon}{'***' if colon else ''}{at}{host}"


def _as_text(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)
