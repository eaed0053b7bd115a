"""Which pictures share a forward, so that little of it is padding."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from worker.zimage.forward import length_class

SIDES = st.integers(4, 128).map(lambda count: 16 * count)


@given(one=st.tuples(SIDES, SIDES), other=st.tuples(SIDES, SIDES))
def test_pictures_of_a_class_are_of_like_length(one: tuple[int, int], other: tuple[int, int]) -> None:
    shorter, longer = sorted((one[0] * one[1], other[0] * other[1]))
    if length_class(*one) == length_class(*other):
        assert longer <= 2**0.5 * shorter * (1 + 1e-9)
    if shorter == longer:
        assert length_class(*one) == length_class(*other)


def test_the_usual_sizes_keep_apart_and_their_other_shapes_do_not() -> None:
    assert len({length_class(side, side) for side in (512, 768, 1024, 1536, 2048)}) == 5
    assert length_class(1024, 1024) == length_class(1152, 896) == length_class(1216, 832)
