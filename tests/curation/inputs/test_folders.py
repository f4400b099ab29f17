from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from curation.inputs.folders import find_files
from schemas.errors import ConfigError
from schemas.rows import Reject

VIDEOS = {".mp4", ".mkv"}


def tree(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def found(root: Path, text: str) -> list[str]:
    """Names below root; of rejects the reason and the name."""
    return [
        f"{f.reason} {Path(f.uri).relative_to(root)}"
        if isinstance(f, Reject)
        else Path(f).relative_to(root).as_posix()
        for f in find_files(text, VIDEOS)
    ]


def test_files_folders_and_globs(tmp_path: Path) -> None:
    tree(tmp_path, "a/x.mp4", "a/deep/y.MKV", "a/n.txt", "a/.hid/z.mp4", "a/.z.mp4", "odd[1].mp4")
    assert found(tmp_path, f"{tmp_path}/a") == ["a/x.mp4", "a/deep/y.MKV"]
    assert found(tmp_path, f"{tmp_path}/**/*.mp4") == ["odd[1].mp4", "a/x.mp4"]
    assert found(tmp_path, f"{tmp_path}/**/deep") == ["a/deep/y.MKV"]
    assert found(tmp_path, f"{tmp_path}/?") == ["a/x.mp4", "a/deep/y.MKV"]
    assert found(tmp_path, f"{tmp_path}/a/*.txt") == ["a/n.txt"]
    assert found(tmp_path, f"{tmp_path}/odd[1].mp4") == ["odd[1].mp4"]
    assert found(tmp_path, f"{tmp_path}/odd*") == ["odd[1].mp4"]
    assert found(tmp_path, f"{tmp_path}/nothing*") == []


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    tree(tmp_path, "far/x.mp4", "near/a/y.mp4")
    (tmp_path / "near/a/up").symlink_to(tmp_path / "near")
    (tmp_path / "near/a/up2").symlink_to(tmp_path / "near")
    (tmp_path / "near/far").symlink_to(tmp_path / "far")
    (tmp_path / "near/far2").symlink_to(tmp_path / "far")
    expected = [
        "near/a/y.mp4",
        "symlink_loop near/a/up",
        "symlink_loop near/a/up2",
        "near/far/x.mp4",
    ]
    assert found(tmp_path, f"{tmp_path}/near") == expected
    assert found(tmp_path, f"{tmp_path}/near/**/*.mp4") == expected


def test_links_to_nothing_and_to_themselves_are_still_listed(tmp_path: Path) -> None:
    (tmp_path / "gone.mp4").symlink_to("nowhere")
    (tmp_path / "self.mp4").symlink_to("self.mp4")
    assert found(tmp_path, f"{tmp_path}") == ["gone.mp4", "self.mp4"]
    assert found(tmp_path, f"{tmp_path}/self.mp4") == ["self.mp4"]


@pytest.fixture
def nobody(tmp_path: Path) -> Iterator[None]:
    """Permissions bind: the test runs as a user who is not root."""
    if os.geteuid() != 0:
        yield
        return
    opened = [p for p in (tmp_path, *tmp_path.parents) if not p.stat().st_mode & 1]
    modes = [p.stat().st_mode for p in opened]
    for path in opened:
        path.chmod(0o755)
    os.seteuid(65534)
    yield
    os.seteuid(0)
    for path, mode in zip(opened, modes, strict=True):
        path.chmod(mode)


def test_a_folder_we_may_not_enter_is_a_reject(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tree(tmp_path, "open/x.mp4", "shut/y.mp4")
    (tmp_path / "shut").chmod(0)
    request.getfixturevalue("nobody")
    assert found(tmp_path, f"{tmp_path}") == ["open/x.mp4", "permission_denied shut"]


def test_remote_folders_files_and_globs() -> None:
    memory = fsspec.filesystem("memory")
    for name in ("a/x.mp4", "a/deep/y.MKV", "a/n.txt", "a/.hid/z.mp4"):
        memory.pipe(f"/folders/{name}", b"x")
    root = "memory://folders"
    assert list(find_files(f"{root}/a", VIDEOS)) == [
        "memory:///folders/a/deep/y.MKV",
        "memory:///folders/a/x.mp4",
    ]
    assert list(find_files(f"{root}/a/*.mp4", VIDEOS)) == ["memory:///folders/a/x.mp4"]
    assert list(find_files(f"{root}/a/n.txt", VIDEOS)) == ["memory:///folders/a/n.txt"]
    assert list(find_files("https://host/a.mp4", VIDEOS)) == ["https://host/a.mp4"]


def test_an_unknown_kind_of_store_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="file system that is not installed"):
        list(find_files("nostore://bucket/a", VIDEOS))
