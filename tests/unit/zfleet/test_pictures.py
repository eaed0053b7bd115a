from __future__ import annotations

import os
from pathlib import Path

import pytest

from zfleet import pictures


@pytest.mark.parametrize(
    ("name", "expected"), [("a.webp", "webp"), ("a.PNG", "png"), ("a.jpg", "jpeg"), ("b/a.jpeg", "jpeg"), ("a", None)]
)
def test_the_ending_is_the_format(name: str, expected: str | None) -> None:
    assert pictures.format_of(Path(name)) == expected


def test_targets() -> None:
    assert pictures.targets(Path("a/b.c.png"), 1) == [Path("a/b.c.png")]
    assert pictures.targets(Path("a/b.c.png"), 2) == [Path("a/b.c-1.png"), Path("a/b.c-2.png")]
    for folder in (Path(), Path(".."), Path("/")):
        with pytest.raises(pictures.CannotWrite, match="is a folder"):
            pictures.targets(folder, 2)


def test_a_file_is_written_whole_and_alone(tmp_path: Path) -> None:
    target = tmp_path / "ein Bild 图.png"
    pictures.require_writable([target])
    assert list(tmp_path.iterdir()) == []
    pictures.write(target, b"one")
    pictures.write(target, b"two")
    assert target.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "there" / "real.png")
    pictures.require_writable([link])
    pictures.write(link, b"x")
    assert link.is_symlink()
    assert (tmp_path / "there" / "real.png").read_bytes() == b"x"


def test_the_mode_is_the_users_usual_one(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    pictures.write(tmp_path / "x.png", b"x")
    assert (tmp_path / "x.png").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize(
    ("name", "says"),
    [("no/x.png", "there is no folder"), ("x" * 300, "too long"), (".", "is a folder"), ("pipe", "no regular file")],
)
def test_what_cannot_be_written_is_refused(name: str, says: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(pictures.CannotWrite, match=says):
        pictures.require_writable([tmp_path / name])


def test_permissions_are_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.png").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere, and tests may run as root
    with pytest.raises(pictures.CannotWrite, match="permission denied"):
        pictures.require_writable([tmp_path / "x.png"])


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "x.png"
    target.mkdir()
    with pytest.raises(pictures.CannotWrite, match="is a directory"):
        pictures.write(target, b"x")
    assert list(tmp_path.iterdir()) == [target]
