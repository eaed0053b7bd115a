"""The pictures that a task is made from: out of storage, at the size of what is to be made."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common import inputs
from common.errors import InputGone, NotStored, StorageError
from common.schemas import ResolvedRequest
from common.storage.base import BaseStorage
from common.telemetry import get_logger

log = get_logger()

WAITS_S = (0.5, 1.0)  # between two tries at a storage that fails

Pixels = NDArray[np.uint8]
Pictures = Mapping[str, Sequence[Pixels]]  # of a request, by field

Image.MAX_IMAGE_PIXELS = None  # the gateway has kept its limit, and there is no other way into storage


class Inputs:
    """Reads the pictures of requests."""

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage

    def fetch(self, request: ResolvedRequest, reads: Callable[[], None] = lambda: None) -> Pictures:
        """Return uint8 arrays as ImageRequest has them: (height, width, 3), a mask (height, width).

        Resized as diffusers' VaeImageProcessor does (Lanczos, a mask in grey levels), but for reference pictures, which
        keep their size. `reads` is called before each try at each of them.

        Raises InputGone when a picture has left storage, and StorageError when it cannot be read.
        """
        size = request.width, request.height
        return {
            field: tuple(self._picture(field, self._read(field, handle, reads), size) for handle in handles)
            for field, handles in inputs.named(request).items()
        }

    def _picture(self, field: str, data: bytes, size: tuple[int, int]) -> Pixels:
        try:
            with Image.open(io.BytesIO(data), formats=["PNG"]) as stored:
                image = stored.convert("L" if field == "mask_image" else "RGB")
        except Exception as error:  # what Pillow stumbles over is its plugins' affair
            raise StorageError(f"{field}: the stored picture is damaged ({type(error).__name__})") from None
        if field != "reference_images" and image.size != size:
            image = image.resize(size, Image.Resampling.LANCZOS)
        return np.asarray(image)

    def _read(self, field: str, handle: str, reads: Callable[[], None]) -> bytes:
        for wait_s in WAITS_S:
            reads()
            try:
                return self._once(field, handle)
            except StorageError as error:
                log.warning("input_not_read", field=field, code=error.code)
            time.sleep(wait_s)
        reads()
        return self._once(field, handle)

    def _once(self, field: str, handle: str) -> bytes:
        try:
            return self._storage.read(inputs.storage_key(handle))
        except NotStored:
            raise InputGone(f"{field}: the picture is no longer stored; send it again") from None
