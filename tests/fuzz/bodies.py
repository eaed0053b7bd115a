"""What hypothesis draws a submit's body from: anything at all, the plausible, the right, and the right gone wrong."""

from __future__ import annotations

import base64
import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from common.schemas import SEED_MAX, GenerateRequest
from tests.samples import drawn, encoded, lying_png

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec=None)), inner, max_size=3),
    max_leaves=8,
)

# Pictures

files = st.sampled_from([encoded(kind=kind) for kind in ("PNG", "JPEG", "WEBP", "GIF")] + [lying_png(9999, 9999)])
spoilt = st.tuples(files, st.integers(0, 400), st.binary(max_size=6)).map(lambda t: t[0][: t[1]] + t[2] + t[0][t[1] :])
sent = st.one_of(files, spoilt).map(lambda data: base64.b64encode(data).decode()) | st.sampled_from(
    ["img_" + "0" * 32, "img_", "data:image/png;base64,", "sha256:0"]
)
whole = st.sampled_from([encoded(drawn(24, 16), kind=kind) for kind in ("PNG", "JPEG", "WEBP")])
PICTURES = ("init_image", "mask_image", "control_image", "reference_images")

# Of each field what might be sent, right or nearly so

hooks = st.fixed_dictionaries(
    {"url": st.sampled_from(["https://1.1.1.1/hook", "https://[::1]/", "http://x", "", "https://a b/", "file:///"])},
    optional={"events": st.lists(st.sampled_from(["started", "ended", "x"]), max_size=3)},
)
plausible: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.text(max_size=50),
    "negative_prompt": st.text(max_size=50) | st.none(),
    "model": st.sampled_from(["simulated", "pico", "turbo", "", "../x"]),
    "width": st.integers(-16, 4096) | st.sampled_from([64, 128, 256]),
    "height": st.integers() | st.sampled_from([64, 128, 256]),
    "steps": st.integers(-1, 200),
    "guidance_scale": st.floats(-1, 21),
    "cfg_normalization": st.floats(-1, 11),
    "cfg_truncation": st.floats(-1, 2),
    "init_image": sent,
    "strength": st.floats(-1, 2),
    "mask_image": sent,
    "control_image": sent,
    "control_scale": st.floats(-1, 3),
    "reference_images": st.lists(sent, max_size=5),
    "loras": st.lists(st.fixed_dictionaries({"name": st.sampled_from(["ink", "../x", ""]), "scale": st.floats(-5, 5)})),
    "preview": st.booleans(),
    "seed": st.integers(-1, 2**53),
    "n": st.integers(-1, 10),
    "format": st.sampled_from(["webp", "png", "jpeg", "gif"]),
    "quality": st.integers(-1, 101),
    "priority": st.sampled_from(["high", "normal", "low", "urgent"]),
    "template": st.none() | st.text(max_size=70) | st.sampled_from(["poster", "avatar", "wallpaper"]),
    "values": st.dictionaries(st.sampled_from(["product", "style", "prompt", "x", ""]), st.text(max_size=20)),
    "deadline_s": st.floats(-1, 90_000),
    "reject_if_late": st.booleans(),
    "webhook": hooks | st.none(),
    "metadata": st.dictionaries(st.text(max_size=70), st.text(max_size=20), max_size=18),
}
assert plausible.keys() == GenerateRequest.model_fields.keys()
field = st.sampled_from(sorted(plausible)).flatmap(lambda name: st.tuples(st.just(name), plausible[name] | anything))
bodies = st.lists(field, max_size=6).map(dict).map(lambda body: {"prompt": "x"} | body) | anything

# What the simulated model takes

readable = st.characters(codec="utf-8", exclude_characters="\x00\ufffd")
prompts = st.text(readable, min_size=1, max_size=200).filter(str.strip)
sides = st.integers(1, 64).map(lambda k: 16 * k)
plain = st.fixed_dictionaries(
    {"prompt": prompts, "model": st.just("simulated")},
    optional={
        "negative_prompt": st.none() | st.text(readable, max_size=50),
        "width": sides,
        "height": sides,
        "steps": st.integers(1, 50),
        "guidance_scale": st.floats(0, 20) | st.integers(0, 20),
        "cfg_normalization": st.floats(0, 10),
        "cfg_truncation": st.floats(0, 1),
        "preview": st.booleans(),
        "seed": st.integers(0, SEED_MAX - 7),
        "n": st.integers(1, 8),
        "format": st.sampled_from(["webp", "png", "jpeg"]),
        "quality": st.integers(1, 100),
        "priority": st.sampled_from(["high", "normal", "low"]),
        "deadline_s": st.floats(60, 86_400) | st.integers(60, 86_400),
        "template": st.sampled_from(["avatar", "wallpaper", "ancient-style"]),  # these have a place for the prompt
        "metadata": st.dictionaries(st.text(readable, min_size=1, max_size=64), st.text(readable), max_size=16),
    },
)
one = st.lists(whole, min_size=1, max_size=1)
beside = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"init_image": one}, optional={"mask_image": one}),
    st.fixed_dictionaries({"control_image": one}),
    st.fixed_dictionaries({"reference_images": st.lists(whole, min_size=1, max_size=4)}),
)
right = st.tuples(plain, beside)  # the fields, and the files of its pictures by field


def as_json(fields: dict[str, Any], pictures: dict[str, list[bytes]]) -> dict[str, Any]:
    """A body with its pictures in base64."""
    texts = {name: [base64.b64encode(data).decode() for data in found] for name, found in pictures.items()}
    return fields | {name: found if name == "reference_images" else found[0] for name, found in texts.items()}


# … and how it may go wrong


@st.composite
def spoilt_bodies(draw: st.DrawFn) -> Any:
    """A right body in which one to three places have been removed, replaced, repeated, renamed, or put deeper."""
    body: Any = copy.deepcopy(as_json(*draw(right)))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(body))
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(["remove", "replace", "repeat", "rename", "wrap", "huge"])):
            case "remove":
                del holder[key]
            case "replace":
                holder[key] = draw(anything)
            case "repeat":
                holder[key] = [holder[key]] * draw(st.integers(0, 40))
            case "rename" if isinstance(holder, dict):
                holder[draw(st.text(max_size=12) | st.sampled_from(sorted(plausible)))] = holder.pop(key)
            case "huge":
                holder[key] = draw(st.sampled_from([10**400, -(2**63), 1e308, "x" * 16_001, "\ud800", "\x00"]))
            case _:
                holder[key] = {key: holder[key]}
    return body


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place in a JSON value: what holds it, and under which key or number."""
    if isinstance(node, dict | list):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            yield node, key
            yield from _places(node[key])
