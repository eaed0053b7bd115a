from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import ConfigurationError
from common.settings import Settings, child_environment, load_settings, mask_url, sources


def test_flags_go_before_the_environment_and_that_before_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZFLEET_PORT", "9001")
    monkeypatch.setenv("ZFLEET_HOST", "::1")
    settings = load_settings({"port": 9002, "host": None})
    assert (settings.port, settings.host, settings.lease_s) == (9002, "::1", 15.0)
    found = {row.name: row.source for row in sources(settings, {"port": 9002})}
    assert (found["ZFLEET_PORT"], found["ZFLEET_HOST"], found["ZFLEET_LEASE_S"]) == ("flag", "environment", "default")


def test_a_child_reads_the_same_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = load_settings({"models": ("pico", "simulated"), "data_dir": tmp_path / "a b", "lease_s": 7.5})
    for name, value in child_environment(settings).items():
        monkeypatch.setenv(name, value)
    assert load_settings() == settings


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ZFLEET_PORT", "http"),
        ("ZFLEET_LEASE_S", "-1"),
        ("ZFLEET_LOG_LEVEL", "loud"),
        ("ZFLEET_RETENTION_DAYS", "1e99"),
        ("ZFLEET_BEAT_S", "8"),
        ("ZFLEET_DISK_PAUSE_PERCENT", "101"),
        ("ZFLEET_DISK_RESUME_PERCENT", "90"),
        ("ZFLEET_HOUSEKEEPING_S", "0"),
        ("ZFLEET_WARM_SIZES", "1024"),
        ("ZFLEET_WARM_SIZES", "512x512,1000x1000"),
        ("ZFLEET_MODEL_ALIASES", "dall-e-3"),
        ("ZFLEET_MODEL_ALIASES", "a/b=turbo"),
        ("ZFLEET_URL", "http://[::1"),
        ("ZFLEET_URL", "http://host:port"),
        ("ZFLEET_PUBLIC_URL", "pictures.example"),
        ("ZFLEET_PUBLIC_URL", "https://pictures.example/?a"),
    ],
)
def test_a_wrong_value_names_its_variable(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=variable):
        load_settings()


def test_models_and_sizes_that_are_got_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings({"models": ("turbo", "pico")}).models_to_keep() == ("turbo",)
    monkeypatch.setenv("ZFLEET_MODELS", "turbo,pico,base")
    monkeypatch.setenv("ZFLEET_PREWARM", "base, pico")
    monkeypatch.setenv("ZFLEET_WARM_SIZES", "1024x1024, 512x768")
    settings = load_settings()
    assert settings.models_to_keep() == ("base", "pico")
    assert settings.sizes_to_warm() == [(1024, 1024), (512, 768)]
    monkeypatch.setenv("ZFLEET_PREWARM", "bass")
    with pytest.raises(ConfigurationError, match="ZFLEET_PREWARM: 'bass' is not among ZFLEET_MODELS"):
        load_settings().models_to_keep()


def test_other_names_for_models_and_the_public_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZFLEET_MODEL_ALIASES", "dall-e-3=turbo, gpt-image-2=turbo")
    monkeypatch.setenv("ZFLEET_PUBLIC_URL", "https://pictures.example/fleet/")
    settings = load_settings()
    assert settings.aliases() == {"dall-e-3": "turbo", "gpt-image-2": "turbo"}
    assert settings.public_url == "https://pictures.example/fleet"
    with pytest.raises(ConfigurationError, match="ZFLEET_MODEL_ALIASES: 'turbo' is not among ZFLEET_MODELS"):
        load_settings({"models": ("pico",)}).aliases()


def test_a_lower_pause_needs_a_lower_resume() -> None:
    with pytest.raises(ConfigurationError, match=r"below ZFLEET_DISK_PAUSE_PERCENT \(80\)"):
        load_settings({"disk_pause_percent": 80})
    assert load_settings({"disk_pause_percent": 80, "disk_resume_percent": 75}).disk_resume_percent == 75


def test_a_wrong_flag_names_the_flag() -> None:
    with pytest.raises(ConfigurationError, match="--queue-cap"):
        load_settings({"queue_cap": 0})


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@host:6379/0", "redis://:***@host:6379/0"),
        ("rediss://user:p@ss@host/1", "rediss://user:***@host/1"),
        ("redis://host:6379", "redis://host:6379"),
    ],
)
def test_passwords_are_masked(url: str, shown: str) -> None:
    assert mask_url(url) == shown
    rows = sources(load_settings({"redis_url": url}))
    assert next(row.value for row in rows if row.name == "ZFLEET_REDIS_URL") == shown


def test_every_setting_has_a_description_or_speaks_for_itself() -> None:
    assert {name for name, field in Settings.model_fields.items() if not field.description} <= {
        "port", "log_level", "body_limit_bytes", "simulated_load_ms",
    }  # fmt: skip


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZFLEET_DATA_DIR", "")
    monkeypatch.setenv("ZFLEET_PORT", "")
    assert load_settings() == Settings()
    assert load_settings().data_dir == Path("~/.zfleet").expanduser()
