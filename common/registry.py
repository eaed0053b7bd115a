"""Ports are folders: a module's file name is its registry key, and only the chosen module is imported."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from common.errors import ConfigurationError

RESERVED = frozenset({"base"})


def discover(package: ModuleType) -> tuple[str, ...]:
    """Return the sorted names that `load` accepts for this package; imports none of them."""
    modules = pkgutil.iter_modules(package.__path__)
    return tuple(sorted(m.name for m in modules if m.name not in RESERVED and not m.name.startswith("_")))


def load(package: ModuleType, name: str) -> ModuleType:
    """Import and return the module `name` of `package`.

    Raises ConfigurationError for any name that `discover` does not list, so that `../x`, `os` or `base` never load.
    """
    known = discover(package)
    if name not in known:
        kind = package.__name__.rpartition(".")[2]
        raise ConfigurationError(f"no {kind} module is called {name!r}; there are: {', '.join(known)}")
    return importlib.import_module(f"{package.__name__}.{name}")
