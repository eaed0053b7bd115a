from __future__ import annotations

from typing import Any

import pytest

from common.errors import FieldError, InvalidRequest, UnknownModel
from common.models import Catalogue, load_catalogue
from common.schemas import SEED_MAX, GenerateRequest, ResolvedRequest
from gateway import submission


@pytest.fixture
def catalogue() -> Catalogue:
    return load_catalogue().select(["turbo", "base", "pico"])


def asked(**fields: Any) -> GenerateRequest:
    return GenerateRequest.model_validate({"prompt": "a red circle"} | fields)


def resolve(request: GenerateRequest, catalogue: Catalogue) -> ResolvedRequest:
    return submission.resolve(request, submission.check(request, catalogue))


def refused(catalogue: Catalogue, **fields: Any) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        resolve(asked(**fields), catalogue)
    return dict(caught.value.errors)


def test_what_is_not_asked_for_is_the_models_default(catalogue: Catalogue) -> None:
    request = resolve(asked(), catalogue)
    assert (request.model, request.width, request.height, request.steps) == ("turbo", 1024, 1024, 8)
    assert (request.guidance_scale, request.format, request.quality, request.n) == (0.0, "webp", 85, 1)
    other = resolve(asked(model="base"), catalogue)
    assert (other.steps, other.guidance_scale) == (50, 4.0)


def test_what_is_asked_for_stays(catalogue: Catalogue) -> None:
    fields = {
        "model": "turbo", "width": 512, "height": 768, "steps": 4, "guidance_scale": 1.5, "seed": 7, "n": 2,
        "format": "png", "quality": 50, "priority": "high", "deadline_s": 3.5, "metadata": {"a": "b"},
        "negative_prompt": "blur",
    }  # fmt: skip
    request = resolve(asked(**fields), catalogue).model_dump()
    assert {name: request[name] for name in fields} == fields


@pytest.mark.parametrize("side", [0, -16, 8, 100, 240, 2064, 10**30])
def test_a_side_is_a_multiple_of_16_within_the_models_limits(catalogue: Catalogue, side: int) -> None:
    expected = "must be a multiple of 16 from 256 to 2048 for model turbo"
    assert refused(catalogue, width=side) == {"width": expected}
    assert refused(catalogue, height=side) == {"height": expected}


def test_being_late_needs_a_deadline(catalogue: Catalogue) -> None:
    assert refused(catalogue, reject_if_late=True) == {
        "reject_if_late": "needs deadline_s, the seconds from now that the task has"
    }
    assert resolve(asked(reject_if_late=True, deadline_s=9.0), catalogue).deadline_s == 9.0


def test_all_that_is_wrong_is_told_at_once(catalogue: Catalogue) -> None:
    wrong = [FieldError("template", "is not installed here")]
    with pytest.raises(InvalidRequest) as caught:
        submission.check(asked(width=1, height=2, steps=99, n=9), catalogue, wrong=wrong)
    errors = dict(caught.value.errors)
    assert list(errors) == ["template", "width", "height", "steps", "n"]
    assert errors["steps"] == "must be from 1 to 50 for model turbo"
    assert errors["n"] == "must be from 1 to 8 for model turbo"


def test_the_limits_are_the_models_own(catalogue: Catalogue) -> None:
    assert resolve(asked(model="base", steps=100), catalogue).steps == 100
    assert resolve(asked(model="pico", width=64), catalogue).width == 64
    assert "from 64 to 256" in refused(catalogue, model="pico", width=512)["width"]


def test_the_area_has_a_limit_of_its_own() -> None:
    spec = load_catalogue()["turbo"].model_copy(update={"max_pixels": 1024 * 1024})
    errors = refused(Catalogue([spec]), width=2048, height=1024)
    assert errors == {"width": "width x height must be at most 1048576 pixels for turbo"}


def test_an_unknown_model_is_told_with_the_known_ones(catalogue: Catalogue) -> None:
    with pytest.raises(UnknownModel, match="choose one of: turbo, base, pico") as caught:
        submission.check(asked(model="sdxl"), catalogue, wrong=[FieldError("template", "is not installed here")])
    assert [loc for loc, _ in caught.value.errors] == ["model", "template"]


def test_an_absent_seed_is_drawn_so_that_all_pictures_seeds_fit(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve(asked(), catalogue).seed != resolve(asked(), catalogue).seed
    monkeypatch.setattr("secrets.randbelow", lambda bound: bound - 1)
    assert resolve(asked(n=8), catalogue).seed + 7 == SEED_MAX


def test_the_last_pictures_seed_fits(catalogue: Catalogue) -> None:
    assert resolve(asked(seed=SEED_MAX), catalogue).seed == SEED_MAX
    assert resolve(asked(seed=SEED_MAX - 3, n=4), catalogue).seed == SEED_MAX - 3
    assert refused(catalogue, seed=SEED_MAX, n=2) == {"seed": f"must be from 0 to {SEED_MAX - 1} for 2 pictures"}


def test_the_same_request_has_the_same_hash_however_it_was_written() -> None:
    one = GenerateRequest.model_validate_json('{"prompt": "x", "n": 1, "metadata": {"a": "1", "b": "2"}}')
    two = GenerateRequest.model_validate_json('{"metadata": {"b": "2", "a": "1"}, "width": null, "prompt": "\\u0078"}')
    assert submission.body_hash(one) == submission.body_hash(two)
    assert submission.body_hash(one) != submission.body_hash(asked(prompt="x", metadata={"a": "1", "b": "3"}))


def test_ids_are_long_and_differ() -> None:
    ids = {submission.new_task_id() for _ in range(100)}
    assert len(ids) == 100 and {len(one) for one in ids} == {32}


def test_a_lora_is_named_once(catalogue: Catalogue) -> None:
    loras = [{"name": "ink"}, {"name": "soft", "scale": 0.5}, {"name": "ink", "scale": -1.0}]
    assert refused(catalogue, loras=loras) == {"loras": "names must differ"}
    resolve(asked(loras=loras[:2]), catalogue)
