"""Where pictures are kept. One file a kind: the file's name is what ZFLEET_STORAGE says."""

from __future__ import annotations

import sys

from common import registry
from common.settings import Settings
from common.storage.base import BaseStorage


def open_storage(settings: Settings) -> BaseStorage:
    """Return the storage that the settings name; raises ConfigurationError for an unknown one."""
    module = registry.load(sys.modules[__name__], settings.storage)
    storage: BaseStorage = module.Storage(settings)
    return storage
