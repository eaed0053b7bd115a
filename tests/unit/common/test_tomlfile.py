from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigurationError
from common.tomlfile import MAX_BYTES, TomlFile

TEXT = '''# a comment
a = 1

# another
b = """
a = 2
[c]
{here}
"""
[c]
d = { e = [1,
  2], f = 3 }
g.h = "x"  # dotted
[[list]]
k = 1
[[list]]
k = 2
'''

Write = Callable[[str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str | bytes) -> Path:
        path = tmp_path / "a file.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["unix", "dos"])
@pytest.mark.parametrize(
    ("keys", "near", "line"),
    [
        (["a"], "", 2),
        (["b"], "", 5),
        (["b"], "{here}", 8),
        (["b"], "{not there}", 5),
        (["c"], "", 10),
        (["c", "d"], "", 11),
        (["c", "d", "f"], "", 11),
        (["c", "d", "e", 1], "", 11),
        (["c", "g", "h"], "", 13),
        (["list", 1, "k"], "", 17),
        (["c", "missing"], "", 10),
        (["list", 1, "missing"], "", 16),
        (["missing", "at all"], "", 1),
        (["a", "b"], "", 2),
        ([], "", 1),
    ],
)
def test_a_value_is_found_on_its_line(write: Write, newline: str, keys: list[str | int], near: str, line: int) -> None:
    assert TomlFile.read(write(TEXT.replace("\n", newline))).line(keys, near) == line


def test_a_refusal_names_file_line_and_key(write: Write) -> None:
    path = write(TEXT)
    with pytest.raises(ConfigurationError) as caught:
        TomlFile.read(path).refuse(["c", "d", "f"], "is odd")
    assert caught.value.message == f"{path}:11: c.d.f: is odd"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a = 1\nb\n", 2),
        ("a = 1\na = 2\n", 2),
        ("a = 1\n\nb = [1,\n", 4),
        ('a = """\n\n', 3),
        (b"a = 1\nb = '\xff'\n", 2),
        ("a = '\x00'", 1),
    ],
    ids=["no value", "twice", "open list", "open text", "no UTF-8", "NUL"],
)
def test_what_is_no_toml_is_told_with_its_line(write: Write, text: str | bytes, line: int) -> None:
    path = write(text)
    with pytest.raises(ConfigurationError) as caught:
        TomlFile.read(path)
    assert caught.value.message.startswith(f"{path}:{line}: ")


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="none: No such file"):
        TomlFile.read(tmp_path / "none")
    with pytest.raises(ConfigurationError, match="no ordinary file"):
        TomlFile.read(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigurationError, match="no ordinary file"):
        TomlFile.read(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("text", "why"),
    [("a = " + "9" * 5000, "digits"), ("a = " + "[" * 5000, "recursion"), ("#" * (MAX_BYTES + 1), f"than {MAX_BYTES}")],
    ids=["number", "nested", "large"],
)
def test_what_is_too_much_is_told(write: Write, text: str, why: str) -> None:
    path = write(text)
    with pytest.raises(ConfigurationError, match=why) as caught:
        TomlFile.read(path)
    assert caught.value.message.startswith(f"{path}: ")


def test_a_line_is_found_in_a_long_file_at_once(write: Write) -> None:
    file = TomlFile.read(write("a = 1\n" + "# a comment\n" * 10_000 + "b = [1,\n2]\nc = 3\n"))
    began = time.monotonic()
    assert [file.line(["a"]), file.line(["b", 1]), file.line(["c"])] == [1, 10_002, 10_004]
    assert time.monotonic() - began < 10


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text("ab =[]\"'#{}\n", max_size=30), min_size=1, max_size=5))
def test_each_key_is_found_whatever_stands_in_the_texts_before_it(texts: list[str]) -> None:
    lines, starts = [], []
    for index, text in enumerate(texts):
        starts.append(len(lines) + 1)
        quoted = text.replace("\\", "").replace('"', "'")
        lines += f'k{index} = """\n{quoted}"""'.split("\n")
    whole = "\n".join(lines)
    file = TomlFile(Path("x"), whole, {})
    assert [file.line([f"k{index}"]) for index in range(len(texts))] == starts
