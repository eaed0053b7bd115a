"""The transitions of lua/, each with the SHA-1 by which Redis knows it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import resources

SHARED = ("_line.lua", "_shared.lua")  # in front of every transition, in this order


def load(head: str) -> Mapping[str, tuple[str, str]]:
    """Return every transition's source, with `head` and the shared steps in front, and its SHA-1; by name."""
    folder = resources.files("common") / "lua"
    head += "".join((folder / name).read_text("utf-8") for name in SHARED)
    scripts = {}
    for entry in folder.iterdir():
        name, _, suffix = entry.name.partition(".")
        if suffix == "lua" and not name.startswith("_"):
            source = head + entry.read_text("utf-8")
            scripts[name] = (source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())
    return scripts
