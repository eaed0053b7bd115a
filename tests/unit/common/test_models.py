from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import ConfigurationError, UnknownModel
from common.models import load_catalogue
from common.settings import load_settings


def test_the_built_in_models_are_there() -> None:
    catalogue = load_catalogue()
    assert list(catalogue) == ["turbo", "base", "pico", "pico-stock", "simulated"]
    assert (catalogue["turbo"].steps, catalogue["turbo"].guidance_scale) == (8, 0.0)


def test_the_first_model_named_is_the_default() -> None:
    assert load_settings({"models": ("pico", "turbo")}).catalogue().default.name == "pico"


def test_an_unknown_model_says_which_there_are() -> None:
    with pytest.raises(UnknownModel, match="choose one of: pico"):
        load_catalogue().select(["pico"])["turbo"]
    with pytest.raises(ConfigurationError, match="'nope' is not in the catalogue"):
        load_settings({"models": ("nope",)}).catalogue()


def test_a_users_file_adds_and_amends(tmp_path: Path) -> None:
    file = tmp_path / "models.toml"
    file.write_text('[poster]\nsource = "/srv/poster"\nsteps = 12\n[turbo]\nmax_batch = 2\n')
    catalogue = load_catalogue(file)
    assert (catalogue["poster"].source, catalogue["poster"].steps) == ("/srv/poster", 12)
    assert (catalogue["turbo"].max_batch, catalogue["turbo"].steps) == (2, 8)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[x]\nsteps = 3\n", r"\[x\] source"),
        ('[x]\nsource = "a"\nstepz = 3\n', r"\[x\] stepz"),
        ("x = 1\n", "x must be a table"),
        ("[x\n", "models.toml"),
        ('["Bad Name"]\nsource = "a"\n', "name"),
    ],
)
def test_a_wrong_file_says_where(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "models.toml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=told):
        load_catalogue(file)
    with pytest.raises(ConfigurationError):
        load_catalogue(tmp_path / "absent.toml")
