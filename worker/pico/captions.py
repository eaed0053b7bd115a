"""What people say of a scene: several phrasings in English and Chinese, some of them kept out of training."""

from __future__ import annotations

import random
from dataclasses import dataclass

from worker.pico import scenes
from worker.pico.scenes import LANGUAGES, Language, Place, Scene, Thing

WORDS: dict[Language, dict[str, tuple[str, ...]]] = {
    "en": {
        "red": ("red",), "orange": ("orange",), "yellow": ("yellow",), "green": ("green",), "blue": ("blue",),
        "purple": ("purple",), "pink": ("pink",), "black": ("black",), "white": ("white",), "grey": ("grey", "gray"),
        "circle": ("circle",), "square": ("square",), "triangle": ("triangle",), "star": ("star",), "heart": ("heart",),
        "big": ("big", "large"), "small": ("small", "little"),
    },
    "zh": {
        "red": ("红色", "红色", "红"), "orange": ("橙色", "橘色"), "yellow": ("黄色", "黄色", "黄"),
        "green": ("绿色", "绿色", "绿"), "blue": ("蓝色", "蓝色", "蓝"), "purple": ("紫色", "紫色", "紫"),
        "pink": ("粉色", "粉红色"), "black": ("黑色", "黑色", "黑"), "white": ("白色", "白色", "白"),
        "grey": ("灰色", "灰色", "灰"),
        "circle": ("圆形", "圆形", "圆"), "square": ("正方形", "方形", "方块"), "triangle": ("三角形",),
        "star": ("星形", "五角星", "星星"), "heart": ("心形", "爱心"),
        "big": ("大",), "small": ("小",),
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Phrasings:
    """Ways to say one thing; the last ones, `kept` of them, are kept out of training."""

    ways: tuple[str, ...]
    kept: int = 0

    def pick(self, rng: random.Random, *, held_out: bool) -> str:
        """Return a way seen in training or, if there are such, one that is not."""
        cut = len(self.ways) - self.kept
        return rng.choice(self.ways[cut:] if held_out and self.kept else self.ways[:cut])


# {a} is the first thing with its article, {a_} without. Nearly all that is said one way round is said the other way
# too: else a word that says nothing of the order would give it away, and be believed.
THINGS: dict[tuple[Language, Place], Phrasings] = {
    ("en", "centre"): Phrasings(
        (
            "{a}", "{a_}", "{a}", "{a} in the middle", "a picture of {a}", "there is {a}", "an image of {a}",
            "paint {a}", "a photo of {a}", "a sketch of {a}", "an illustration of {a}", "draw {a}", "show me {a}",
            "a drawing of {a}",
        ),
        1,
    ),
    ("en", "left"): Phrasings(
        (
            "{a} on the left", "on the left {a}", "{a_} on the left side", "on the left: {a_}", "{a_} to the left",
            "left side: {a_}", "a picture of {a} on the left", "there is {a} on the left", "left: {a_}",
        ),
        1,
    ),
    ("en", "right"): Phrasings(
        (
            "{a} on the right", "on the right {a}", "{a_} on the right side", "on the right: {a_}", "{a_} to the right",
            "right side: {a_}", "a picture of {a} on the right", "there is {a} on the right", "right: {a_}",
        ),
        1,
    ),
    ("en", "top"): Phrasings(
        (
            "{a} at the top", "at the top {a}", "{a_} at the top", "at the top: {a_}", "top side: {a_}",
            "a picture of {a} at the top", "there is {a} at the top", "top: {a_}",
        ),
        1,
    ),
    ("en", "bottom"): Phrasings(
        (
            "{a} at the bottom", "at the bottom {a}", "{a_} at the bottom", "at the bottom: {a_}", "bottom side: {a_}",
            "a picture of {a} at the bottom", "there is {a} at the bottom", "bottom: {a_}",
        ),
        1,
    ),
    ("zh", "centre"): Phrasings(("{a}", "{a_}", "{a_}", "中间{a}", "中间有{a}", "有{a}", "画{a}", "一张图，{a}"), 1),
    ("zh", "left"): Phrasings(
        ("左边{a}", "左边有{a}", "{a}在左边", "左边是{a}", "左侧有{a}", "{a}在左侧", "左侧{a_}"), 1
    ),
    ("zh", "right"): Phrasings(
        ("右边{a}", "右边有{a}", "{a}在右边", "右边是{a}", "右侧有{a}", "{a}在右侧", "右侧{a_}"), 1
    ),
    ("zh", "top"): Phrasings(
        ("上面{a}", "上面有{a}", "{a}在上面", "上面是{a}", "上方有{a}", "{a}在上方", "上方{a_}"), 1
    ),
    ("zh", "bottom"): Phrasings(
        ("下面{a}", "下面有{a}", "{a}在下面", "下面是{a}", "下方有{a}", "{a}在下方", "下方{a_}"), 1
    ),
}  # fmt: skip
PAIRS: dict[tuple[Language, Place], Phrasings] = {
    ("en", "left"): Phrasings(
        (
            "{a} left of {b}", "{a} to the left of {b}", "{b} right of {a}", "{b} to the right of {a}",
            "{a} on the left and {b} on the right", "{b} on the right and {a} on the left", "left: {a_}, right: {b_}",
            "right: {b_}, left: {a_}", "on the right {b}, on the left {a}", "{b_} on the right and {a_} on the left",
            "to the left of {b} there is {a}", "{b} is to the right of {a}", "{a_} to the left of {b_}",
            "{a_} on the left and {b_} on the right", "{a} on the left, {b} on the right",
            "a picture of {a} left of {b}", "{a_} left of {b_}", "there is {a} to the left of {b}",
            "on the left {a}, on the right {b}", "{b} on the right, {a} on the left", "{b_} right of {a_}",
            "on the left is {a}, on the right is {b}", "on the right is {b}, on the left is {a}",
            "{a} is left of {b}", "{b} is right of {a}", "{a} is on the left of {b}", "{b} is on the right of {a}",
            "there is {b} to the right of {a}", "there is {a} left of {b}", "a picture of {b} right of {a}",
            "left of {b} there is {a}", "right of {a} there is {b}", "right of {a} is {b}", "left of {b} is {a}",
            "to the left of {b} is {a}", "to the right of {a} is {b}", "on the left of {b} there is {a}",
            "on the right of {a} there is {b}", "on the right of {a} is {b}", "a photo of {b} to the right of {a}",
            "on the left: {a_}, on the right: {b_}", "{a} is to the left of {b}", "to the right of {a} there is {b}",
        ),
        3,
    ),
    ("en", "top"): Phrasings(
        (
            "{a} above {b}", "{a} over {b}", "{b} below {a}", "{b} under {a}",
            "{a} at the top and {b} at the bottom", "{b} at the bottom and {a} at the top", "top: {a_}, bottom: {b_}",
            "bottom: {b_}, top: {a_}", "at the bottom {b}, at the top {a}", "{b_} at the bottom and {a_} at the top",
            "above {b} there is {a}", "{b} is below {a}", "{a_} over {b_}", "{b_} under {a_}",
            "{a_} at the top and {b_} at the bottom", "{a} at the top, {b} at the bottom",
            "a picture of {a} above {b}", "{a_} above {b_}", "there is {a} above {b}",
            "at the top {a}, at the bottom {b}", "{b} at the bottom, {a} at the top", "{b_} below {a_}",
            "at the top is {a}, at the bottom is {b}", "at the bottom is {b}, at the top is {a}",
            "{a} is over {b}", "{b} is under {a}", "there is {b} below {a}", "there is {b} under {a}",
            "a picture of {b} below {a}", "over {b} there is {a}", "under {a} there is {b}", "under {a} is {b}",
            "above {b} is {a}", "over {b} is {a}", "below {a} is {b}", "a photo of {b} under {a}",
            "at the top: {a_}, at the bottom: {b_}", "{a} is above {b}", "below {a} there is {b}",
        ),
        3,
    ),
    ("zh", "left"): Phrasings(
        (
            "左边{a_}，右边{b_}", "左边{a}，右边{b}", "{a}在{b}左边", "{b}在{a}右边", "{a}在{b}的左边",
            "{b_}在{a_}的右边", "左边有{a}，右边有{b}", "左侧{a_}，右侧{b_}", "右边{b_}，左边{a_}", "{a}左边，{b}右边",
            "{b}的左边有{a}", "{b}左边是{a}", "{a}的右边有{b}", "{a}右边是{b}", "{a}在左边，{b}在右边",
            "{b}在右边，{a}在左边", "右侧有{b}，左侧有{a}", "右边{b}，左边有{a}", "左边是{a}，右边是{b}",
            "右边有{b}，左边有{a}", "{b}的左边是{a}", "左侧有{a}，右侧有{b}",
        ),
        3,
    ),
    ("zh", "top"): Phrasings(
        (
            "上面{a_}，下面{b_}", "上面{a}，下面{b}", "{a}在{b}上面", "{b}在{a}下面", "{a}在{b}的上面",
            "{b_}在{a_}的下面", "上面有{a}，下面有{b}", "上方{a_}，下方{b_}", "下面{b_}，上面{a_}", "{a}在{b}上方",
            "{b}的上面有{a}", "{b}上面是{a}", "{a}的下面有{b}", "{a}下面是{b}", "{a}在上面，{b}在下面",
            "{b}在下面，{a}在上面", "下方有{b}，上方有{a}", "下面{b}，上面有{a}", "上面是{a}，下面是{b}",
            "下面有{b}，上面有{a}", "{b}的上面是{a}", "上方有{a}，下方有{b}",
        ),
        3,
    ),
}  # fmt: skip
BACKGROUNDS: dict[Language, Phrasings] = {
    "en": Phrasings(
        (
            "{scene} on a {colour} background", "{scene}, {colour} background", "{scene} on {colour}",
            "{colour} background, {scene}", "{scene} on a plain {colour} background", "background: {colour}, {scene}",
            "{scene}, background: {colour}", "on a {colour} background, {scene}",
        ),
        2,
    ),
    "zh": Phrasings(
        (
            "{scene}，{colour}背景", "{colour}背景，{scene}", "{colour}背景上，{scene}", "{scene}，{colour}的背景",
            "{colour}的背景，{scene}", "{scene}，背景是{colour}", "背景{colour}，{scene}", "背景是{colour}，{scene}",
        ),
        2,
    ),
}  # fmt: skip
JOINTS = (
    "左边", "右边", "上面", "下面", "左侧", "右侧", "上方", "下方", "中间", "背景", "一个", "一张", "图", "画", "上",
    "在", "有", "是", "的", "，", "。",
)  # fmt: skip
COMMAS = ("，", "，", ",", ", ", " ")


def caption(scene: Scene, language: Language, rng: random.Random, *, held_out: bool = False) -> str:
    """Return words for the scene, chosen by `rng`: as said in training or, held out, in ways never said there."""
    first, *rest = scene.things
    known = (PAIRS if rest else THINGS)[language, first.place]
    names = {"a_": _name(first, language, rng)}
    if rest:
        names["b_"] = _name(rest[0], language, rng)
    text = known.pick(rng, held_out=held_out).format(
        **names, **{key[0]: _article(name, language, rng) for key, name in names.items()}
    )
    if scene.background:
        frame = BACKGROUNDS[language].pick(rng, held_out=held_out and rng.random() < 0.5)
        text = frame.format(scene=text, colour=_word(scene.background, language, rng)).replace("a orange", "an orange")
    if language == "zh":
        return text.replace("，", rng.choice(COMMAS)) + rng.choice(("", "", "。"))
    return (text[0].upper() + text[1:] if rng.random() < 0.3 else text) + rng.choice(("", "", "."))


def lexicon() -> list[str]:
    """Return the single words of the Chinese captions, which put no spaces between them."""
    return [*JOINTS, *(word for words in WORDS["zh"].values() for word in words)]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Words, and the scene they stand for."""

    text: str
    language: Language
    scene: Scene


def held_out(count: int, seed: int = 0) -> list[Prompt]:
    """Return prompts of combinations and in phrasings that were kept out of training: each scene in both languages."""
    rng = random.Random(f"prompts {seed}")
    prompts: list[Prompt] = []
    while len(prompts) < count:
        scene = scenes.invent(rng)
        if scene.held_out and all(thing.colour for thing in scene.things):
            prompts += [Prompt(caption(scene, each, rng, held_out=True), each, scene) for each in LANGUAGES]
    return prompts[:count]


def _word(meaning: str, language: Language, rng: random.Random) -> str:
    return rng.choice(WORDS[language][meaning])


def _name(thing: Thing, language: Language, rng: random.Random) -> str:
    size = _word(thing.size, language, rng) if thing.size else ""
    colour = _word(thing.colour, language, rng) if thing.colour else ""
    shape = _word(thing.shape, language, rng)
    if language == "en":
        return " ".join(filter(None, (size, colour, shape)))
    return rng.choice((f"{size}{colour}{shape}", f"{colour}{'的' if len(colour) > 1 else ''}{size}{shape}"))


def _article(name: str, language: Language, rng: random.Random) -> str:
    if language == "zh":
        return rng.choice(("", "一个", "一个")) + name
    return rng.choice(("a", "a", "one")) + " " + name if name[0] not in "aeiou" else "an " + name
