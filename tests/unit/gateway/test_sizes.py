from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.models import load_catalogue
from common.schemas import GenerateRequest
from gateway import sizes

CATALOGUE = load_catalogue()
TURBO = CATALOGUE["turbo"]


def asked(**fields: Any) -> GenerateRequest:
    return GenerateRequest.model_validate({"prompt": "x"} | fields)


@pytest.mark.parametrize(
    ("like", "expected"),
    [
        ((1024, 768), (1024, 768)), ((1000, 750), (992, 752)), ((4000, 3000), (2048, 1536)), ((64, 48), (336, 256)),
        ((4096, 4096), (2048, 2048)), ((300, 3000), (256, 2048)), ((1, 4000), (256, 2048)),
    ],
)  # fmt: skip
def test_a_size_is_taken_from_a_picture(like: tuple[int, int], expected: tuple[int, int]) -> None:
    assert sizes.chosen(asked(), TURBO, like) == expected
    assert sizes.chosen(asked(), TURBO, like[::-1]) == expected[::-1]


def test_what_is_asked_for_comes_first_and_the_other_side_follows_the_shape() -> None:
    assert sizes.chosen(asked(width=512, height=256), TURBO, (1000, 750)) == (512, 256)
    assert sizes.chosen(asked(width=512), TURBO, (1000, 750)) == (512, 384)
    assert sizes.chosen(asked(height=384), TURBO, (1000, 750)) == (512, 384)
    assert sizes.chosen(asked(width=512), TURBO) == (512, 1024)
    assert sizes.chosen(asked(width=0), TURBO, (100, 100)) == (0, 256), "and is refused then"


def test_the_workers_memory_is_a_limit_too() -> None:
    width, height = sizes.chosen(asked(), TURBO, (4000, 3000), 1024 * 1024)
    assert (width, height) == (1184, 880)


@given(
    model=st.sampled_from(sorted(CATALOGUE)),
    width=st.integers(1, 20_000),
    height=st.integers(1, 20_000),
    share=st.floats(0.3, 1.0),
)
def test_whatever_the_picture_the_model_can_make_its_size(model: str, width: int, height: int, share: float) -> None:
    spec = CATALOGUE[model]
    most = max(spec.min_side**2 * 2, int(spec.max_pixels * share))
    made = sizes.fitted(width, height, spec, most)
    assert sizes.errors(*made, spec) == []
    assert made[0] * made[1] <= most
    shape = (width / height) / (made[0] / made[1])
    if max(width, height) < 4 * min(width, height) and min(width, height) >= spec.min_side and share > 0.9:
        assert 0.8 < shape < 1.25, "its shape is kept"
