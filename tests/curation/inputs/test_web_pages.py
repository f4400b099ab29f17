from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from curation.inputs import remote
from curation.inputs.downloads import Downloads
from curation.sources import read_source
from schemas.config.curation import SourcesConfig
from schemas.errors import VideoDecodeError
from schemas.rows import Source

pytestmark = pytest.mark.slow

pytest.importorskip("yt_dlp", reason="the extra youtube")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def web(
    tmp_path: Path, samples: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Path, str]]:
    """A folder on the web, with a film in it."""
    monkeypatch.setattr(remote, "PAUSES_S", (0.0,))
    root = tmp_path / "web"
    root.mkdir()
    (root / "film.mp4").write_bytes((samples / "chaplin.mp4").read_bytes())
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=root))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield root, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def downloads(folder: Path, **values: float) -> Downloads:
    cfg = SourcesConfig.model_validate({"ytdlp": True, **values})
    return Downloads(folder / "cache", cfg)


def reason(downloads: Downloads, uri: str) -> str:
    with pytest.raises(VideoDecodeError) as caught, downloads.opened(uri):
        pass
    return caught.value.reason


def page(root: Path, body: str) -> None:
    text = f"<html><head><title>A film</title></head><body>{body}</body></html>"
    (root / "watch.html").write_text(text)


def test_the_video_of_a_page_becomes_a_source(tmp_path: Path, web: tuple[Path, str]) -> None:
    root, host = web
    page(root, '<video src="film.mp4"></video>')
    uri = f"{host}/watch.html"
    with downloads(tmp_path).opened(uri) as path:
        source = read_source(path, uri)
        assert path.read_bytes() == (root / "film.mp4").read_bytes()
    assert isinstance(source, Source)
    assert source.uri == uri
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == ["", ".json"]
    (root / "film.mp4").unlink()  # known content needs no network
    with downloads(tmp_path).opened(uri, source.source_id) as path:
        assert path.is_file()


def test_plain_files_do_not_go_through_ytdlp(
    tmp_path: Path, web: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yt_dlp.YoutubeDL.extract_info", None)
    root, host = web
    with downloads(tmp_path).opened(f"{host}/film.mp4") as path:
        assert path.read_bytes() == (root / "film.mp4").read_bytes()


def test_pages_without_a_video_have_reasons(tmp_path: Path, web: tuple[Path, str]) -> None:
    root, host = web
    cache = downloads(tmp_path)
    page(root, "nothing here")
    assert reason(cache, f"{host}/watch.html") == "no_video_on_page"
    assert reason(cache, f"{host}/gone.html") == "not_found"
    page(root, '<video src="gone.mp4"></video>')
    assert reason(cache, f"{host}/watch.html") == "not_found"
    page(root, '<video src="film.mp4"></video>')
    assert reason(downloads(tmp_path, max_file_gb=0.0001), f"{host}/watch.html") == "too_large"
