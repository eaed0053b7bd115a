"""Which models are in memory, when they come, and when they go."""

from __future__ import annotations

import time

import pytest
from structlog.testing import capture_logs

from common.errors import DeviceFailed, ModelLoadFailed, OutOfMemory
from common.models import BUILT_IN, Catalogue
from tests.unit.worker.fleet_of_models import Made, catalogue, device
from worker import residency as module
from worker.pipelines import simulated
from worker.pipelines.base import MIB, ImageRequest, Tuning
from worker.residency import Residency


def told(logs: list[dict[str, object]], event: str, *fields: str) -> list[tuple[object, ...]]:
    return [tuple(line[name] for name in fields) for line in logs if line["event"] == event]


def use(residency: Residency, *models: str) -> None:
    for model in models:
        assert residency.acquire(model) is not None
        residency.release(model)


def picture(side: int = 64, prompt: str = "x") -> ImageRequest:
    return ImageRequest(prompt=prompt, width=side, height=side, steps=1, guidance_scale=0.0, seed=1)


def test_the_first_model_is_loaded_ahead_and_others_on_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    world, changes = device(monkeypatch, load_s=0.02), list[int]()
    residency = Residency(catalogue("a", "b", "c"), device="cpu", changed=lambda: changes.append(1))
    with capture_logs() as logs:
        residency.prewarm()
        assert (residency.loaded, residency.offered) == (("a",), ("a", "b", "c"))
        assert residency.acquire("a") == 0.0
        first, again = residency.acquire("b"), residency.acquire("b")
    assert first is not None and first >= 0.02
    assert (again, world.loads, len(changes)) == (0.0, ["a", "b"], 2)
    assert told(logs, "model_loaded", "model", "cause", "bytes", "source") == [
        ("a", "prewarm", 100 * MIB, "builtin"),
        ("b", "first_use", 100 * MIB, "builtin"),
    ]
    assert all(duration >= 20 for (duration,) in told(logs, "model_loaded", "duration_ms"))  # type: ignore[operator]


def test_an_idle_model_leaves_unless_it_is_to_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch)
    residency = Residency(catalogue("a", "b", "c"), device="cpu", idle_s=0.05)
    residency.prewarm()
    use(residency, "b")
    residency.acquire("c")
    assert residency.idle() == []
    time.sleep(0.06)
    assert residency.idle() == ["b"], "a is kept, and c is in use"
    with capture_logs() as logs:
        residency.unload("b", "idle")
        use(residency, "b")
    assert told(logs, "model_unloaded", "model", "cause", "bytes", "left") == [("b", "idle", 100 * MIB, 0)]
    assert told(logs, "model_loaded", "model", "cause") == [("b", "again")]
    residency.release("c")
    time.sleep(0.06)
    assert sorted(residency.idle()) == ["b", "c"]


def test_the_one_not_used_for_longest_makes_room_and_never_one_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch)
    residency = Residency(catalogue("a", "b", "c", "d"), device="cpu", max_resident=2)
    residency.prewarm()
    use(residency, "b")
    use(residency, "a")
    use(residency, "c")
    assert residency.loaded == ("a", "c")
    assert residency.acquire("a") == 0.0
    use(residency, "d")
    assert residency.loaded == ("a", "d")
    assert residency.acquire("d") == 0.0
    assert residency.acquire("b") is None, "both are in use"
    residency.release("a")
    assert residency.acquire("b") is not None
    assert residency.loaded == ("d", "b")
    assert residency.swapped_at > time.monotonic() - 1


def test_no_more_stay_than_the_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch)
    residency = Residency(catalogue("a", "b", "c", memory_mb=400), device="cuda", memory_mb=900)
    residency.prewarm()
    use(residency, "b")
    assert residency.loaded == ("a", "b")
    use(residency, "c")
    assert residency.loaded == ("b", "c")
    too_large = Residency(catalogue("a", memory_mb=1000), device="cuda", memory_mb=900)
    too_large.prewarm()
    assert too_large.loaded == ("a",), "one that is alone is tried"


def test_a_model_that_says_nothing_of_its_size_counts_by_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch)
    residency = Residency(catalogue("a", "b"), device="cuda", memory_mb=150)
    use(residency, "a", "b")
    assert residency.loaded == ("b",), "100 MiB each, as was seen once the second was there"
    use(residency, "a")
    assert residency.loaded == ("a",)


def test_out_of_memory_in_a_load_makes_room_and_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    world = device(monkeypatch, memory_mb=250)
    residency = Residency(catalogue("a", "b", "c"), device="cuda")
    residency.prewarm()
    use(residency, "b", "c")
    assert (residency.loaded, world.loads) == (("c",), ["a", "b", "c", "c"])


