"""The transitions of lua/, each with the SHA-1 by which Redis knows it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import resources

SHARED = ("_counts.lua", "_line.lua", "_shared.lua")  # in front of every transition, in this order


def load(head: str) -> Mapping[str, tuple[str, str]]:
    """Return every transition's source, with `head` and the shared steps in front, and its SHA-1; by name.

    Steps in `_family.lua` are shared by the transitions called `family_…` only.
    """
    folder = resources.files("common") / "lua"
    texts = {entry.name: entry.read_text("utf-8") for entry in folder.iterdir() if entry.name.endswith(".lua")}
    head += "".join(texts[name] for name in SHARED)
    scripts = {}
    for name, text in texts.items():
        if not name.startswith("_"):
            name = name.removesuffix(".lua")
            source = head + texts.get(f"_{name.partition('_')[0]}.lua", "") + text
            scripts[name] = (source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())
    return scripts
