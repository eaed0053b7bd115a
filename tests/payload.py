"""What an attacker would put where something is unpickled."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


class Payload:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self._mark}'",)
