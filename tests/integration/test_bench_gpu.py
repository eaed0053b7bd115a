"""The GPU's bench in miniature on the CPU: the same code, so that it runs at once where a GPU is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import gpu, gpu_cases, gpu_models, gpu_report
from bench.flops import dit_flops
from bench.gpu_makers import Made, StepBatches, StockCalls
from bench.gpu_models import FULL, TINY, Models
from common.errors import OutOfMemory

ROOT = Path(__file__).parents[2]
TINY_CASES = (
    "64 × 64, 1 at a time",
    "64 × 64, 8 at a time",
    "128 × 128, 1 at a time",
    "128 × 128, 8 at a time",
    "mixed 64 to 192, 8 at a time",
)
DEEP = gpu_models.Shape(  # as many layers as the real networks have, each of them narrow
    transformer=dict(TINY.transformer) | {"n_layers": 30, "n_refiner_layers": 2},
    text_encoder=dict(TINY.text_encoder) | {"num_hidden_layers": 36},
    vae=dict(TINY.vae) | {"layers_per_block": 2},
)


def quiet(text: str) -> None:
    """Say nothing."""


def made(shape: gpu_models.Shape = TINY, *, seed: int = 1, dtype: torch.dtype = torch.float32) -> Models:
    return gpu_models.make(shape, device="cpu", dtype=dtype, seed=seed, say=quiet)


def figures(value: Any) -> Iterator[float]:
    """Every number under this value, however deep."""
    if isinstance(value, dict):
        for each in value.values():
            yield from figures(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


# The arithmetic


@pytest.mark.parametrize(("rows", "columns", "caption"), [(8, 8, 1), (16, 12, 32), (24, 24, 33), (32, 8, 100)])
def test_the_formula_counts_what_torch_counts(rows: int, columns: int, caption: int) -> None:
    transformer = made().transformer
    latents, text = torch.randn(16, 1, rows, columns), torch.randn(caption, 64)
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), counter:
        transformer([latents], torch.tensor([0.5]), [text])
    assert dit_flops(transformer.config, rows=rows, columns=columns, caption=caption) == counter.get_total_flops()


def test_eight_steps_of_the_full_size_take_as_much_as_is_known_of_it() -> None:
    config = gpu_models.skeletons(FULL)["transformer"].config
    large, small = (8 * dit_flops(config, rows=side, columns=side, caption=32) / 1e12 for side in (128, 64))
    assert large == pytest.approx(441, rel=0.01)
    assert small == pytest.approx(100, rel=0.01)


# The networks


def test_the_full_size_has_as_many_parameters_as_the_real_model() -> None:
    skeletons = gpu_models.skeletons(FULL)
    assert all(weight.is_meta for network in skeletons.values() for weight in network.parameters())
    counts = {name: gpu_models.count(network) for name, network in skeletons.items()}
    assert counts["transformer"] == pytest.approx(6.155e9, abs=0.01e9)
    assert counts["text_encoder"] == pytest.approx(4.02e9, abs=0.01e9)
    assert counts["vae"] == pytest.approx(83.8e6, abs=0.1e6)


def test_a_seed_means_the_same_weights() -> None:
    first, again, other = (made(seed=seed) for seed in (1, 1, 2))
    for name in gpu_models.NETWORKS:
        mine, same, unlike = (dict(getattr(each, name).named_parameters()) for each in (first, again, other))
        assert all(torch.equal(weight, same[key]) for key, weight in mine.items())
        assert not all(torch.equal(weight, unlike[key]) for key, weight in mine.items())


def test_nothing_is_left_on_the_meta_device_and_the_rotary_frequencies_are_right() -> None:
    models = made(dtype=torch.bfloat16)
    for name in gpu_models.NETWORKS:
        network = getattr(models, name)
        assert not any(tensor.is_meta for tensor in [*network.parameters(), *network.buffers()])
        assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}
    width, theta = 16, 1e6  # of a head, and the base
    expected = theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    torch.testing.assert_close(models.text_encoder.rotary_emb.inv_freq, expected)


def test_as_deep_as_the_real_networks_they_make_pictures_that_are_neither_flat_nor_broken() -> None:
    ours = StepBatches(made(DEEP, dtype=torch.bfloat16).parts(), device="cpu")
    case = gpu_cases.Case(name="deep", number=0, sides=(64, 64), together=2, repeats=1)
    found = ours.make(case.requests(1), case.together)
    for picture, latents in zip(found.pictures, found.latents, strict=True):
        assert picture.std() > 10
        assert 0.3 < float(latents.std()) < 3
    assert gpu_cases.psnr_db(*found.pictures) < 20, "another seed, another picture"


def test_the_text_encoder_that_ends_early_has_the_same_layers() -> None:
    models = made()
    tokens = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        whole = models.text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
        early = models.parts().text_encoder(tokens).last_hidden_state
    assert torch.equal(whole, early)
    weights = {weight.data_ptr() for weight in models.text_encoder.parameters()}
    assert {weight.data_ptr() for weight in models.parts().text_encoder.parameters()} < weights


# The command


def test_the_miniature_measures_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--tiny", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    assert found["complete"] and found["tiny"] and path.name.endswith("-gpu-tiny.json")
    assert found["command"].startswith("python -m bench.gpu --tiny")
    assert found["packages"]["torch"] and found["packages"]["diffusers"] and found["date"]
    printed = capsys.readouterr()
    cases = {(each["case"], each["maker"]): each for each in found["cases"] if "maker" in each}
    assert list(cases) == [(name, maker) for name in TINY_CASES for maker in ("zfleet", "stock")]
    for (name, maker), case in cases.items():
        assert all(math.isfinite(figure) and figure > 0 for figure in figures(case)), case
        assert case["peak_gib"] is None, "a CPU does not tell"
        if not name.startswith("mixed"):
            assert case["forwards"] == 8
            assert case["items_per_forward"]["min"] == case["items_per_forward"]["max"] == case["images"]
        assert f"| {name} | {maker} |" in printed.out
        assert f"{name}, {maker}, warm-up" in printed.err
    mixed = cases[TINY_CASES[-1], "zfleet"]
    assert mixed["items_per_forward"]["min"] < mixed["items_per_forward"]["max"], "admitted one by one"
    assert all(figure > 0 for figure in figures(found["emptying"]))


def test_ours_draws_what_the_stock_pipeline_draws() -> None:
    models = made()
    case = gpu_cases.Case(name="mixed", number=0, sides=(64, 96, 64), together=2, repeats=1)
    ours, stock = (
        maker.make(case.requests(1), case.together)
        for maker in (StepBatches(models.parts(), device="cpu"), StockCalls(models))
    )
    found = gpu_cases.difference(ours, stock)
    assert found["latents_relative"] <= 1e-5
    assert found["psnr_db"] is None or found["psnr_db"] > 60
    assert found["psnr_of_other_seeds_db"] < 20


def test_no_two_prompts_of_a_run_are_the_same() -> None:
    prompts = [
        request.prompt
        for case in gpu_cases.cases(gpu.FULL)
        for repeat in range(case.repeats + 1)
        for request in case.requests(repeat)
    ]
    assert len(prompts) == len(set(prompts))


def test_the_mixed_load_has_its_shares_in_an_order_of_its_own() -> None:
    sides = gpu_cases.mix(20, 1)
    assert {side: sides.count(side) for side in sides} == {512: 3, 768: 5, 1024: 9, 1536: 3}
    assert sides == gpu_cases.mix(20, 1) != tuple(sorted(sides))


def test_without_a_gpu_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and "CUDA" in told and "--tiny" in told


def test_a_gpu_that_is_too_small_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (16 << 30, 16 << 30))
    assert gpu.main(["--quick"]) == 2
    told = capsys.readouterr().err
    assert "16.0 GiB" in told and "21.1" in told


class Greedy(StockCalls):
    """Has no memory for more than one picture."""

    def make(self, requests: Any, together: int) -> Made:
        if together > 1:
            raise OutOfMemory("too many")
        return super().make(requests, together)


def test_a_case_that_does_not_fit_is_told_and_the_others_go_on() -> None:
    models = made()
    case = gpu_cases.Case(name="two", number=0, sides=(64, 64), together=2, repeats=1)
    parts = models.parts()
    makers = (StepBatches(parts, device="cpu"), Greedy(models))
    with gpu.metered(models, parts, "cpu") as meter:
        found = list(gpu_cases.measure(case, makers, meter, device="cpu", say=quiet))
    assert [each["maker"] for each in found] == ["zfleet", "stock"]
    assert found[0]["forwards"] == 8 and found[1]["error"] == "out of memory: too many"
    assert "| two | stock | out of memory" in gpu_report.table(found, 1.0)


def test_interrupted_it_writes_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = gpu_cases.measure

    def until_second(case: gpu_cases.Case, *args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        if case.number:
            raise KeyboardInterrupt
        return measured(case, *args, **kwargs)

    monkeypatch.setattr(gpu_cases, "measure", until_second)
    assert gpu.main(["--tiny", "--out", str(tmp_path)]) == 130
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text("utf-8"))
    assert path.name.endswith("-gpu-tiny-incomplete.json") and not found["complete"]
    assert {each["case"] for each in found["cases"]} == {TINY_CASES[0]}


def test_a_miniature_writes_no_results_of_its_own_accord(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "measure", lambda *args, **kwargs: iter([{"matmul": {"tflop_per_s": 1.0}, "cases": []}]))
    assert gpu.main(["--tiny"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_page_of_measurements_has_the_table_that_is_printed() -> None:
    head = "| " + " | ".join(gpu_report.HEAD) + " |"
    assert head in (ROOT / "docs" / "measurements.md").read_text("utf-8")


def test_psnr() -> None:
    black, grey = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 51, np.uint8)
    assert gpu_cases.psnr_db(black, grey) == pytest.approx(20 * math.log10(5))
    assert gpu_cases.psnr_db(grey, grey) == math.inf
