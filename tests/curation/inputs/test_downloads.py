from __future__ import annotations

import fcntl
import multiprocessing
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from curation.inputs import remote
from curation.inputs.downloads import Downloads
from schemas.config.curation import SourcesConfig
from schemas.errors import ConfigError, VideoDecodeError
from schemas.storage import fingerprint_file

MB = 1_000_000


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, bytes], str]]:
    """Put a file into a store in memory; gives its URI."""
    monkeypatch.setattr(remote, "PAUSES_S", (0.0, 0.0))
    memory = fsspec.filesystem("memory")

    def make(name: str, content: bytes) -> str:
        memory.pipe(f"/downloads/{name}", content)
        return f"memory://downloads/{name}"

    yield make
    memory.rm("/downloads", recursive=True)


def cache(folder: Path, **limits: float) -> Downloads:
    return Downloads(folder / "cache", SourcesConfig.model_validate(limits))


def fetch(downloads: Downloads, uri: str, source_id: str | None = None) -> bytes:
    with downloads.opened(uri, source_id) as path:
        return path.read_bytes()


def held(downloads: Downloads) -> list[bytes]:
    files = (p for p in downloads.folder.iterdir() if p.suffix not in (".json", ".part"))
    return sorted(p.read_bytes()[:3] for p in files if p.is_file())


def test_local_files_are_taken_where_they_are(tmp_path: Path) -> None:
    with cache(tmp_path).opened(f"{tmp_path}/a.mp4") as path:
        assert path == tmp_path / "a.mp4"
    assert not (tmp_path / "cache").exists()


