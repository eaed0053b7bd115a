"""What a model's weights take, what is left of them after it was dropped, and when the cache goes back."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.multiprocessing import reductions

IDLE_SHARE = 0.25  # of the device; a smaller cache is kept, as the next picture takes from it without waiting


class Traces:
    """Traces of a model's weights, which do not keep them: by these one can tell later what is still there."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        gc.collect()  # of what others have dropped already, which would look like weights that became free
        weak: Any = reductions.StorageWeakRef
        storages = _storages(models)
        self._weights = [(weak(storage), storage.nbytes()) for storage in storages]
        self._on_device = sum(storage.nbytes() for storage in storages if storage.device.type == "cuda")
        self._before = allocated_bytes()

    def left(self) -> int:
        """Return how many bytes of the weights are still there, whoever holds them.

        Counted by the weights themselves and by what the device says has become free; the larger is returned.
        """
        gc.collect()
        still = sum(nbytes for weak, nbytes in self._weights if not weak.expired())
        return max(still, self._on_device - (self._before - allocated_bytes()))


def weight_bytes(models: Iterable[nn.Module]) -> int:
    """Return the bytes of all weights of these models, those that several of them share counted once."""
    return sum(storage.nbytes() for storage in _storages(models))


def allocated_bytes() -> int:
    """Return the bytes of this process's live tensors on the GPU; 0 without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def release_cache() -> None:
    """Give the allocator's cache back to the GPU once a good share of it lies idle there.

    The driver waits for everything on the device before it frees, and the next picture would have to ask it for the
    same again: so what is a normal cache stays.
    """
    idle = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    _, total = torch.cuda.mem_get_info()
    if idle > IDLE_SHARE * total:
        torch.cuda.empty_cache()


def _storages(models: Iterable[nn.Module]) -> list[torch.UntypedStorage]:
    tensors = (tensor for model in models for tensor in (*model.parameters(), *model.buffers()))
    found = {(str(tensor.device), tensor.untyped_storage().data_ptr()): tensor.untyped_storage() for tensor in tensors}
    return list(found.values())