def test_what_does_not_fit_beside_models_in_use_waits_without_being_tried_at_every_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = device(monkeypatch, memory_mb=150)
    residency = Residency(catalogue("a", "b"), device="cuda")
    residency.acquire("a")
    assert [residency.acquire("b") for _ in range(3)] == [None] * 3
    assert world.loads == ["a", "b"]
    residency.release("a")
    assert residency.acquire("b") is not None
    assert residency.loaded == ("b",)


def test_what_does_not_fit_alone_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, memory_mb=150, weights_mb={"b": 200})
    residency = Residency(catalogue("a", "b"), device="cuda")
    residency.prewarm()
    with pytest.raises(ModelLoadFailed, match="not enough GPU memory"):
        residency.acquire("b")


def test_a_model_that_fails_is_left_out_for_longer_and_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    world = device(monkeypatch, broken={"b": RuntimeError("half a file")})
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(module, "LONGEST_PAUSE_S", 0.15)
    residency = Residency(catalogue("a", "b"), device="cpu")
    residency.prewarm()
    with capture_logs() as logs:
        for pause_s in (0.05, 0.1, 0.15):
            for _ in range(2):  # the second time it is not even tried
                with pytest.raises(ModelLoadFailed, match="b from builtin cannot be loaded: half a file"):
                    residency.acquire("b")
                assert residency.offered == ("a",)
            time.sleep(pause_s + 0.01)
            assert residency.offered == ("a", "b")
    assert told(logs, "model_load_failed", "model", "again_in_s") == [("b", 0.05), ("b", 0.1), ("b", 0.15)]
    assert world.loads == ["a", "b", "b", "b"]
    del world.broken["b"]
    use(residency, "b")
    assert residency.offered == ("a", "b")


def test_a_device_that_fails_is_no_model_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, broken={"a": DeviceFailed("gone")})
    with pytest.raises(DeviceFailed):
        Residency(catalogue("a"), device="cuda").prewarm()


def test_a_model_that_leaks_is_told_and_none_is_loaded_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, leaks_mb={"a": 5, "b": 4})
    residency = Residency(catalogue("a", "b", "c"), device="cuda", max_resident=1, keep=())
    with capture_logs() as logs:
        use(residency, "b", "a")
        assert not residency.leaked, "less than 5 % is nothing"
        assert residency.acquire("c") is None
    assert residency.leaked
    assert told(logs, "unload_leaked", "model", "bytes", "left") == [("a", 100 * MIB, 5 * MIB)]


def test_a_residue_is_told_once_and_the_level_follows_models(monkeypatch: pytest.MonkeyPatch) -> None:
    world = device(monkeypatch)
    residency = Residency(catalogue("a", "b"), device="cuda")
    residency.prewarm()
    with capture_logs() as logs:
        world.used_mb += 3
        residency.settle("a", {})
        use(residency, "b")
        residency.settle("b", {})
        world.used_mb += 4
        residency.settle("b", {})
        residency.settle("b", {})
        residency.unload("b", "idle")
        residency.settle("a", {})
    assert told(logs, "memory_residue", "model", "bytes", "percent") == [("b", 7 * MIB, 3.5)]
    assert residency.counters() == {
        "models_loaded_total": 2,
        "models_unloaded_total": 1,
        "memory_residues": 1,
        "pictures": 2.0,
        "kept_bytes": 0.0,
    }


def test_what_pictures_being_made_may_take_is_no_residue(monkeypatch: pytest.MonkeyPatch) -> None:
    world = device(monkeypatch, peak_mb=20)
    residency = Residency(catalogue("a", "b"), device="cuda")
    residency.prewarm()
    with capture_logs() as logs:
        world.used_mb += 42
        residency.settle("a", {"a": [picture()] * 2, "b": []})
        world.used_mb += 18
        residency.settle("a", {"a": [picture()] * 2, "b": []})
        residency.settle("a", {"a": [picture()] * 2, "b": []})
        world.used_mb -= 35
        residency.settle("a", {})
        residency.settle("a", {})
    assert told(logs, "memory_residue", "bytes") == [(20 * MIB,), (5 * MIB,)], "25 MiB in all were left"


def test_counters_may_be_asked_for_while_a_model_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch)
    residency = Residency(catalogue("a"), device="cpu")
    use(residency, "a")

    class Slow(float):
        """A count that a thread adds up just as the other lets a model go."""

        def __radd__(self, other: float) -> float:
            residency.unload("a", "idle")
            return other + 1

    residency._past = {"counted before": Slow()}
    monkeypatch.setattr(Made, "counters", lambda _: {"never counted so far": 1.0})
    assert residency.counters()["counted before"] == 1
    assert residency.loaded == ()


