from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from curation.defects import TRANSIENT
from curation.inputs import remote
from curation.inputs.downloads import Downloads
from curation.inputs.listing import list_videos
from curation.inputs.lists import Listed
from schemas.config.curation import SourcesConfig
from schemas.errors import VideoDecodeError

pytestmark = pytest.mark.slow

CONTENT = bytes(range(256)) * 4000


class Server(BaseHTTPRequestHandler):
    """A web server with a plan: what to do with each request in turn."""

    protocol_version = "HTTP/1.1"

    def __init__(self, site: Site, *args: object) -> None:
        self.site = site
        super().__init__(*args)  # pyright: ignore[reportArgumentType]

    def do_GET(self) -> None:
        site = self.site
        site.ranges.append(self.headers.get("Range"))
        step = site.plan.pop(0) if site.plan else "send"
        if isinstance(step, int):
            self.send_response(step)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if step == "hang":
            time.sleep(1)
            return
        start = 0
        if site.ranged and self.headers.get("If-Range") == site.etag:
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        body = site.content[start:]
        self.send_response(206 if start else 200)
        if start:
            total = len(site.content)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Type", site.content_type)
        if site.etag:
            self.send_header("ETag", site.etag)
        if site.sized:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.close_connection = True
        self.wfile.write(body[: 300_000 if step == "break" else None])

    def log_message(self, *args: object) -> None:
        pass


class Site:
    def __init__(self) -> None:
        self.content = CONTENT
        self.content_type = "video/mp4"
        self.etag = '"1"'
        self.sized = True
        self.ranged = True
        self.plan: list[int | str] = []
        self.ranges: list[str | None] = []


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Site, str]]:
    monkeypatch.setattr(remote, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(remote, "_TIMEOUT_S", 0.3)
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, site))
    server.handle_error = lambda *_: None  # clients hang up on purpose
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield site, f"http://127.0.0.1:{server.server_port}/films/a.mp4"
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(folder: Path, uri: str, **limits: float) -> bytes:
    with Downloads(folder, SourcesConfig.model_validate(limits)).opened(uri) as path:
        assert path.suffix == ".mp4"
        return path.read_bytes()


def reason(folder: Path, uri: str, **limits: float) -> str:
    with pytest.raises(VideoDecodeError) as caught:
        fetch(folder, uri, **limits)
    return caught.value.reason


def test_a_file_is_fetched_once_and_asked_about_each_time(
    tmp_path: Path, site: tuple[Site, str]
) -> None:
    server, uri = site
    assert fetch(tmp_path, uri) == CONTENT
    assert len(server.ranges) == 2
    assert fetch(tmp_path, uri) == CONTENT
    assert len(server.ranges) == 3
    server.content, server.etag = CONTENT[::-1], '"2"'
    assert fetch(tmp_path, uri) == CONTENT[::-1]


def test_a_file_without_version_is_fetched_every_time(
    tmp_path: Path, site: tuple[Site, str]
) -> None:
    server, uri = site
    server.etag, server.sized = "", False
    assert fetch(tmp_path, uri) == CONTENT
    server.content = b"new"
    assert fetch(tmp_path, uri) == b"new"


@pytest.mark.parametrize("ranged", [True, False])
def test_a_broken_connection_is_continued(
    tmp_path: Path, site: tuple[Site, str], ranged: bool
) -> None:
    server, uri = site
    server.ranged = ranged
    server.plan = ["send", "break", "break", "send"] if ranged else ["send", "break", "send"]
    assert fetch(tmp_path, uri) == CONTENT
    starts = [int(r.removeprefix("bytes=").rstrip("-")) for r in server.ranges if r]
    assert starts == [300_000, 600_000] if ranged else [300_000]


def test_a_fetch_given_up_is_continued_by_the_next(tmp_path: Path, site: tuple[Site, str]) -> None:
    server, uri = site
    server.plan = ["send", "break", 503, 503]
    assert reason(tmp_path, uri) == "server_error"
    server.ranges.clear()
    assert fetch(tmp_path, uri) == CONTENT
    assert server.ranges == [None, "bytes=300000-"]


