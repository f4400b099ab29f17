import pickle

import pytest

from schemas.counts import StageCount
from schemas.errors import (
    ConfigError,
    ReconciliationError,
    TooManyFailures,
    TriptychError,
    VideoDecodeError,
)
from schemas.storage import (
    atomic_path,
    fingerprint,
    fingerprint_file,
    fingerprint_folder,
    latest,
    mark_done,
    point_latest,
    read_done,
    write_text,
)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as tmp:
        tmp.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_done_and_latest(tmp_path):
    assert latest(tmp_path) is None
    assert read_done(tmp_path / "one") is None
    mark_done(tmp_path / "one", {"rows": 3})
    point_latest(tmp_path, "one")
    assert latest(tmp_path) == tmp_path / "one"
    assert read_done(tmp_path / "one") == {"rows": 3}


def test_fingerprints_follow_content(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"1")
    assert fingerprint_file(tmp_path / "a") == fingerprint_file(tmp_path / "b")
    before = fingerprint_folder(tmp_path)
    (tmp_path / "b").rename(tmp_path / "c")
    renamed = fingerprint_folder(tmp_path)
    assert renamed != before
    (tmp_path / "CARD.md").write_text("# What this is")
    assert fingerprint_folder(tmp_path) == renamed
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1})


def test_counts_reconcile_or_raise():
    good = StageCount("shots", "source", 3, 1, 1, 1, reasons={"bad": 2})
    assert good.check() is good
    with pytest.raises(ReconciliationError, match="input 3, kept 1"):
        StageCount("shots", "source", 3, 1).check()
    with pytest.raises(ReconciliationError, match="reason"):
        StageCount("shots", "source", 2, 1, 1).check()


def test_too_many_failures_name_the_commonest():
    count = StageCount("shots", "source", 4, 1, 0, 3, reasons={"hang": 2, "abort": 1})
    assert count.check_failures(0.75) is count
    with pytest.raises(TooManyFailures, match="2 x hang, 1 x abort"):
        count.check_failures(0.5)


def test_errors_say_everything_and_travel_between_processes():
    error = VideoDecodeError("cannot open", reason="cannot_open", where="/a.mp4", do="re-encode it")
    again = pickle.loads(pickle.dumps(error))  # what Ray does with an exception
    assert str(again) == str(error) == "cannot open\n  where: /a.mp4\n  do: re-encode it"
    assert again.reason == "cannot_open"
    assert isinstance(again, TriptychError)
    assert str(pickle.loads(pickle.dumps(ConfigError("no", found=1)))) == "no\n  found: 1"
