"""TOML files that people write: what they say, and on which line they say it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from common.errors import ConfigurationError

_AT_LINE = re.compile(r"\(at line (\d+), column \d+\)|\(at end of document\)")


@dataclass(frozen=True, slots=True)
class TomlFile:
    """A file's text and its tables."""

    path: Path
    text: str
    values: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> TomlFile:
        """Read a file; raises ConfigurationError that names it and, where it is no TOML, the line."""
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise ConfigurationError(f"{path}: {error.strerror}") from None
        try:
            text = raw.decode().replace("\r\n", "\n")
            return cls(path, text, tomllib.loads(text))
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            raise ConfigurationError(f"{path}:{line}: is not UTF-8") from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigurationError(f"{path}:{_told_line(error, text)}: {error}") from None

    def refuse(self, keys: Sequence[str | int], message: str, near: str = "") -> NoReturn:
        """Raise the ConfigurationError for what stands under these keys, on the line of it that has `near` in it."""
        where = ".".join(str(key) for key in keys)
        raise ConfigurationError(f"{self.path}:{self.line(keys, near)}: {where + ': ' if where else ''}{message}")

    def line(self, keys: Sequence[str | int], near: str = "") -> int:
        """Return the line on which the value under these keys begins, or the table that should have it.

        The file is read up to each of its lines: the first such part that has the key ends where its value ends, which
        began after the last one before that was whole.
        """
        lines = self.text.split("\n")
        begin = 1
        for count in range(1, len(lines) + 1):
            try:
                values = tomllib.loads("\n".join(lines[:count]))
            except tomllib.TOMLDecodeError:
                continue
            if _has(values, keys):
                return next((number for number in range(begin, count + 1) if near in lines[number - 1]), begin)
            begin = count + 1
        return self.line(keys[:-1]) if keys else 1


def _has(values: Any, keys: Sequence[str | int]) -> bool:
    for key in keys:
        try:
            values = values[key]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def _told_line(error: tomllib.TOMLDecodeError, text: str) -> int:
    match = _AT_LINE.search(str(error))
    return int(match[1]) if match and match[1] else text.count("\n") + 1
