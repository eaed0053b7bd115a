"""Instruction editing: with reference pictures and without, an Omni checkpoint makes what the stock call makes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from common.errors import PipelineFailed
from tests.miniatures import PICO, omni_checkpoint
from tests.unit.worker.zimage.drawing import mixes, steady
from tests.unit.worker.zimage.driving import (
    NOTICED,
    PROMPT,
    TOLERANCE,
    Floats,
    Visit,
    ask,
    change,
    counted,
    difference,
    load,
    masked,
    painted,
    together,
)
from tests.unit.worker.zimage.stock import OmniStock
from worker.pipelines.base import ImageRequest
from worker.pipelines.zimage import Pipeline
from worker.zimage.omni import References, check_room
from worker.zimage.prompts import omni_pieces

ONE = (painted(1),)
THREE = (painted(1), painted(2, width=70, height=97), painted(3, width=64))


@dataclass
class Both:
    """One Omni checkpoint in the batched pipeline and in the stock one."""

    pipeline: Pipeline
    stock: OmniStock

    def pictures(self, *requests: ImageRequest) -> list[Floats]:
        runs = together(self.pipeline, [Visit(request) for request in requests])
        return [self.stock.decode(run.latents) for run in runs]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Both:
    spec = omni_checkpoint(tmp_path_factory.mktemp("omni") / "checkpoint")
    made = Both(load(spec), OmniStock(spec))
    made.stock.share_vae(made.pipeline)
    return made


@pytest.mark.timeout(300)
@settings(steady, max_examples=24)
@given(visits=mixes("edit", "edit", "text"))
def test_in_any_company_a_picture_equals_the_stock_call(both: Both, visits: list[Visit]) -> None:
    for visit, run in zip(visits, together(both.pipeline, visits), strict=True):
        if run.captions:
            expected = both.stock.picture(visit.request)
            assert difference(both.stock.decode(run.latents), expected) <= TOLERANCE, visit


@pytest.mark.parametrize("references", [(), ONE, THREE], ids=len)
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_a_picture_made_alone_equals_the_stock_call(
    both: Both, references: tuple[np.ndarray, ...], guidance: float
) -> None:
    request = ask(reference_images=references, guidance_scale=guidance, cfg_normalization=0.9, cfg_truncation=0.4)
    assert difference(both.pictures(request)[0], both.stock.picture(request)) <= TOLERANCE


@pytest.mark.parametrize("size", [(64, 64), (65, 79), (512, 64), (1024, 1024), (1025, 1024), (1300, 900)])
def test_a_reference_of_any_size_equals_the_stock_call(both: Both, size: tuple[int, int]) -> None:
    """Past 1024 x 1024 pixels it is brought to the size of the picture asked for."""
    request = ask(steps=1, reference_images=(painted(1, width=size[0], height=size[1]),))
    assert difference(both.pictures(request)[0], both.stock.picture(request)) <= TOLERANCE


def test_every_condition_changes_the_picture(both: Both) -> None:
    made = both.pictures(
        ask(),
        ask(reference_images=ONE),
        ask(reference_images=(painted(2),)),
        ask(reference_images=THREE),
        ask(reference_images=THREE[::-1]),
        ask("a blue star", reference_images=ONE),
        ask(reference_images=ONE, guidance_scale=2.0),
    )
    for index, one in enumerate(made):
        for other in made[:index]:
            assert change(one, other) > NOTICED


@pytest.mark.parametrize("part", ["latents", "features"])
def test_both_what_the_vae_and_what_siglip_see_matter(both: Both, part: str) -> None:
    (expected,) = both.pictures(ask(steps=1, reference_images=ONE))
    run = both.pipeline.start(ask(steps=1, reference_images=ONE))
    references = run.references  # type: ignore[attr-defined]
    blind = tuple(torch.zeros_like(tensor) for tensor in getattr(references, part))
    run.references = references._replace(**{part: blind})  # type: ignore[attr-defined]
    both.pipeline.step([run])
    assert change(both.stock.decode(run.latents), expected) > NOTICED  # type: ignore[attr-defined]


def test_runs_share_a_forward_with_any_number_of_references_but_not_with_none(both: Both) -> None:
    visits = [
        Visit(ask(reference_images=ONE)),
        Visit(ask(reference_images=THREE, guidance_scale=2.0)),
        Visit(ask()),
        Visit(ask(steps=1, width=64)),
    ]
    with counted(both.pipeline._parts.transformer) as items:
        together(both.pipeline, visits)
    assert sorted(items[:2]) == [2, 3]
    assert sorted(items[2:]) == [1, 1, 3, 3]
    runs = [both.pipeline.start(visit.request) for visit in visits]
    with pytest.raises(ValueError, match="cannot share a step"):
        both.pipeline.step(runs)
    assert [run.step for run in runs] == [0, 0, 0, 0]


def test_references_go_with_a_picture_to_start_from(both: Both) -> None:
    """There is no stock call for both, so what is compared is company with being alone, and each with neither."""
    start = {"init_image": painted(3), "strength": 0.6, "mask_image": masked(3)}
    requests = [ask(**start, reference_images=ONE), ask(**start), ask(reference_images=ONE)]
    made = both.pictures(*requests)
    assert difference(made[0], both.pictures(requests[0])[0]) <= TOLERANCE
    assert all(change(made[0], other) > NOTICED for other in made[1:])


def test_a_cancelled_run_drops_its_references(both: Both) -> None:
    request = ask(reference_images=THREE, guidance_scale=2.0)
    gone, kept = together(both.pipeline, [Visit(request, 0, 1), Visit(request)])
    assert (gone.references, gone.captions, gone.negatives) == (None, (), ())
    assert difference(both.stock.decode(kept.latents), both.stock.picture(request)) <= TOLERANCE


def test_a_prompt_that_is_cut_is_told_once_and_equals_the_stock_call(both: Both) -> None:
    request = ask(PROMPT * 40, reference_images=THREE)
    (run,) = together(both.pipeline, [Visit(request)])
    assert [warning.split(" is ")[0] for warning in run.warnings] == ["The prompt"]
    assert max(len(piece) for piece in run.captions) == PICO.max_tokens
    assert difference(both.stock.decode(run.latents), both.stock.picture(request)) <= TOLERANCE


def test_each_reference_stands_between_two_pieces_and_so_does_the_answer() -> None:
    assert omni_pieces("paint", 0) == ("<|im_start|>user\npaint<|im_end|>\n<|im_start|>assistant\n",)
    for pictures in (1, 2, 4):
        text = "IMAGE".join(omni_pieces("paint", pictures))
        assert text.count("<|vision_start|>IMAGE<|vision_end|>") == pictures + 1
        assert text.endswith("paint<|im_end|>\n<|im_start|>assistant\n<|vision_start|>IMAGE<|vision_end|><|im_end|>")


@pytest.mark.parametrize("size", [(63, 64), (64, 63), (1024, 127)])
def test_a_reference_that_the_stock_call_refuses_is_refused(both: Both, size: tuple[int, int]) -> None:
    request = ask(reference_images=(painted(1, width=size[0], height=size[1]),))
    with pytest.raises(ValueError, match=r"too small|too extreme"):
        both.stock.picture(request)
    with pytest.raises(PipelineFailed, match=rf"{size[0]}x{size[1]} cannot be read; send one of at least 64 pixels"):
        both.pipeline.start(request)


def test_what_would_pass_the_position_tables_is_refused(both: Both) -> None:
    def piece(tokens: int) -> torch.Tensor:
        return torch.zeros(tokens, 1)

    axes_lens = (128, 32, 32)
    check_room(axes_lens, [piece(96)], None)  # positions 1 to 96
    check_room(axes_lens, [piece(29), piece(95)], None)  # 32 to 127, the last
    with pytest.raises(PipelineFailed, match="too long beside its reference pictures"):
        check_room(axes_lens, [piece(30), piece(95)], None)
    for size, fits in (((32, 32), True), ((33, 16), False), ((16, 33), False)):
        references = References((torch.zeros(16, 1, *size),), ())
        if fits:
            check_room(axes_lens, [piece(1)], references)
            continue
        with pytest.raises(PipelineFailed, match="larger than 256x256"):
            check_room(axes_lens, [piece(1)], references)
    with pytest.raises(PipelineFailed, match="1040x640 is larger than 1024x1024"):
        both.pipeline.start(ask(reference_images=(painted(1, width=1040, height=640),)))
