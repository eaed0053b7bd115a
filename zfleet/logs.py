"""A task's story, gathered from the log files of this machine: of all roles, Nginx's if it is there, rotated ones too.

Files are searched in blocks, never loaded, so that hundreds of megabytes take seconds and no memory.
"""

from __future__ import annotations

import gzip
import json
import os
import time
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from stat import S_ISREG
from typing import IO, Any, NamedTuple

FILES = "*.log*"  # <role>-<slot>.log and Nginx's access.log; .1, -20261126 and .gz are what rotation makes of them
BLOCK = 1 << 20  # bytes
LONGEST_LINE = 1 << 20  # bytes; what is longer is no line of ours
NGINX = "access.log"
FOLLOW_EVERY_S = 0.25


class Line(NamedTuple):
    """A line of a log: when it was written, its fields, and itself."""

    at: datetime
    fields: Mapping[str, Any]
    text: str

    @property
    def role(self) -> str:
        return str(self.fields.get("role", ""))

    @property
    def is_reading(self) -> bool:
        """Whether it tells of a request that only looked."""
        status = self.fields.get("status")
        return self.fields.get("method") in ("GET", "HEAD") and isinstance(status, int) and status // 100 in (2, 3)


@dataclass
class Story:
    """What was found, oldest first, and where was looked."""

    lines: list[Line] = field(default_factory=list)
    requests: set[str] = field(default_factory=set)  # ids of those that the task came with
    files: int = 0
    bytes: int = 0
    broken: int = 0  # lines that name it and cannot be read, as one that a full disk has cut short
    unread: list[str] = field(default_factory=list)  # files that could not be read, and why


class Search:
    """Looks for one task, by its id or by that of the request it came with."""

    def __init__(self, folders: Sequence[Path], *, task: str = "", request: str = "") -> None:
        self._folders = folders
        self._task = task
        self._requests = {request} if request else set()
        self._seen: set[str] = set()
        self._read_to: dict[tuple[int, int], int] = {}  # by file: bytes that `follow` has nothing to look for in

    def gather(self) -> Story:
        """Read all there is."""
        self._read_to = {_identity(stat): stat.st_size for _, stat in self._there()}
        story = Story()
        if self._task:  # first by the task, which tells its request; then by that, as Nginx knows nothing else
            self._sift(story, {self._task})
        if self._requests:
            self._sift(story, self._requests)
        story.lines.sort(key=lambda line: line.at)
        story.requests = set(self._requests)
        return story

    def follow(self) -> Iterator[Line]:
        """Yield what is written after `gather`, for ever."""
        while True:
            for path, stat in self._there():
                read_to = self._read_to.get(_identity(stat), 0)
                if stat.st_size < read_to:
                    read_to = 0  # it was emptied in place, as logrotate's copytruncate does
                if path.suffix != ".gz" and stat.st_size > read_to:
                    yield from self._news(path, stat, read_to)
            time.sleep(FOLLOW_EVERY_S)

    def _news(self, path: Path, stat: os.stat_result, read_to: int) -> Iterator[Line]:
        try:
            with path.open("rb") as file:
                file.seek(read_to)
                data = file.read(min(BLOCK, stat.st_size - read_to))
        except OSError:
            return
        whole = data[: data.rfind(b"\n") + 1] or (data if len(data) == BLOCK else b"")  # no line of ours is that long
        self._read_to[_identity(stat)] = read_to + len(whole)
        story = Story()
        for found in _with_any(whole, {name.encode() for name in (self._task, *self._requests) if name}):
            self._take(story, path, found)
        yield from story.lines

    def _there(self) -> list[tuple[Path, os.stat_result]]:
        """Return the files that are there now, the newest of each name first, as these are renamed meanwhile."""
        found = []
        for folder in self._folders:
            for path in sorted(folder.glob(FILES)):
                try:
                    stat = path.stat()
                except OSError:
                    continue  # rotation took it away
                if S_ISREG(stat.st_mode):  # a pipe would be waited for, for ever
                    found.append((path, stat))
        return found

    def _sift(self, story: Story, names: Collection[str]) -> None:
        needles, done = {name.encode() for name in names}, set()
        story.files = story.bytes = 0
        story.unread.clear()
        for path, _ in self._there():
            try:
                with path.open("rb") as file:
                    stat = os.fstat(file.fileno())
                    if _identity(stat) in done:
                        continue  # it was renamed since, and read under its former name
                    done.add(_identity(stat))
                    story.files += 1
                    story.bytes += stat.st_size
                    for found in _matching(_plain(file, path), needles):
                        self._take(story, path, found)
            except (OSError, EOFError, zlib.error) as error:
                story.unread.append(f"{path}: {getattr(error, 'strerror', None) or error}")

    def _take(self, story: Story, path: Path, found: bytes) -> None:
        text = found.decode("utf-8", "replace")
        if text in self._seen:
            return
        line = _parsed(text, path)
        if line is None:
            self._seen.add(text)
            story.broken += 1
        elif self._is_about(line.fields):
            self._seen.add(text)
            story.lines.append(line)
            if self._task and _made(line, self._task):
                self._requests.add(line.fields["request_id"])

    def _is_about(self, fields: Mapping[str, Any]) -> bool:
        if str(fields.get("request_id")) in self._requests:
            return True
        if not self._task:
            return False
        several = fields.get("task_ids")
        named = fields.get("task_id") == self._task or (isinstance(several, list) and self._task in several)
        return named or self._task in str(fields.get("path", "")).split("/")


def _made(line: Line, task: str) -> bool:
    """Whether a line's request is the one that the task came with: not one about it, as a poll or a cancel is."""
    fields = line.fields
    if fields.get("task_id") != task or not isinstance(fields.get("request_id"), str) or not fields["request_id"]:
        return False
    return "method" not in fields or "<task_id>" not in str(fields.get("route"))


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def _plain(file: IO[bytes], path: Path) -> IO[bytes] | gzip.GzipFile:
    return gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file


def _matching(file: IO[bytes] | gzip.GzipFile, needles: Collection[bytes]) -> Iterator[bytes]:
    """Yield each line that has one of these in it."""
    rest = b""
    while block := file.read(BLOCK):
        block = rest + block
        end = block.rfind(b"\n") + 1
        rest = block[end:] if len(block) - end <= LONGEST_LINE else b""
        yield from _with_any(block[:end], needles)
    yield from _with_any(rest, needles)


def _with_any(block: bytes, needles: Collection[bytes]) -> Iterator[bytes]:
    starts = set()
    for needle in needles:
        at = block.find(needle)
        while at >= 0:
            starts.add(block.rfind(b"\n", 0, at) + 1)
            end = block.find(b"\n", at)
            at = block.find(needle, end) if end >= 0 else -1
    for start in sorted(starts):
        end = block.find(b"\n", start)
        yield block[start : end if end >= 0 else None]


def _parsed(text: str, path: Path) -> Line | None:
    try:
        fields = json.loads(text)
        at = datetime.fromisoformat(fields["time"])
        at = (at if at.tzinfo else at.replace(tzinfo=UTC)).astimezone()
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    if path.name.startswith(NGINX):
        fields = {"role": "nginx", "event": "request", **fields}
    return Line(at, fields, text)
