"""A checkpoint or LoRA that somebody else made may be wrong, but nothing in it is run."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from common.errors import LoraUnusable, ModelLoadFailed
from common.models import BUILT_IN, ModelSpec
from tests.payload import Payload
from worker import pico
from worker.pipelines import stock, zimage
from worker.pipelines.base import BasePipeline
from worker.zimage import sources
from worker.zimage.lorafile import read_lora

pytestmark = pytest.mark.usefixtures("one_thread")

PIPELINES: dict[str, type[BasePipeline]] = {"pico": zimage.Pipeline, "pico-stock": stock.Pipeline}
WEIGHTS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
PICKLED = {"diffusion_pytorch_model": "diffusion_pytorch_model.bin", "model": "pytorch_model.bin"}


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "it was run"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return shutil.copytree(pico.FOLDER, tmp_path / "checkpoint")


def load(name: str, source: str, **changes: object) -> None:
    spec = next(spec for spec in BUILT_IN if spec.name == name)
    PIPELINES[name](ModelSpec.model_validate(spec.model_dump() | {"source": source} | changes), device="cpu").load()


def test_the_payload_would_work(mark: Path) -> None:
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("name", PIPELINES)
def test_pickled_weights_are_never_opened(name: str, part: str, checkpoint: Path, mark: Path) -> None:
    """Neither in place of safetensors nor beside them."""
    safe = checkpoint / part / f"{WEIGHTS[part]}.safetensors"
    for suffix in (PICKLED[WEIGHTS[part]], f"{WEIGHTS[part]}.pt", f"{WEIGHTS[part]}.ckpt"):
        (checkpoint / part / suffix).write_bytes(pickle.dumps(Payload(mark)))
        torch.save({"weight": Payload(mark)}, checkpoint / part / f"torch-{suffix}")
    load(name, str(checkpoint))
    safe.unlink()
    with pytest.raises(ModelLoadFailed):
        load(name, str(checkpoint))
    assert not mark.exists()


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pickle_that_calls_itself_safetensors_is_refused(name: str, checkpoint: Path, mark: Path) -> None:
    (checkpoint / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(ModelLoadFailed):
        load(name, str(checkpoint))
    assert not mark.exists()


def test_a_pickled_lora_is_refused(tmp_path: Path, mark: Path) -> None:
    path = tmp_path / "style.safetensors"
    for data in (pickle.dumps(Payload(mark)), b"PK\x03\x04" + pickle.dumps(Payload(mark))):
        path.write_bytes(data)
        with pytest.raises(LoraUnusable, match="cannot be read as safetensors"):
            read_lora(path, {}, torch.float32)
    assert not mark.exists()


CODE = "import pathlib; pathlib.Path({!r}).touch()\nclass Model: ...\nclass Pipeline(Model): ...\n"


@pytest.mark.parametrize("name", PIPELINES)
def test_code_that_a_model_brings_along_is_not_run(name: str, checkpoint: Path, mark: Path) -> None:
    for folder in (checkpoint, *(path for path in checkpoint.iterdir() if path.is_dir())):
        for module in ("modeling", "pipeline", "tokenization"):
            (folder / f"{module}.py").write_text(CODE.format(str(mark)))
    auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"), "modeling.Model")
    for path in checkpoint.glob("*/*config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    index = json.loads((checkpoint / "model_index.json").read_text())
    for change in ({}, {"_class_name": ["pipeline", "Pipeline"]}, {"transformer": ["modeling", "Model"]}):
        (checkpoint / "model_index.json").write_text(json.dumps(index | change))
        with contextlib.suppress(ModelLoadFailed):  # the other way in which its code may be left alone
            load(name, str(checkpoint))
    assert not mark.exists()


@pytest.mark.parametrize("revision", [None, "main", "v1.2", "abc123", "A" * 40, "0" * 41, "refs/pr/1"])
@pytest.mark.parametrize("name", PIPELINES)
def test_a_hub_id_without_a_commit_is_refused(name: str, revision: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_args: object, **_named: object) -> None:
        pytest.fail("it was asked for")

    monkeypatch.setattr(sources, "snapshot_download", fetch)
    monkeypatch.setattr(stock.DiffusionPipeline, "from_pretrained", fetch)
    with pytest.raises(ModelLoadFailed, match=r"revision must be a commit of 40 hex digits.*name the folder"):
        load(name, "Some-Org/Some-Image", revision=revision)


def test_the_models_that_come_with_zfleet_are_pinned() -> None:
    for spec in BUILT_IN:
        assert spec.source == "builtin" or sources.COMMIT.fullmatch(spec.revision or ""), spec.name
        assert spec.controlnet is None
