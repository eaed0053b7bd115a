"""LoRAs on the transformer: read on first use, kept while there is room, switched between steps."""

from __future__ import annotations

import itertools
import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from common.errors import FleetError, LoraUnusable
from worker.pipelines.base import MIB, Lora
from worker.zimage.errors import named_errors
from worker.zimage.lorafile import linear_shapes, read_lora

MAX_COUNT = 16
MAX_BYTES = 2048 * MIB  # rank 128 on every layer of the 6 B transformer is some 700 MiB in bfloat16

Parts = tuple[tuple[str, float], ...]  # names of adapters with their scales, sorted


class Version(NamedTuple):
    """A file as it was when it was read: one that has been replaced since is another."""

    path: Path
    modified_ns: int
    size: int


class Adapter(NamedTuple):
    """A LoRA that is on the transformer, under the name by which peft knows it."""

    name: str
    nbytes: int
    text_encoder: bool


@dataclass(frozen=True, eq=False)
class Blend:
    """The LoRAs of a run. While it is held, what it names stays loaded; equal LoRAs are one and the same blend."""

    parts: Parts


PLAIN = Blend(())


class Adapters:
    """The LoRAs of one transformer, by peft. All calls come from one thread.

    Until the first is used the transformer is as it was loaded, and it is so again once the last is evicted.
    """

    def __init__(self, transformer: Any, *, max_count: int = MAX_COUNT, max_bytes: int = MAX_BYTES) -> None:
        """Least recently used ones are evicted beyond `max_count` or `max_bytes`, save those that runs hold."""
        self._transformer = transformer
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._shapes = linear_shapes(transformer)
        self._dtype = transformer.dtype
        self._kept: OrderedDict[Version, Adapter] = OrderedDict()  # least recently used first
        self._bytes = 0
        self._blends: WeakValueDictionary[Parts, Blend] = WeakValueDictionary()
        self._layers: list[Any] = []  # of the transformer, those that peft has wrapped
        self._active: Parts | None = ()  # None: whatever peft left
        self._names = (f"file{number:08}" for number in itertools.count())

    @property
    def nbytes(self) -> int:
        """Bytes that they take on the device; any thread may ask."""
        return self._bytes

    def hold(self, loras: Sequence[Lora], notes: list[str]) -> Blend:
        """Return a run's blend, with its files loaded, to be kept as long as the run may be stepped.

        Raises LoraUnusable; `notes` gets what the client should know. A file that was replaced since it was read is
        read anew, and runs that hold the old one go on with that.
        """
        found: dict[str, float] = {}
        for lora in loras:
            adapter = self._get(lora.path, found)
            found[adapter.name] = lora.scale
            if adapter.text_encoder:
                notes.append(f"LoRA {lora.path.stem} also has a part for the text encoder, which was left out.")
        parts = tuple(sorted(found.items()))
        blend = self._blends.get(parts)
        if blend is None:
            blend = self._blends[parts] = Blend(parts)
        return blend

    def needed_bytes(self, loras: Iterable[Lora]) -> int:
        """Return about how many bytes more these will take on the device, by their files; 0 for what cannot be read."""
        needed = 0
        for path in {lora.path for lora in loras}:
            with suppress(LoraUnusable):  # which `hold` tells
                version = _version(path)
                needed += 0 if version in self._kept else version.size
        return needed

    def evict(self) -> None:
        """Take all off the transformer that no run holds."""
        self._make_room(self._max_bytes, ())

    def activate(self, blend: Blend) -> None:
        """Have the next forwards use this blend and nothing else."""
        if blend.parts == self._active:
            return
        names = [name for name, _ in blend.parts]
        for layer in self._layers:
            # set_adapter would go through the gradients of all that is loaded, which takes a good part of a step
            layer._active_adapter = names
            for name, scale in blend.parts:
                layer.set_scale(name, scale)
        self._active = blend.parts

    def _get(self, path: Path, needed: Collection[str]) -> Adapter:
        """Return a file's adapter, loaded; those that are needed beside it stay."""
        version = _version(path)
        if version not in self._kept:
            self._kept[version] = self._load(version, needed)
            self._bytes += self._kept[version].nbytes
        self._kept.move_to_end(version)
        return self._kept[version]

    @torch.inference_mode(False)  # so that the weights are ordinary tensors, whoever calls
    @torch.no_grad()
    def _load(self, version: Version, needed: Collection[str]) -> Adapter:
        path = version.path
        if any(hasattr(module, "_diffusers_hook") for module in self._transformer.modules()):
            # which moves weights by lists it made beforehand, and would trip over new ones
            raise LoraUnusable(
                "this worker's GPU is too small for LoRAs: its transformer waits in the machine's memory"
            )
        if version.size > self._max_bytes:
            raise LoraUnusable(f"LoRA {path.stem} has {version.size // MIB} MiB; at most {self._max_bytes // MIB} fit")
        weights = read_lora(path, self._shapes, self._dtype)
        if _version(path) != version:
            raise LoraUnusable(f"LoRA {path.stem} was written to while it was read; submit the task again")
        self._make_room(weights.nbytes, needed)
        name = next(self._names)
        self._active = None
        try:
            with named_errors(), warnings.catch_warnings(action="ignore"):  # peft warns of every second adapter
                self._transformer.load_lora_adapter(
                    weights.tensors, adapter_name=name, metadata=weights.config, low_cpu_mem_usage=True
                )
        except Exception as error:
            self._remove([name])
            if isinstance(error, FleetError):
                raise
            raise LoraUnusable(f"LoRA {path.stem} does not fit this model ({error})") from error
        self._find_layers()
        self._transformer.requires_grad_(False)
        return Adapter(name, weights.nbytes, weights.text_encoder)

    def _make_room(self, nbytes: int, needed: Collection[str]) -> None:
        """Evict what nobody needs, the least recently used first, as long as one more of this size is too much."""
        held = {name for blend in self._blends.values() for name, _ in blend.parts}
        spare = [version for version, adapter in self._kept.items() if adapter.name not in held.union(needed)]
        gone = []
        for version in spare:
            if len(self._kept) < self._max_count and self.nbytes + nbytes <= self._max_bytes:
                break
            adapter = self._kept.pop(version)
            self._bytes -= adapter.nbytes
            gone.append(adapter.name)
        if gone:
            self._remove(gone)

    def _remove(self, names: Sequence[str]) -> None:
        """Take adapters off the transformer, and peft too where none is left."""
        self._find_layers()
        self._active = None
        for layer in self._layers:
            layer._active_adapter = []  # else peft would choose another, and warn of that
        self._transformer.delete_adapters(list(names))
        if not self._kept:
            self._transformer.unload_lora()
            self._active = ()
        self._find_layers()

    def _find_layers(self) -> None:
        self._layers = [module for module in self._transformer.modules() if isinstance(module, BaseTunerLayer)]


def _version(path: Path) -> Version:
    try:
        stat = path.stat()
    except OSError as error:
        raise LoraUnusable(f"LoRA {path.stem}: {path.name} cannot be read ({error.strerror})") from None
    return Version(path, stat.st_mtime_ns, stat.st_size)
