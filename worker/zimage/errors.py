"""What a device does to a call, by its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from common.errors import DeviceFailed, OutOfMemory

NO_MEMORY = "the picture does not fit into the GPU's memory; ask for a smaller one, or for fewer at a time"


@contextmanager
def named_errors() -> Iterator[None]:
    """Raise OutOfMemory for an error after which all goes on, and DeviceFailed for one after which nothing does, as
    CUDA's context is then broken for the whole process.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(NO_MEMORY) from error
    except RuntimeError as error:  # torch.AcceleratorError, and what cuBLAS and cuDNN report through torch
        text = str(error)
        if "out of memory" in text or "ALLOC_FAILED" in text:
            raise OutOfMemory(NO_MEMORY) from error
        if isinstance(error, torch.AcceleratorError) or text.startswith(("CUDA error", "cuDNN error")):
            raise DeviceFailed(f"the GPU has failed: {text.splitlines()[0]}") from error
        raise