def test_bytes_that_are_not_utf8_in_a_name_become_a_link(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.mp4")).write_bytes(b"film")
    for _ in range(2):
        with cache(tmp_path).opened(f"file://{tmp_path}/%FF.mp4") as path:
            assert str(path).encode()
            assert path.read_bytes() == b"film"


def test_a_file_is_fetched_once_per_version(
    tmp_path: Path, put: Callable[[str, bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fills: list[str] = []
    real = remote.StoredFile.fill
    monkeypatch.setattr(remote.StoredFile, "fill", lambda *a: (fills.append(a[0].uri), real(*a))[1])
    uri = put("a.mp4", b"one")
    downloads = cache(tmp_path)
    with downloads.opened(uri) as path:
        assert path.name == f"{fingerprint_file(path)}.mp4"
        first = fingerprint_file(path)
    assert fetch(cache(tmp_path), uri) == b"one"
    assert len(fills) == 1
    put("a.mp4", b"two")
    assert fetch(downloads, uri) == b"two"
    assert len(fills) == 2
    with pytest.raises(VideoDecodeError) as caught:
        fetch(downloads, uri, first)
    assert caught.value.reason == "changed_since"


def test_known_content_needs_no_network(tmp_path: Path, put: Callable[[str, bytes], str]) -> None:
    uri = put("a.mp4", b"one")
    with cache(tmp_path).opened(uri) as path:
        source_id = fingerprint_file(path)
    fsspec.filesystem("memory").rm("/downloads/a.mp4")
    put("other", b"")
    assert fetch(cache(tmp_path), uri, source_id) == b"one"
    with pytest.raises(VideoDecodeError) as caught:
        fetch(cache(tmp_path), uri)
    assert caught.value.reason == "not_found"


def test_equal_bytes_are_kept_once(tmp_path: Path, put: Callable[[str, bytes], str]) -> None:
    downloads = cache(tmp_path)
    for name in ("a.mp4", "b.mp4"):
        assert fetch(downloads, put(name, b"same")) == b"same"
    assert held(downloads) == [b"sam"]


def test_a_file_over_the_limit_is_not_fetched(
    tmp_path: Path, put: Callable[[str, bytes], str]
) -> None:
    downloads = cache(tmp_path, max_file_gb=0.000001)
    assert len(fetch(downloads, put("fits", b"x" * 1000))) == 1000
    with pytest.raises(VideoDecodeError) as caught:
        fetch(downloads, put("large", b"x" * 1001))
    assert caught.value.reason == "too_large"


def test_the_oldest_are_evicted_but_never_one_in_use(
    tmp_path: Path, put: Callable[[str, bytes], str]
) -> None:
    downloads = cache(tmp_path, cache_limit_gb=0.0025)
    content = {name: name.encode() * MB for name in "abcd"}
    uri = {name: put(f"{name}.mp4", content[name]) for name in "abcd"}
    for name in "ab":
        fetch(downloads, uri[name])
    fetch(downloads, uri["a"])  # b is now the oldest
    fetch(downloads, uri["c"])
    assert held(downloads) == [b"aaa", b"ccc"]
    with downloads.opened(uri["a"]):
        fetch(downloads, uri["c"])
        fetch(downloads, uri["d"])
        assert held(downloads) == [b"aaa", b"ddd"]
    assert fetch(downloads, uri["b"]) == content["b"]


def test_abandoned_parts_make_room_but_not_those_under_way(
    tmp_path: Path, put: Callable[[str, bytes], str]
) -> None:
    downloads = cache(tmp_path, cache_limit_gb=0.0025)
    downloads.folder.mkdir()
    for name in ("old", "busy"):
        (downloads.folder / f"{name}.part").write_bytes(b"")
        (downloads.folder / f"{name}.page.part").write_bytes(bytes(MB))
    with (downloads.folder / "busy.part").open("rb") as busy:
        fcntl.flock(busy, fcntl.LOCK_EX)
        fetch(downloads, put("a.mp4", b"a" * MB))
    left = {p.name for p in downloads.folder.iterdir() if "." in p.name}
    assert {"busy.part", "busy.page.part"} <= left
    assert not {"old.part", "old.page.part"} & left


def test_an_interrupted_fetch_is_continued(
    tmp_path: Path, put: Callable[[str, bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_BLOCK_BYTES", 10)
    memory = type(fsspec.filesystem("memory"))
    real, starts = memory.cat_file, []

    def breaks_off(self, path, start=None, end=None, **kwargs):
        starts.append(start)
        if len(starts) in (3, 4, 5):
            raise ConnectionError("gone")
        return real(self, path, start=start, end=end, **kwargs)

    monkeypatch.setattr(memory, "cat_file", breaks_off)
    uri, content = put("a.mp4", bytes(range(50))), bytes(range(50))
    with pytest.raises(VideoDecodeError) as caught:
        fetch(cache(tmp_path), uri)
    assert caught.value.reason == "unreachable"
    assert fetch(cache(tmp_path), uri) == content
    assert starts == [0, 10, 20, 20, 20, 20, 30, 40]


def test_a_file_that_changes_while_it_is_read_is_not_mixed(
    tmp_path: Path, put: Callable[[str, bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_BLOCK_BYTES", 2)
    memory = type(fsspec.filesystem("memory"))
    real = memory.cat_file

    def changes(self, path, **kwargs):
        block = real(self, path, **kwargs)
        if kwargs["start"] == 2:
            put("a.mp4", b"BBBBBB")
        return block

    uri = put("a.mp4", b"aaaaaa")
    with monkeypatch.context() as patch:
        patch.setattr(memory, "cat_file", changes)
        with pytest.raises(VideoDecodeError) as caught:
            fetch(cache(tmp_path), uri)
    assert caught.value.reason == "server_error"
    assert fetch(cache(tmp_path), uri) == b"BBBBBB"


def test_members_of_a_tar_that_changes(tmp_path: Path) -> None:
    downloads, tar = cache(tmp_path), tmp_path / "0.tar"
    uri = f"tar://a/x.mp4::{tar}"
    for content in (b"one", b"more"):
        (tmp_path / "x").write_bytes(content)
        with tarfile.open(tar, "w") as file:
            file.add(tmp_path / "x", "a/x.mp4")
        with downloads.opened(uri) as path:
            assert (path.read_bytes(), path.suffix) == (content, ".mp4")
    for wrong in (f"tar://gone::{tar}", f"tar://a::{tmp_path}/gone.tar", f"tar://a::{tmp_path}/x"):
        with pytest.raises(VideoDecodeError) as caught:
            fetch(downloads, wrong)
        assert caught.value.reason == ("not_found" if "gone::" in wrong else "bad_tar")


def test_tars_may_be_remote(tmp_path: Path, put: Callable[[str, bytes], str]) -> None:
    (tmp_path / "x").write_bytes(b"film")
    with tarfile.open(tmp_path / "0.tar", "w") as file:
        file.add(tmp_path / "x", "x.mp4")
    uri = put("0.tar", (tmp_path / "0.tar").read_bytes())
    assert fetch(cache(tmp_path), f"tar://x.mp4::{uri}") == b"film"


def test_an_unknown_kind_of_store_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not installed"):
        fetch(cache(tmp_path), "nostore://bucket/a.mp4")


def _fetch_all(folder: Path, uris: list[str]) -> None:
    downloads = Downloads(folder, SourcesConfig(cache_limit_gb=0.00002))
    for _ in range(20):
        for uri in uris:
            name = uri.removeprefix("tar://").partition("::")[0]
            assert fetch(downloads, uri) == name.encode() * 4000


def test_processes_share_a_small_cache(tmp_path: Path) -> None:
    names = [f"{i:02}" for i in range(5)]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in names:
            (tmp_path / name).write_bytes(name.encode() * 4000)
            tar.add(tmp_path / name, name)
    uris = [f"tar://{name}::{tmp_path}/0.tar" for name in names]
    # a forked child would take along what other tests left behind: log handlers, threads, locks
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_fetch_all, args=(tmp_path / "cache", uris[i:] + uris[:i]))
        for i in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [w.exitcode for w in workers] == [0, 0, 0]
