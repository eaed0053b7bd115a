"""A checkpoint's weights come in as the libraries would load them, and one that is broken says where."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageControlNetModel, ZImagePipeline
from torch import nn
from transformers import Siglip2VisionModel

from common.errors import ModelLoadFailed
from tests.unit.worker.zimage import checkpoints
from tests.unit.worker.zimage.checkpoints import PICO, TEXT_ENCODER, TRANSFORMER, spec_of
from worker import pico
from worker.pipelines.base import ImageRequest
from worker.pipelines.zimage import Pipeline
from worker.zimage import residue, skeletons, sources, weights
from worker.zimage.parts import Parts, load_parts

pytestmark = pytest.mark.usefixtures("one_thread")


def stock_of(folder: Path) -> Any:
    return ZImagePipeline.from_pretrained(folder, local_files_only=True, dtype=torch.float32)


def assert_same_weights(mine: nn.Module, theirs: nn.Module, *, leaving_out: tuple[str, ...] = ()) -> None:
    """Assert that parameters and buffers, also those that are not stored, are bit by bit the same."""
    expected = {
        name: tensor
        for name, tensor in (*theirs.named_parameters(), *theirs.named_buffers())
        if not name.startswith(leaving_out or "?")
    }
    found = dict((*mine.named_parameters(), *mine.named_buffers()))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert not tensor.requires_grad, name
        assert torch.equal(tensor, expected[name]), name
    assert not mine.training


def test_pico_comes_in_as_the_library_loads_it() -> None:
    parts, stock = load_parts(PICO, "cpu"), stock_of(pico.FOLDER)
    assert_same_weights(parts.transformer, stock.transformer)
    assert_same_weights(parts.vae, stock.vae)
    assert_same_weights(parts.text_encoder, stock.text_encoder, leaving_out=("layers.2.", "norm."))
    assert dict(parts.scheduler.config) == dict(stock.scheduler.config)
    assert parts.tokenizer.get_vocab() == stock.tokenizer.get_vocab()
    assert parts.vae_scale_factor == stock.vae_scale_factor
    assert (parts.siglip, parts.siglip_processor, parts.controlnet) == (None, None, None)
    assert parts.loaded_from == "builtin"


@pytest.mark.parametrize("head", [False, True], ids=["model", "language model"])
def test_weights_in_many_files_come_in_as_the_library_loads_them(tmp_path: Path, head: bool) -> None:
    folder = checkpoints.sharded(tmp_path / "mini", head=head)
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    assert len(list((folder / "text_encoder").glob("*.safetensors"))) > 2
    parts, stock = load_parts(spec_of(folder), "cpu"), stock_of(folder)
    assert_same_weights(parts.transformer, stock.transformer)
    whole = stock.text_encoder.model if head else stock.text_encoder
    assert_same_weights(parts.text_encoder, whole, leaving_out=("layers.3.", "norm."))
    assert parts.loaded_from == str(folder)


def test_a_text_encoder_that_ends_early_says_what_the_whole_one_says(tmp_path: Path) -> None:
    folder = checkpoints.sharded(tmp_path / "mini", head=True)
    parts, whole = load_parts(spec_of(folder), "cpu"), stock_of(folder).text_encoder.model
    tokens = torch.arange(3, 40).unsqueeze(0)
    with torch.inference_mode():
        expected = whole(tokens, output_hidden_states=True).hidden_states[-2]
        assert torch.equal(parts.text_encoder(tokens).last_hidden_state, expected)
    assert len(parts.text_encoder.layers) == len(whole.layers) - 1


def test_what_sees_pictures_comes_in_with_an_omni_checkpoint(tmp_path: Path) -> None:
    folder = checkpoints.omni(tmp_path / "omni")
    parts = load_parts(spec_of(folder), "cpu")
    assert_same_weights(parts.siglip, Siglip2VisionModel.from_pretrained(folder / "siglip", local_files_only=True))
    assert parts.siglip_processor.max_num_patches == 12
    assert parts.transformer.siglip_embedder is not None
    assert list(parts.models()) == ["text_encoder", "transformer", "vae", "siglip"]


def test_a_controlnet_borrows_from_the_transformer(tmp_path: Path) -> None:
    folder = checkpoints.controlnet(tmp_path / "control")
    parts = load_parts(spec_of("builtin", controlnet=str(folder)), "cpu")
    theirs = ZImageControlNetModel.from_pretrained(folder, local_files_only=True)
    assert_same_weights(parts.controlnet.control_layers, theirs.control_layers)
    assert_same_weights(parts.controlnet.control_all_x_embedder, theirs.control_all_x_embedder)
    assert parts.controlnet.noise_refiner is parts.transformer.noise_refiner
    assert parts.controlnet.x_pad_token is parts.transformer.x_pad_token


def test_a_missing_controlnet_is_named() -> None:
    with pytest.raises(ModelLoadFailed, match=r"there is no folder .*nowhere"):
        load_parts(spec_of("builtin", controlnet="./nowhere"), "cpu")


def test_text_encoder_transformer_and_vae_are_read_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    all_there = threading.Barrier(3, timeout=30)
    read = weights.read

    def read_together(*args: Any, **options: Any) -> Any:
        all_there.wait()  # broken, and the test fails, unless three are in here at once
        return read(*args, **options)

    monkeypatch.setattr(weights, "read", read_together)
    load_parts(PICO, "cpu")


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all weights that are read from now on."""
    names: list[str] = []
    read = weights.read

    def recording(file: Path, wanted: Mapping[str, str], **options: Any) -> Any:
        names.extend(wanted)
        return read(file, wanted, **options)

    monkeypatch.setattr(weights, "read", recording)
    return names


