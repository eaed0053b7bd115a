"""What hypothesis draws: requests in every mode, and their comings and goings."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from tests.unit.worker.zimage.driving import PROMPT, Visit, ask, masked, painted
from worker.pipelines.base import ImageRequest

# The same examples on every machine, however busy. None is shrunk: that takes minutes, and a mix is readable as it is.
steady = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)

PROMPTS = (PROMPT, "左边红色圆形，右边绿色正方形，灰色背景", "🦊🌈 👩‍👩‍👧 im Schnee", "", "a" * 300)
NEGATIVES = (None, "", "blurry, grey", "模糊")
REFERENCES = ((64, 64), (97, 70), (66, 131))  # width x height


@st.composite
def requests(draw: st.DrawFn, *modes: str) -> ImageRequest:
    """Draw a request in one of these modes: small, with few steps, a third of them guided."""
    mode = draw(st.sampled_from(modes))
    size = {"width": draw(st.sampled_from((64, 80, 96, 128))), "height": draw(st.sampled_from((64, 96, 112)))}
    steps, seed = draw(st.sampled_from((1, 2, 3, 4, 6))), draw(st.integers(0, 2**32))
    return ask(
        draw(st.sampled_from(PROMPTS)),
        **size,
        steps=steps,
        seed=seed,
        **(draw(guidance()) if draw(st.integers(0, 2)) == 0 else {}),
        **draw(conditions(mode, size)),
    )


@st.composite
def guidance(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "guidance_scale": draw(st.sampled_from((0.7, 2.0, 4.0))),
        "negative_prompt": draw(st.sampled_from(NEGATIVES)),
        "cfg_normalization": draw(st.sampled_from((0.0, 0.9, 1.2))),
        "cfg_truncation": draw(st.sampled_from((1.0, 0.4, 0.1))),
    }


@st.composite
def conditions(draw: st.DrawFn, mode: str, size: dict[str, int]) -> dict[str, Any]:
    """Draw what a request in this mode has beside its prompt."""
    look = draw(st.integers(0, 9))
    if mode == "control":
        return {"control_image": painted(look, **size), "control_scale": draw(st.sampled_from((0.2, 0.5, 0.75)))}
    if mode == "edit":
        sizes = draw(st.lists(st.sampled_from(REFERENCES), min_size=1, max_size=3))
        looks = [painted(look + index, width=wide, height=high) for index, (wide, high) in enumerate(sizes)]
        return {"reference_images": tuple(looks)}
    if mode == "text":
        return {}
    start = {"init_image": painted(look, **size), "strength": draw(st.sampled_from((0.05, 0.4, 0.6, 0.8, 1.0)))}
    return start | ({"mask_image": masked(look, **size)} if mode == "inpaint" else {})


def mixes(*modes: str) -> st.SearchStrategy[list[Visit]]:
    """Draw two to four requests in these modes that meet; some are cancelled on the way."""
    leaves = st.sampled_from((None, None, None, None, None, None, 0, 1, 2))
    return st.lists(st.builds(Visit, requests(*modes), st.integers(0, 3), leaves), min_size=2, max_size=4)
