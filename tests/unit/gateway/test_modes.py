from __future__ import annotations

from typing import Any

import pytest

from common.errors import InvalidRequest
from common.limits import Limits
from common.models import Catalogue, load_catalogue
from common.schemas import GenerateRequest, ResolvedRequest
from gateway import submission
from gateway.inputs import Input

CATALOGUE = load_catalogue().select(["turbo", "simulated", "pico"])
A, B = f"img_{'a' * 32}", f"img_{'b' * 32}"


def asked(**fields: Any) -> GenerateRequest:
    return GenerateRequest.model_validate({"prompt": "x"} | fields)


def refused(catalogue: Catalogue = CATALOGUE, **fields: Any) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        submission.check(asked(**fields), catalogue)
    return dict(caught.value.errors)


def resolved(size: tuple[int, int] = (512, 512), limits: Limits | None = None, **fields: Any) -> ResolvedRequest:
    request = asked(**fields)
    named = {
        name: [Input(handle=text, width=size[0], height=size[1], identity=text) for text in texts]
        for name, texts in (
            ("init_image", [request.init_image]), ("mask_image", [request.mask_image]),
            ("control_image", [request.control_image]), ("reference_images", request.reference_images),
        )
        for texts in [[text for text in texts if text]]
        if texts
    }  # fmt: skip
    return submission.resolve(request, submission.check(request, CATALOGUE), named, limits or Limits())


def test_a_model_that_cannot_is_told_with_those_that_can() -> None:
    assert refused(model="turbo", control_image=A) == {
        "control_image": "model turbo cannot follow a control image; models that can: simulated"
    }
    assert refused(reference_images=[A])["reference_images"].endswith(
        "cannot edit pictures; models that can: simulated"
    )
    text = CATALOGUE["turbo"].model_copy(update={"modes": ("text",)})
    told = refused(Catalogue([text]), init_image=A, mask_image=B)
    assert told["init_image"] == "model turbo cannot start from a picture; models that can: none here"
    assert told["mask_image"] == "model turbo cannot paint inside a mask; models that can: none here"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"mask_image": A}, {"mask_image": "needs init_image"}),
        ({"strength": 0.5}, {"strength": "needs init_image"}),
        ({"control_scale": 0.0}, {"control_scale": "needs control_image"}),
        ({"control_image": A, "init_image": B}, {"control_image": "does not go together with init_image"}),
        (
            {"reference_images": [A], "init_image": B, "mask_image": A},
            {"reference_images": "does not go together with init_image, mask_image"},
        ),
        ({"loras": [{"name": "a"}]}, {"loras": "model simulated takes none; models that do: turbo, pico"}),
        ({"init_image": A, "strength": 1e-20}, {"strength": "leaves none of 8 steps to do"}),
    ],
    ids=str,
)
def test_what_does_not_go_together(fields: dict[str, Any], told: dict[str, str]) -> None:
    assert refused(model="simulated", **fields) == told


def test_a_picture_to_start_from_with_its_defaults() -> None:
    request = resolved((1000, 750), init_image=A)
    assert (request.init_image, request.strength, request.mask_image) == (A, 0.6, None)
    assert (request.width, request.height) == (992, 752)
    assert resolved(init_image=A, strength=0.1).strength == 0.1
    assert resolved(init_image=A, mask_image=B).strength == 1.0
    assert resolved(init_image=A, mask_image=B, strength=0.3).strength == 0.3


def test_without_pictures_nothing_counts() -> None:
    request = resolved()
    assert (request.strength, request.control_scale, request.reference_images, request.width) == (1.0, 0.0, (), 1024)
    assert (request.cfg_normalization, request.cfg_truncation) == (0.0, 1.0)
    assert resolved(cfg_normalization=1.5, cfg_truncation=0.5).cfg_truncation == 0.5


def test_a_control_image_and_references() -> None:
    request = resolved(model="simulated", control_image=A)
    assert (request.control_image, request.control_scale, request.width) == (A, 0.75, 512)
    assert resolved(model="simulated", control_image=A, control_scale=0.0).control_scale == 0.0
    assert resolved(model="simulated", reference_images=[A, B]).reference_images == (A, B)


def test_what_no_live_worker_can_hold_is_refused() -> None:
    limits = Limits(max_pixels=1024 * 1024)
    assert resolved(limits=limits).width == 1024
    with pytest.raises(InvalidRequest) as caught:
        resolved(limits=limits, width=1024, height=1040)
    assert dict(caught.value.errors) == {
        "width": "width x height must be at most 1048576 pixels: no live worker of model turbo has memory for more"
    }
    assert resolved((4000, 3000), limits, init_image=A).width == 1184, "a size that nobody asked for fits"


def test_a_lora_that_no_live_worker_has_is_refused() -> None:
    limits = Limits(loras=frozenset({"ink", "clay"}))
    assert [lora.name for lora in resolved(limits=limits, loras=[{"name": "ink"}]).loras] == ["ink"]
    with pytest.raises(InvalidRequest) as caught:
        resolved(limits=limits, loras=[{"name": "ink"}, {"name": "chalk"}])
    assert dict(caught.value.errors) == {"loras": "no live worker has chalk; there are: clay, ink"}
    assert resolved(loras=[{"name": "chalk"}]).loras, "where nobody says what there is"
    with pytest.raises(InvalidRequest) as caught:
        resolved(limits=Limits(loras=frozenset()), loras=[{"name": "chalk"}])
    told = "no live worker has chalk; there are: none (see ZFLEET_LORA_DIR)"
    assert dict(caught.value.errors) == {"loras": told}


def test_pictures_count_for_the_hash_by_what_they_are() -> None:
    request = asked(init_image=A)
    one, two = (Input(handle=A, width=8, height=8, identity=name) for name in ("sha256:1", "sha256:2"))
    hashes = [submission.body_hash(request, {"init_image": [each]}) for each in (one, two, one)]
    assert hashes[0] == hashes[2] != hashes[1]