def test_what_the_text_encoder_does_not_need_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoints.sharded(tmp_path / "mini", head=True)
    names = recorded(monkeypatch)
    load_parts(spec_of(folder), "cpu")
    assert "model.layers.2.mlp.up_proj.weight" in names
    assert not [name for name in names if name.startswith(("model.layers.3.", "model.norm.", "lm_head."))]


def test_each_weight_has_memory_of_its_own(tmp_path: Path) -> None:
    """A view of the mapped file would keep all of it, and end with SIGBUS should the file be cut."""
    folder = checkpoints.sharded(tmp_path / "mini", head=False)  # float32, as on a CPU
    for model in load_parts(spec_of(folder), "cpu").models().values():
        for parameter in model.parameters():
            assert parameter.untyped_storage().nbytes() == parameter.nbytes


def test_weights_are_cast_as_they_come() -> None:
    stored = weights.survey(pico.FOLDER / "vae", lambda name: name)
    file = next(iter(stored.values())).file
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found = weights.read(file, {name: name for name in stored}, dtype=dtype, device="cpu")
        assert {tensor.dtype for tensor in found.values()} == {dtype}


def state() -> tuple[object, ...]:
    """What libraries change of torch while they load."""
    return (
        nn.Module.register_parameter,
        nn.Module.register_buffer,
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.empty,
        nn.init.normal_,
        nn.Linear.reset_parameters,
        torch.is_grad_enabled(),
        torch.nn.Parameter(torch.zeros(1)).device.type,
    )