def test_a_picture_is_begun_only_where_its_estimate_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, peak_mb=200)
    residency = Residency(catalogue("a", "b"), device="cpu", memory_mb=600, tuning=Tuning(embeds_bytes=0))
    residency.acquire("a")
    use(residency, "b")
    assert residency.fits("a", [picture()] * 2)
    assert residency.loaded == ("a", "b")
    assert not residency.fits("a", [picture()] * 3)
    assert residency.fits("a", [picture(128)]), "b, which nobody uses, has made room"
    assert residency.loaded == ("a",)
    with pytest.raises(OutOfMemory, match=r"about 600 MiB, and of this worker's 600 MiB .* model a leaves 500"):
        residency.fits("a", [picture(192)])
    assert 64 * 64 < residency.largest["a"] < 192 * 192
    assert residency.largest.keys() == {"a", "b"}, "and stays known"
    nobody_knows = Residency(catalogue("a"), device="cpu")
    use(nobody_knows, "a")
    assert nobody_knows.fits("a", [picture(2048)])


def test_what_is_kept_for_later_is_reckoned_with_and_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    world = device(monkeypatch, peak_mb=100)
    residency = Residency(catalogue("a", "b"), device="cpu", memory_mb=600)
    residency.acquire("a"), residency.acquire("b")
    world.kept_mb = {"a": 60, "b": 90}
    assert residency.fits("a", [picture()] * 2)
    assert world.kept_mb == {"a": 60, "b": 90}
    residency.release("b")
    assert residency.fits("a", [picture()] * 3)
    assert (world.kept_mb, residency.loaded) == ({}, ("a", "b")), "rather than a model that would be loaded anew"
    world.kept_mb = {"a": 60}
    residency.acquire("b")
    assert not residency.fits("a", [picture()] * 5)
    assert world.kept_mb == {"a": 60}, "it would not be enough"
    monkeypatch.setattr(Made, "evict", lambda _: None)
    assert not residency.fits("a", [picture()] * 4), "a run holds it"


def test_a_picture_does_not_push_out_a_model_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, peak_mb=450)
    residency = Residency(catalogue("a", "b"), device="cpu", memory_mb=600, tuning=Tuning(embeds_bytes=0))
    residency.acquire("a"), residency.acquire("b")
    assert not residency.fits("a", [picture()])
    residency.release("b")
    assert residency.fits("a", [picture()])


def test_models_are_kept_as_far_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    world = device(monkeypatch)
    residency = Residency(catalogue("a", "b", "c"), device="cpu", keep=("b", "c"), max_resident=1)
    residency.prewarm()
    assert world.loads == ["b"]


@pytest.fixture
def fail_to_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model called `bad` is out of memory at its first picture."""

    def warm(pipeline: simulated.Pipeline, sizes: object) -> None:
        if pipeline.spec.name == "bad":
            raise OutOfMemory("no memory left")

    monkeypatch.setattr(simulated.Pipeline, "warm", warm)


@pytest.mark.usefixtures("fail_to_warm")
def test_a_model_that_cannot_make_one_picture_is_left_out() -> None:
    residency = Residency(catalogue("bad", "good"), device="cpu")
    residency.prewarm()
    assert (residency.loaded, residency.offered) == (("good",), ("good",))


@pytest.mark.usefixtures("fail_to_warm")
def test_with_no_model_left_there_is_no_worker() -> None:
    with pytest.raises(ModelLoadFailed, match="bad from builtin cannot be loaded: no memory left"):
        Residency(catalogue("bad"), device="cpu").prewarm()


def test_a_model_is_warmed_for_the_sizes_that_it_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[object] = []
    monkeypatch.setattr(simulated.Pipeline, "warm", lambda _, sizes: warmed.append(sizes))
    spec = catalogue("a")["a"].model_copy(update={"min_side": 16, "max_side": 512, "max_pixels": 256 * 512})
    sizes = [(256, 512), (512, 512), (1024, 64), (8, 64), (64, 72)]
    Residency(Catalogue([spec]), device="cpu", warm_sizes=sizes).prewarm()
    assert warmed == [[(256, 512)]]


@pytest.mark.usefixtures("one_thread")
def test_a_real_model_twice_leaves_nothing_behind() -> None:
    """Pico under two names: loaded on first use, let go to make room, loaded again, and another is not touched."""
    pico = next(spec for spec in BUILT_IN if spec.name == "pico")
    models = Catalogue([pico.model_copy(update={"name": name}) for name in ("one", "two")])
    residency = Residency(models, device="cpu", max_resident=1)
    residency.prewarm()
    with capture_logs() as logs:
        for model in ("two", "one", "two"):
            use(residency, model)
            pipeline = residency.pipeline(model)
            run = pipeline.start(picture(64, "a red circle"))
            pipeline.step([run])
            assert pipeline.finish(run).shape == (64, 64, 3)
            pipeline.discard(run)
            del run, pipeline
    assert told(logs, "model_unloaded", "model", "left") == [("one", 0), ("two", 0), ("one", 0)]
    assert not residency.leaked
