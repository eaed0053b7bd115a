from __future__ import annotations

import dataclasses
import io
import math
import time
from typing import Any

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from common.broker import Broker
from common.errors import FleetError, InputGone, StorageError
from common.inputs import new_handle, storage_key
from common.settings import Settings
from common.storage import open_storage
from common.storage.base import BaseStorage
from tests.conftest import SubmitFn, resolved
from tests.samples import drawn, encoded
from tests.unit.worker.test_commit import held
from worker import inputs as module
from worker.commit import Committer
from worker.gpu_worker import GpuWorker
from worker.heartbeat import Heartbeat, Stage
from worker.inputs import Inputs
from worker.watchdog import Stall, stall


@pytest.fixture
def store(settings: Settings) -> BaseStorage:
    return open_storage(settings)


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITS_S", (0.0, 0.0))


def kept(store: BaseStorage, image: Image.Image | None = None) -> str:
    handle = new_handle("default")
    store.put(storage_key(handle), encoded(image))
    return handle


def test_pictures_have_the_size_of_what_is_made_but_for_references(store: BaseStorage) -> None:
    request = resolved(
        init_image=kept(store), mask_image=kept(store), control_image=kept(store, drawn(mode="L")),
        reference_images=(kept(store), kept(store, drawn(20, 10))), width=96, height=128,
    )  # fmt: skip
    found = Inputs(store).fetch(request)
    shapes = {field: [one.shape for one in several] for field, several in found.items()}
    assert shapes == {
        "init_image": [(128, 96, 3)], "mask_image": [(128, 96)], "control_image": [(128, 96, 3)],
        "reference_images": [(32, 48, 3), (10, 20, 3)],
    }  # fmt: skip
    assert {one.dtype for several in found.values() for one in several} == {np.dtype(np.uint8)}


def test_a_request_without_pictures_reads_nothing(store: BaseStorage) -> None:
    assert Inputs(store).fetch(resolved()) == {}


@pytest.mark.parametrize("size", [(96, 128), (48, 32), (32, 16)])
def test_it_resizes_as_the_stock_pipelines_do(store: BaseStorage, size: tuple[int, int]) -> None:
    mask = Image.new("L", (48, 32))
    mask.paste(255, (5, 3, 31, 23))
    request = resolved(init_image=kept(store), mask_image=kept(store, mask), width=size[0], height=size[1])
    found = Inputs(store).fetch(request)
    stock = VaeImageProcessor(vae_scale_factor=16).preprocess(drawn(), height=size[1], width=size[0])
    mine = found["init_image"][0].astype(np.float32).transpose(2, 0, 1) / 255 * 2 - 1
    assert np.abs(stock[0].numpy() - mine).max() < 1e-6
    binary = VaeImageProcessor(
        vae_scale_factor=16, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    ).preprocess(mask, height=size[1], width=size[0])
    assert np.array_equal(binary[0, 0].numpy(), (found["mask_image"][0].astype(np.float32) / 255 >= 0.5))


def test_a_picture_that_has_left_storage_is_told_by_its_field(store: BaseStorage) -> None:
    handle = kept(store)
    store.delete(storage_key(handle))
    kept(store)
    with pytest.raises(InputGone, match="init_image: the picture is no longer stored") as caught:
        Inputs(store).fetch(resolved(init_image=handle))
    assert (caught.value.code, caught.value.retryable) == ("input_gone", False)