def test_loading_leaves_torch_as_it_was(tmp_path: Path) -> None:
    before = state()
    load_parts(PICO, "cpu")
    assert state() == before
    broken = checkpoints.copy_of_pico(tmp_path / "broken")
    (broken / "transformer" / "config.json").write_text('{"dim": 7}')
    with pytest.raises(ModelLoadFailed):
        load_parts(spec_of(broken), "cpu")
    assert state() == before
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("weights")]


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of pico to break; asking the network for anything fails the test."""

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("a folder must not touch the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return checkpoints.copy_of_pico(tmp_path / "copy")


def load_error(folder: Path) -> str:
    with pytest.raises(ModelLoadFailed) as caught:
        load_parts(spec_of(folder), "cpu")
    assert "folder or hub id of a Z-Image checkpoint" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("file", [TRANSFORMER, TEXT_ENCODER, "vae/diffusion_pytorch_model.safetensors"])
def test_a_file_that_is_cut_corrupt_or_missing_is_named(broken: Path, file: str) -> None:
    path = broken / file
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b"", whole[:8] + b"?" * 64 + whole[72:]):
        path.write_bytes(content)
        assert f"{file} is damaged" in load_error(broken)
    path.unlink()
    assert f"{file.split('/', 1)[0]} has no " in load_error(broken)


def test_a_missing_part_of_many_is_named(tmp_path: Path) -> None:
    folder = checkpoints.sharded(tmp_path / "mini", head=False)
    gone = sorted((folder / "transformer").glob("*.safetensors"))[1]
    gone.unlink()
    assert gone.name in load_error(folder)


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"])
def test_a_config_that_is_missing_or_no_json_is_refused(broken: Path, file: str) -> None:
    (broken / file).write_text("{")
    load_error(broken)
    (broken / file).unlink()
    load_error(broken)


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        (TRANSFORMER, {"drop": "cap_pad_token"}, "transformer: missing weights: cap_pad_token"),
        (TRANSFORMER, {"add": "layers.9.new"}, "transformer: unknown weights: layers.9.new"),
        (TRANSFORMER, {"reshape": "cap_pad_token"}, "another shape: cap_pad_token [2, 3] instead of [1, 192]"),
        (TEXT_ENCODER, {"drop": "layers.1.mlp.up_proj.weight"}, "missing weights: layers.1.mlp.up_proj.weight"),
        (TEXT_ENCODER, {"add": "layers.3.mlp.up_proj.weight"}, "unknown weights: layers.3.mlp.up_proj.weight"),
    ],
)
def test_a_weight_too_few_or_too_many_is_named_before_any_is_read(
    broken: Path, monkeypatch: pytest.MonkeyPatch, file: str, change: dict[str, str], told: str
) -> None:
    checkpoints.rewrite(broken / file, **change)
    names = recorded(monkeypatch)
    assert told in load_error(broken)
    assert names == []


def test_of_many_wrong_weights_three_are_named(broken: Path) -> None:
    (broken / "transformer" / "config.json").write_text(
        (broken / "transformer" / "config.json").read_text().replace('"n_layers": 6', '"n_layers": 8')
    )
    assert "layers.6" in (told := load_error(broken))
    assert " more" in told
    assert len(told) < 1000


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    folder = checkpoints.sharded(tmp_path / "mini", head=False)
    index = next((folder / "transformer").glob("*.index.json"))
    index.write_text('{"weight_map": {"x": "../../elsewhere.safetensors"}}')
    assert "names files outside its folder: ../../elsewhere.safetensors" in load_error(folder)


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae", "tokenizer", "scheduler"])
def test_only_known_classes_are_imported(broken: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    checkpoints.amend(broken, **{part: ["os", "system"]})
    imported: list[str] = []
    real = skeletons.importlib.import_module
    monkeypatch.setattr(skeletons.importlib, "import_module", lambda name: imported.append(name) or real(name))
    with pytest.raises(ModelLoadFailed, match=f"its {part} is system, but only .* can be served"):
        load_parts(spec_of(broken), "cpu")
    assert "os" not in imported


def test_from_the_hub_a_commit_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    snapshot = checkpoints.copy_of_pico(tmp_path / "0123456789abcdef")
    monkeypatch.setattr(sources, "snapshot_download", lambda *_args, **_options: str(snapshot))
    spec = spec_of("Org/Image", revision="0123456789abcdef" + "0" * 24)
    assert load_parts(spec, "cpu").loaded_from == "Org/Image@0123456789ab"


# What is left of a model


def loaded() -> Pipeline:
    pipeline = Pipeline(PICO, device="cpu")
    pipeline.load()
    return pipeline


def test_of_a_model_that_was_used_and_dropped_nothing_is_left() -> None:
    pipeline = loaded()
    models = pipeline._parts.models().values()
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    assert pipeline.weight_bytes() == sum(tensor.nbytes for tensor in tensors) > 6_000_000 * 4
    del models, tensors
    pipeline.warm(((64, 64),))
    assert pipeline.counters()["embeds_misses"] == 1
    assert pipeline.unload() == 0
    assert (pipeline.weight_bytes(), pipeline.unload(), pipeline.counters()) == (0, 0, {})


def test_a_weight_that_somebody_still_holds_is_counted() -> None:
    pipeline = loaded()
    weight = pipeline._parts.transformer.layers[2].attention.to_q.weight
    view = weight[:1]
    assert pipeline.unload() == weight.nbytes
    assert view.numel()


def test_a_leaked_part_is_counted_whole() -> None:
    pipeline = loaded()
    vae = pipeline._parts.vae
    assert pipeline.unload() == residue.weight_bytes([vae]) > 1_000_000


def test_a_model_can_be_loaded_again() -> None:
    pipeline = loaded()
    ask = ImageRequest(prompt="a red circle", width=64, height=64, steps=1, guidance_scale=0.0, seed=1)

    def picture() -> Any:
        run = pipeline.start(ask)
        pipeline.step([run])
        array = pipeline.finish(run)
        pipeline.discard(run)
        return array

    before = picture()
    assert pipeline.unload() == 0
    pipeline.load()
    assert (picture() == before).all()


def test_shared_weights_are_counted_once(tmp_path: Path) -> None:
    folder = checkpoints.controlnet(tmp_path / "control")
    parts: Parts = load_parts(spec_of("builtin", controlnet=str(folder)), "cpu")
    own = sum(weight.nbytes for name, weight in parts.controlnet.named_parameters() if name.startswith("control_"))
    alone = residue.weight_bytes([parts.transformer, parts.vae, parts.text_encoder])
    assert residue.weight_bytes(parts.models().values()) == alone + own


GIB = 1 << 30


@pytest.mark.parametrize(
    ("reserved", "allocated", "emptied"),
    [(20, 20, 0), (24, 20, 0), (39, 20, 0), (40, 20, 0), (41, 20, 1), (79, 1, 1)],
)
def test_the_cache_goes_back_once_a_quarter_of_the_gpu_lies_idle(
    monkeypatch: pytest.MonkeyPatch, reserved: int, allocated: int, emptied: int
) -> None:
    """With the readings of an 80 GiB GPU patched in; tests/gpu measures on a real one."""
    calls: list[int] = []
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: reserved * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: allocated * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(1))
    Pipeline(PICO, device="cuda").release_memory()
    assert len(calls) == emptied


def test_what_a_gpu_has_not_got_back_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the readings of a GPU patched in: a copy of a weight would not be found by the weights themselves."""
    traces = residue.Traces([])
    traces._on_device, traces._before = 10 * GIB, 15 * GIB
    monkeypatch.setattr(residue, "allocated_bytes", lambda: 7 * GIB)
    assert traces.left() == 2 * GIB
    monkeypatch.setattr(residue, "allocated_bytes", lambda: 4 * GIB)
    assert traces.left() == 0
