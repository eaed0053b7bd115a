"""TOML files that people write: what they say, and on which line they say it."""

from __future__ import annotations

import contextlib
import re
import stat
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from common.errors import ConfigurationError

MAX_BYTES = 512 * 1024  # more than all that a file may say, in four bytes a character
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
            about = path.stat()
            if not stat.S_ISREG(about.st_mode):  # a pipe would be waited for, for ever
                raise ConfigurationError(f"{path}: is no ordinary file")
            if about.st_size > MAX_BYTES:
                raise ConfigurationError(f"{path}: has {about.st_size} bytes, more than {MAX_BYTES}")
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
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of open brackets
            raise ConfigurationError(f"{path}: {error}") from None

    def refuse(self, keys: Sequence[str | int], message: str, near: str = "") -> NoReturn:
        """Raise the ConfigurationError for what stands under these keys, on the line of it that has `near` in it."""
        where = ".".join(str(key) for key in keys)
        raise ConfigurationError(f"{self.path}:{self.line(keys, near)}: {where + ': ' if where else ''}{message}")

    def line(self, keys: Sequence[str | int], near: str = "") -> int:
        """Return the line on which the value under these keys begins, or the table that should have it.

        The file is read up to some of its lines: the first such part that is whole and has the key ends where its value
        ends, which began after the last whole one before that.
        """
        lines = self.text.split("\n")
        if not _has(tomllib.loads(self.text), keys):
            return self.line(keys[:-1], near)
        before, until, count = 0, len(lines), len(lines)  # no part from `until` up to `count` is whole
        while before + 1 < until:
            middle = (before + until) // 2
            found = next(_whole(lines, range(middle, until)), None)
            if found is None:
                until = middle
            elif _has(found[1], keys):
                until, count = middle, found[0]
            else:
                before = found[0]
        begin = before + 1
        return next((number for number in range(begin, count + 1) if near in lines[number - 1]), begin)


def _whole(lines: Sequence[str], counts: Iterable[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield which of so many first lines are TOML by themselves, with what they say."""
    for count in counts:
        with contextlib.suppress(tomllib.TOMLDecodeError):
            yield count, tomllib.loads("\n".join(lines[:count]))


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