@pytest.mark.parametrize(("failures", "fails"), [(1, False), (2, False), (3, True)])
def test_a_storage_that_fails_is_tried_three_times(
    store: BaseStorage, failures: int, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, read, left = kept(store), store.read, iter(range(failures))

    def flaky(key: str) -> bytes:
        for _ in left:
            raise StorageError("stale handle")
        return read(key)

    monkeypatch.setattr(store, "read", flaky)
    if fails:
        with pytest.raises(StorageError, match="stale"):
            Inputs(store).fetch(resolved(init_image=handle))
    else:
        assert Inputs(store).fetch(resolved(init_image=handle))["init_image"][0].shape == (64, 64, 3)


def test_each_try_at_each_picture_has_the_time_of_one(store: BaseStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    read, failures = store.read, iter([True, False, False, True, True, False])
    calls: list[str] = []

    def flaky(key: str) -> bytes:
        calls.append("read")
        if next(failures):
            raise StorageError("stale handle")
        return read(key)

    request = resolved(init_image=kept(store), reference_images=(kept(store), kept(store)))
    monkeypatch.setattr(store, "read", flaky)
    Inputs(store).fetch(request, lambda: calls.append("noted"))
    assert calls == ["noted", "read"] * 6


def test_a_damaged_picture_is_told(store: BaseStorage) -> None:
    handle = kept(store)
    store.put(storage_key(handle), encoded()[:100])
    with pytest.raises(StorageError, match="init_image: the stored picture is damaged"):
        Inputs(store).fetch(resolved(init_image=handle))


def test_the_pipeline_is_given_what_was_fetched(broker: Broker, store: BaseStorage, submit: SubmitFn) -> None:
    handles = {"init_image": kept(store), "mask_image": kept(store), "reference_images": (kept(store),)}
    submit(**handles, strength=0.5, seed=7, n=2, cfg_normalization=1.5, cfg_truncation=0.75, control_scale=0.25)
    task = held(broker)
    task.inputs = Inputs(store).fetch(task.claimed.request)
    asked = task.image_request(1)
    assert (asked.seed, asked.strength, asked.control_scale, asked.control_image) == (8, 0.5, 0.25, None)
    assert (asked.cfg_normalization, asked.cfg_truncation) == (1.5, 0.75)
    assert asked.init_image is task.inputs["init_image"][0]
    assert asked.mask_image is not None and asked.mask_image.shape == (64, 64)
    assert asked.reference_images == tuple(task.inputs["reference_images"])
    task.inputs = {}
    assert task.image_request(0).init_image is None


# In a worker


@pytest.fixture
def worker(settings: Settings) -> Any:
    worker = GpuWorker("w1", "cpu", settings, Heartbeat())  # its threads are not started
    yield worker
    worker.committer.close()


def take(worker: Any, broker: Broker) -> None:
    (claimed,) = broker.claim("w1", "cpu", ["simulated"], 9).tasks
    worker._take(claimed, time.monotonic())


def test_a_task_whose_picture_is_gone_ends_with_that_error(worker: Any, broker: Broker, submit: SubmitFn) -> None:
    kept(worker.results)
    task_id = submit(init_image=new_handle("default"))
    take(worker, broker)
    worker.committer.close()
    record = broker.view(task_id)
    assert record is not None and record.error is not None
    assert (record.status, record.error.code, record.error.retryable) == ("failed", "input_gone", False)
    assert (worker.held(), worker.engine.idle) == ([], True)


def test_whatever_goes_wrong_no_task_is_held_for_ever(
    worker: Any, broker: Broker, submit: SubmitFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(worker.preparer._inputs, "fetch", broken)
    task_id = submit(init_image=new_handle("default"))
    take(worker, broker)
    worker.committer.close()
    record = broker.view(task_id)
    assert record is not None and record.error is not None
    assert (record.status, record.error.code) == ("failed", "storage_error")
    assert worker.held() == []


def test_a_task_with_its_pictures_goes_to_the_engine(worker: Any, broker: Broker, submit: SubmitFn) -> None:
    submit(init_image=kept(worker.results))
    take(worker, broker)
    (task,) = worker.held()
    assert task.inputs["init_image"][0].shape == (64, 64, 3)
    assert not worker.engine.idle
    assert (worker.committer.standing_s(), worker.vitals.read().in_store) == (0.0, [])


def test_a_read_that_hangs_keeps_no_lease_alive_and_is_seen_by_the_supervisor(
    worker: Any, broker: Broker, submit: SubmitFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, float, object]] = []

    def hang(*_: object) -> dict[str, object]:
        (task,) = worker.held()
        before = worker._is_stuck(task)
        for begun in worker.committer._storing:
            worker.committer._storing[begun] -= worker.settings.step_limit_s + 1
        seen.append((before, worker.committer.standing_s(), worker._is_stuck(task)))
        reading = worker.vitals.read()
        assert reading.in_store == [task.in_hand] and reading.store_since < math.inf
        return {}

    monkeypatch.setattr(worker.preparer._inputs, "fetch", hang)
    submit(init_image=new_handle("default"))
    take(worker, broker)
    ((before, standing_s, stuck),) = seen
    assert (before, stuck) == (False, True)
    assert standing_s > worker.settings.step_limit_s


def overdue(worker: Any) -> None:
    """Let what is being read have begun too long ago."""
    for begun in worker.committer._storing:
        worker.committer._storing[begun] -= worker.settings.step_limit_s + 1


def test_a_folder_of_loras_that_hangs_keeps_no_lease_alive(
    worker: Any, broker: Broker, submit: SubmitFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def hang(*_: object) -> tuple[()]:
        (task,) = worker.held()
        assert worker.vitals.read().in_store == [task.in_hand]
        overdue(worker)
        seen.append(worker._is_stuck(task))
        return ()

    monkeypatch.setattr("worker.preparing.loras.resolve", hang)
    submit(loras=[{"name": "a", "scale": 1.0}])
    take(worker, broker)
    assert seen == [True]
    assert worker.committer.standing_s() == 0.0


def test_a_listing_of_loras_that_hangs_ends_the_worker_and_blames_no_task(
    worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []

    def hang(_: object) -> tuple[str, ...]:
        reading = worker.vitals.read()
        late = dataclasses.replace(reading, store_since=reading.store_since - worker.settings.step_limit_s - 1)
        seen.extend((reading.in_store, stall(reading, worker.settings), stall(late, worker.settings)))
        return ("a",)

    monkeypatch.setattr("worker.preparing.loras.available", hang)
    worker.vitals.at(Stage.IDLE)
    worker.preparer.look()
    assert seen == [[], None, Stall("store_limit", blame=False)]
    assert (worker.preparer.loras, worker.committer.standing_s()) == (("a",), 0.0)
    assert worker.vitals.read().store_since == math.inf


def test_a_further_read_begins_anew(broker: Broker, settings: Settings, submit: SubmitFn) -> None:
    submit()
    committer = Committer("w1", broker, open_storage(settings), committed=lambda _: None)
    with committer.reading(held(broker)) as another:
        time.sleep(0.05)
        before = committer.standing_s()
        another()
        assert committer.standing_s() < 0.05 <= before
    committer.close()


def test_reading_ends_however_it_ends(broker: Broker, settings: Settings, submit: SubmitFn) -> None:
    submit()
    task = held(broker)
    committer = Committer("w1", broker, open_storage(settings), committed=lambda _: None)
    with pytest.raises(FleetError), committer.reading(task):
        raise StorageError("gone")
    assert committer.standing_s() == 0.0
    committer.close()


def test_a_stored_picture_is_what_the_gateway_makes_of_a_file(store: BaseStorage) -> None:
    """Both sides of the seam at once: a photo that lies on its side, in CMYK, larger than asked for."""
    from gateway.pictures import canonical

    exif = Image.Exif()
    exif[0x0112] = 6
    source = drawn(64, 96).transpose(Image.Transpose.ROTATE_90)
    made = canonical(encoded(source.convert("CMYK"), "JPEG", exif=exif, quality=95), 1 << 20)
    handle = new_handle("default")
    store.put(storage_key(handle), made.png)
    (found,) = Inputs(store).fetch(resolved(init_image=handle, width=32, height=48))["init_image"]
    expected = np.asarray(drawn(64, 96).resize((32, 48), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(found.astype(int) - expected).mean() < 5
    assert Image.open(io.BytesIO(made.png)).mode == "RGB"
