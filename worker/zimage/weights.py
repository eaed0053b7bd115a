"""Safetensors files: what stands in them, and many of them read at once, straight onto the device."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

READERS = 8  # files read at once; Z-Image's own checkpoints have seven
NAMED = 3  # weights named in an error; the others are counted
STEMS = ("diffusion_pytorch_model", "model")  # of diffusers' weight files, and of transformers'


class Stored(NamedTuple):
    """Where a weight stands."""

    file: Path
    name: str  # there
    shape: tuple[int, ...]


@dataclass(kw_only=True, eq=False)
class Component:
    """A model without its weights yet, and where each of them is."""

    name: str  # its folder's, for errors
    model: nn.Module  # its parameters are on the meta device
    stored: Mapping[str, Stored]  # by the model's own names
    device: str = "cpu"  # on which to put them

    def check(self) -> None:
        """Raise ValueError naming weights that the model lacks, does not know, or has in another shape.

        Nothing but the files' headers has been read by then.
        """
        wanted = {name: tuple(value.shape) for name, value in self.model.state_dict().items()}
        missing = [name for name in wanted if name not in self.stored]
        unknown = [name for name in self.stored if name not in wanted]
        reshaped = [
            f"{name} {list(entry.shape)} instead of {list(wanted[name])}"
            for name, entry in self.stored.items()
            if name in wanted and entry.shape != wanted[name]
        ]
        found = {"missing weights": missing, "unknown weights": unknown, "weights of another shape": reshaped}
        if faults := [f"{what}: {_some(names)}" for what, names in found.items() if names]:
            raise ValueError(f"{self.name}: {'; '.join(faults)}")

    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """Give the model its weights; the tensors become its parameters as they are, and it only infers from now on."""
        self.model.load_state_dict(weights, strict=True, assign=True)
        self.model.to(self.device)  # of buffers that are computed and not stored
        self.model.eval().requires_grad_(False)


def survey(folder: Path, rename: Callable[[str], str | None]) -> dict[str, Stored]:
    """Return a component's weights by the names that `rename` gives them (None: not needed).

    Raises FileNotFoundError and ValueError naming the file that is missing or damaged.
    """
    entries = {}
    for file in weight_files(folder):
        with _opened(file, "cpu") as header:
            for name in header.keys():  # noqa: SIM118 - it is no mapping
                if (wanted := rename(name)) is not None:
                    entries[wanted] = Stored(file, name, tuple(header.get_slice(name).get_shape()))
    return entries


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a component's weights: the only one, or all that its index names."""
    for stem in STEMS:
        if (single := folder / f"{stem}.safetensors").is_file():
            return [single]
        if (index := folder / f"{stem}.safetensors.index.json").is_file():
            names = {str(name) for name in json.loads(index.read_text("utf-8"))["weight_map"].values()}
            if strangers := [name for name in names if Path(name).name != name]:
                raise ValueError(f"{folder.name}/{index.name} names files outside its folder: {_some(strangers)}")
            return [folder / name for name in sorted(names)]
    raise FileNotFoundError(f"{folder.name} has no {STEMS[0]}.safetensors or {STEMS[1]}.safetensors, whole or in parts")


def read(file: Path, names: Mapping[str, str], *, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Return weights of one file by the names they get (values) in place of the file's (keys).

    Each is cast as it comes, so that no more than one of them is on the device in the file's own dtype.
    """
    with _opened(file, device) as opened:
        # on a CPU a copy: a tensor that is a view of the mapped file would die with the file
        return {
            wanted: (tensor := opened.get_tensor(name)).to(
                dtype if tensor.is_floating_point() else tensor.dtype, copy=device == "cpu"
            )
            for name, wanted in names.items()
        }


def fill_all(components: Iterable[Component], dtype: torch.dtype) -> None:
    """Read every component's files, all of them at the same time, and give the models their weights.

    The threads only read tensors. Models are built and filled by the caller's, as libraries patch torch while they do.
    """
    chosen = list(components)
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="weights")
    try:
        reads = [
            [
                pool.submit(read, file, names, dtype=dtype, device=component.device)
                for file, names in _by_file(component)
            ]
            for component in chosen
        ]
        for component, futures in zip(chosen, reads, strict=True):
            weights: dict[str, Tensor] = {}
            while futures:
                weights |= futures.pop(0).result()
            component.fill(weights)
    finally:
        pool.shutdown(cancel_futures=True)


def _by_file(component: Component) -> Iterable[tuple[Path, dict[str, str]]]:
    files: dict[Path, dict[str, str]] = {}
    for wanted, entry in component.stored.items():
        files.setdefault(entry.file, {})[entry.name] = wanted
    return files.items()


def _opened(file: Path, device: str) -> Any:
    try:
        return safe_open(file, framework="pt", device=device)
    except SafetensorError as error:  # its text does not say of which file
        raise ValueError(f"{file.parent.name}/{file.name} is damaged: {error}") from error


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return ", ".join(listed[:NAMED]) + more