def test_a_server_that_never_gets_further_is_given_up(
    tmp_path: Path, site: tuple[Site, str]
) -> None:
    server, uri = site
    server.ranged = False
    server.plan = ["send", *["break"] * 5]
    assert reason(tmp_path, uri) == "unreachable"
    assert len(server.ranges) == 1 + 1 + 2  # asking, getting to 300,000, and not beyond


def test_a_file_that_changes_while_it_is_read_is_not_mixed(
    tmp_path: Path, site: tuple[Site, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, uri = site
    server.plan = ["send", "break"]

    def change(_: float) -> None:
        server.content, server.etag = CONTENT[::-1], '"2"'

    monkeypatch.setattr(remote.time, "sleep", change)
    assert reason(tmp_path, uri) == "server_error"
    assert fetch(tmp_path, uri) == CONTENT[::-1]


@pytest.mark.parametrize(
    ("plan", "expected", "requests"),
    [
        ([404], "not_found", 1),
        ([410], "not_found", 1),
        ([403], "forbidden", 1),
        ([401], "forbidden", 1),
        ([418], "http_error", 1),
        ([503] * 3, "server_error", 3),
        ([429] * 3, "server_error", 3),
        (["hang"] * 3, "fetch_timeout", 3),
    ],
)
def test_refusals_have_reasons(
    tmp_path: Path,
    site: tuple[Site, str],
    plan: list[int | str],
    expected: str,
    requests: int,
) -> None:
    server, uri = site
    server.plan = list(plan)
    assert reason(tmp_path, uri) == expected
    assert len(server.ranges) == requests
    assert (expected in TRANSIENT) == (requests > 1)


def test_nobody_there(tmp_path: Path, site: tuple[Site, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert reason(tmp_path, f"http://127.0.0.1:{port}/a.mp4") == "unreachable"


@pytest.mark.parametrize("sized", [True, False])
def test_a_large_file_is_refused_early(tmp_path: Path, site: tuple[Site, str], sized: bool) -> None:
    server, uri = site
    server.sized = sized
    assert reason(tmp_path, uri, max_file_gb=0.001) == "too_large"
    assert len(server.ranges) == (1 if sized else 2)
    assert fetch(tmp_path, uri, max_file_gb=0.002) == CONTENT


def test_a_page_is_not_taken_for_a_video(tmp_path: Path, site: tuple[Site, str]) -> None:
    server, uri = site
    server.content_type = "text/html; charset=utf-8"
    assert reason(tmp_path, uri) == "web_page"


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, bytes], str]]:
    """Put an object into a real S3 API server; gives its URI."""
    pytest.importorskip("s3fs", reason="the extra s3")
    moto = pytest.importorskip("moto.server", reason="moto[server]")
    import s3fs

    monkeypatch.setattr(remote, "PAUSES_S", (0.0,))
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem(skip_instance_cache=True)
    store.mkdir("films")

    def put(name: str, content: bytes) -> str:
        store.pipe(f"films/{name}", content)
        return f"s3://films/{name}"

    yield put
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.mark.slow
def test_objects_in_s3(
    tmp_path: Path, s3: Callable[[str, bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_BLOCK_BYTES", 300_000)
    uri = s3("new/a.mp4", CONTENT)
    s3("new/notes.txt", b"x")
    s3("list.csv", b"path,caption\nnew/a.mp4,a cat\n")
    cfg = SourcesConfig(inputs=("s3://films/new", "s3://films/list.csv"), captions_csv=None)
    (video,) = list_videos(cfg, Downloads(tmp_path, cfg)).videos
    assert isinstance(video, Listed)
    assert (video.uri, [s.caption for s in video.captions]) == (uri, ["a cat"])
    assert fetch(tmp_path, uri) == CONTENT
    s3("new/a.mp4", CONTENT[::-1])
    assert fetch(tmp_path, uri) == CONTENT[::-1]
    assert reason(tmp_path, "s3://films/gone.mp4") == "not_found"
    assert reason(tmp_path, "s3://no-such-bucket/a.mp4") == "not_found"
    assert reason(tmp_path, uri, max_file_gb=0.001) == "too_large"
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    assert reason(tmp_path, uri) == "unreachable"
