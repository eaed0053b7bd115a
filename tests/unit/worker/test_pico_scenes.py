"""The scenes pico learns from, the words for them, and the judge that tells whether a picture shows one."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from worker.pico import captions, scenes
from worker.pico.judge import Judgement, classify, judge, shape_of
from worker.pico.scenes import LANGUAGES, PALETTE, SHAPES, Language, Place, Scene, Thing

SIZES = [(128, 128), (64, 64), (64, 96), (192, 128), (256, 64)]
PAIR = Scene((Thing("square", "red", place="left"), Thing("circle", "green", place="right")), "grey")
PLACES: tuple[Place, ...] = ("centre", "left", "right", "top", "bottom")


def picture(scene: Scene, size: tuple[int, int] = (128, 128), seed: int = 1) -> NDArray[np.uint8]:
    return np.asarray(scenes.draw(scene, *size, random.Random(seed)))


def invented(count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [scenes.invent(rng) for _ in range(count)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_judge_finds_nothing_wrong_with_a_true_picture_even_a_grainy_one(size: tuple[int, int]) -> None:
    grain = np.random.default_rng(1)
    for seed, scene in enumerate(invented(60)):
        noisy = picture(scene, size, seed) + grain.normal(0, 10, (size[1], size[0], 3))
        found = judge(np.clip(noisy, 0, 255).astype(np.uint8), scene)
        assert found.matches, scene
        assert all(found.shapes) and all(found.sizes), scene


def paired(first: Thing, second: Thing, background: str = "grey") -> Scene:
    return Scene((first, second), background)


SQUARE, CIRCLE = PAIR.things


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (replace(PAIR, background="blue"), "background"),
        (paired(replace(SQUARE, colour="pink"), CIRCLE), "colours"),
        (paired(replace(SQUARE, shape="star"), replace(CIRCLE, shape="star")), "shapes"),
        (paired(replace(SQUARE, size="big"), replace(CIRCLE, size="small")), "sizes"),
        (replace(PAIR, things=PAIR.things[:1]), "colours"),
        (paired(replace(CIRCLE, place="left"), replace(SQUARE, place="right")), "placed"),
        (paired(replace(SQUARE, place="top"), replace(CIRCLE, place="bottom")), "placed"),
        (Scene((CIRCLE,), "red"), "placed"),
    ],
    ids=["background", "colour", "shape", "size", "missing", "swapped", "other axis", "background as a thing"],
)
def test_the_judge_sees_each_kind_of_error_in_a_pair(wrong: Scene, told: str) -> None:
    found = judge(picture(wrong), PAIR)
    verdict = getattr(found, told)
    assert verdict is False or False in verdict
    assert found.matches is (told in {"shapes", "sizes"})
    assert judge(picture(PAIR), PAIR).matches


@pytest.mark.parametrize("shown", PLACES)
@pytest.mark.parametrize("asked", PLACES)
@pytest.mark.parametrize("size", [(128, 128), (192, 128)], ids=str)
def test_the_judge_knows_where_a_thing_stands(shown: Place, asked: Place, size: tuple[int, int]) -> None:
    for seed in range(4):
        found = judge(
            picture(Scene((Thing("heart", "red", place=shown),)), size, seed),
            Scene((Thing("heart", "red", place=asked),)),
        )
        assert found.placed is (shown == asked)


def test_the_judge_sees_what_nobody_asked_for() -> None:
    circle = Scene((Thing("circle", "red", "big"),), "white")
    for left in ("big", "small"):
        crowd = paired(Thing("square", "red", left, "left"), Thing("star", "blue", "small", "right"), "white")  # type: ignore[arg-type]
        found = judge(picture(crowd), circle)
        assert not found.alone and not found.matches


def test_a_colour_that_is_none_of_the_palette_counts_for_nothing() -> None:
    muddy = picture(Scene((Thing("circle", "green"),), "grey")).copy()
    muddy[(muddy == PALETTE["green"]).all(axis=-1)] = (150, 110, 60)
    assert judge(muddy, Scene((Thing("circle", "orange"),), "grey")).colours == (False,)
    assert judge(muddy, Scene((Thing("circle", None),), "grey")).colours == (None,)


def test_a_bar_is_no_square_and_an_ellipse_no_circle() -> None:
    rows, columns = np.mgrid[:64, :64]
    assert shape_of((abs(rows - 32) < 8) & (abs(columns - 32) < 24)) is None
    assert shape_of(((rows - 32) / 12) ** 2 + ((columns - 32) / 24) ** 2 < 1) is None
    assert shape_of(np.zeros((64, 64), dtype=np.bool_)) is None


def test_an_empty_or_a_random_picture_shows_nothing() -> None:
    plain = np.full((128, 128, 3), PALETTE["grey"], dtype=np.uint8)
    nothing = (False, False)
    assert judge(plain, PAIR) == Judgement(
        background=True, colours=nothing, shapes=nothing, sizes=nothing, placed=False, alone=True
    )
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert not any(judge(noise, scene).matches for scene in invented(50))


def test_hardly_any_picture_passes_for_that_of_another_prompt_with_the_same_background() -> None:
    shown = [replace(scene, background="white") for scene in invented(300, 1)]
    asked = [replace(scene, background="white") for scene in invented(300, 2)]
    passed = [
        judge(picture(one), other).matches and one != other
        for one, other in zip(shown, asked, strict=True)
        if "white" not in {thing.colour for thing in (*one.things, *other.things)}
    ]
    assert len(passed) > 150
    assert sum(passed) <= 0.03 * len(passed)


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_are_told_apart_down_to_ten_pixels(shape: scenes.Shape) -> None:
    for side in (24, 48, 128):
        thing = Scene((Thing(shape, "black"),), "white")
        mask = classify(picture(thing, (side, side))) == list(PALETTE).index("black")
        assert shape_of(mask) == shape


def test_the_same_seed_draws_the_same_picture() -> None:
    assert np.array_equal(picture(PAIR, seed=4), picture(PAIR, seed=4))
    assert not np.array_equal(picture(PAIR, seed=4), picture(PAIR, seed=5))


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("held_out", [False, True])
def test_a_caption_names_everything_that_the_scene_says(language: Language, held_out: bool) -> None:
    rng = random.Random(7)
    for scene in invented(300):
        text = captions.caption(scene, language, rng, held_out=held_out).lower()
        meanings = [scene.background] + [
            word for thing in scene.things for word in (thing.shape, thing.colour, thing.size)
        ]
        for meaning in filter(None, meanings):
            assert any(word in text for word in captions.WORDS[language][meaning]), (text, meaning)
        assert "{" not in text


def said(scene: Scene, language: Language) -> set[str]:
    """Return nearly all that is ever said of a scene, in training and held out."""
    rng = random.Random(3)
    return {captions.caption(scene, language, rng, held_out=bool(i % 2)) for i in range(4000)}


@pytest.mark.parametrize("places", [("left", "right"), ("top", "bottom")], ids=str)
@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_never_mix_up_where_things_stand(language: Language, places: tuple[Place, Place]) -> None:
    one, other = places
    there = Scene((replace(SQUARE, place=one), replace(CIRCLE, place=other)))
    swapped = Scene((replace(CIRCLE, place=one), replace(SQUARE, place=other)))
    assert not said(there, language) & said(swapped, language)
    alone, across = (Scene((replace(SQUARE, place=place),)) for place in places)
    assert not said(alone, language) & said(across, language)


def test_the_lexicon_has_every_chinese_word_that_is_ever_said() -> None:
    known = [*captions.THINGS.values(), *captions.PAIRS.values(), *captions.BACKGROUNDS.values()]
    left = "".join(way for phrasings in known for way in phrasings.ways)
    for word in sorted(captions.lexicon(), key=len, reverse=True):
        left = left.replace(word, " ")
    assert not re.search(r"[\u4e00-\u9fff]", left), left


def test_held_out_combinations_and_phrasings_are_apart_from_those_of_training() -> None:
    found = invented(4000)
    share = sum(scene.held_out for scene in found) / len(found)
    assert 0.08 < share < 0.17
    for prompt in captions.held_out(100):
        assert prompt.scene.held_out
    for known in [*captions.THINGS.values(), *captions.PAIRS.values(), *captions.BACKGROUNDS.values()]:
        rng = random.Random(1)
        seen, kept = ({known.pick(rng, held_out=held_out) for _ in range(300)} for held_out in (False, True))
        seen, kept = ({way.replace("_}", "}") for way in ways} for ways in (seen, kept))  # an article is no phrasing
        assert not seen & kept


def test_the_prompts_of_the_evaluation_are_fixed_and_in_both_languages() -> None:
    prompts = captions.held_out(50)
    assert prompts == captions.held_out(50)
    assert prompts != captions.held_out(50, seed=1)
    assert [prompt.language for prompt in prompts[:4]] == ["en", "zh", "en", "zh"]
    assert [prompt.scene for prompt in prompts[::2]] == [prompt.scene for prompt in prompts[1::2]]
    assert len({prompt.text for prompt in prompts}) == 50
