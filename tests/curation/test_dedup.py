from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation import dedup
from curation.dedup import earlier_vectors, find_duplicates, reject_remuxed
from curation.packets import PacketHash
from curation.video import open_video
from schemas.config.curation import DedupConfig
from schemas.layout import Snapshot
from schemas.rows import Clip, Embedding, Reject, Source
from schemas.tables import CLIPS, EMBEDDINGS, REJECTS, write_table

Vectors = dict[str, np.ndarray]


@pytest.fixture(autouse=True, params=[2048, 2], ids=["one_block", "blocks_of_2"])
def _block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "_BLOCK", request.param)


def clip(clip_id: str, num_frames: int = 50) -> Clip:
    return Clip(
        clip_id=clip_id, shot_id="shot", source_id="s", uri=f"/films/{clip_id}.mp4", index=0,
        start_pts=0, end_pts=num_frames, start_frame=0, end_frame=num_frames,
        num_frames=num_frames, start_s=0, end_s=num_frames / 25, fps=25, width_px=640,
        height_px=360, caption="", caption_source="none", matching_score=None,
        trainable_pretrain=False, trainable_sft=True,
    )  # fmt: skip


def at(degrees: float) -> np.ndarray:
    """A unit vector in the plane: cosines are those of the angles between."""
    return np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], np.float32)


def like(degrees: float) -> DedupConfig:
    """Vectors up to this angle apart are duplicates; a hundredth of a degree of room."""
    return DedupConfig(near_threshold=float(np.cos(np.radians(degrees + 0.01))))


def run(
    clips: Sequence[Clip],
    vectors: Vectors,
    cfg: DedupConfig,
    earlier: Iterable[tuple[Sequence[str], np.ndarray]] = (),
) -> tuple[list[str], dict[str, Reject]]:
    kept, rejects = find_duplicates(clips, vectors, earlier, cfg)
    assert len(kept) + len(rejects) == len(clips)
    assert {r.reason for r in rejects} <= {"near_duplicate"}
    return kept, {r.record_id: r for r in rejects}


def test_the_longest_is_kept_then_the_smallest_id() -> None:
    clips = [clip("b", 60), clip("a", 50), clip("d", 60), clip("c", 90), clip("e", 90)]
    vectors = {"a": at(0), "b": at(2), "d": at(1), "c": at(90), "e": at(180)}
    kept, rejects = run(clips, vectors, like(5))
    assert kept == ["b", "c", "e"]  # in the order given
    assert rejects["a"].score == pytest.approx(np.cos(np.radians(2)), abs=1e-6)
    assert "with clip b of this refresh" in rejects["a"].detail
    assert "with clip b of this refresh" in rejects["d"].detail


def test_there_are_no_chains() -> None:
    vectors = {"a": at(0), "b": at(4), "c": at(8)}
    first_longest = [clip("a", 9), clip("b", 8), clip("c", 7)]
    assert run(first_longest, vectors, like(5))[0] == ["a", "c"]
    middle_longest = [clip("a", 8), clip("b", 9), clip("c", 7)]
    assert run(middle_longest, vectors, like(5))[0] == ["b"]


def test_equal_vectors_are_duplicates_at_the_highest_threshold() -> None:
    rng = np.random.default_rng(0)
    row = rng.normal(size=768).astype(np.float16)  # stored so, and not quite of length one
    kept, rejects = run(
        [clip("a"), clip("b")], {"a": row, "b": row.copy()}, DedupConfig(near_threshold=1.0)
    )
    assert kept == ["a"]
    assert rejects["b"].score == 1.0


def test_off_keeps_everything_and_a_clip_without_vector_is_left_out() -> None:
    clips = [clip("a"), clip("b"), clip("c")]
    vectors = {"a": at(0), "b": at(0)}
    assert find_duplicates(clips, vectors, (), DedupConfig()) == (["a", "b"], [])
    assert find_duplicates(clips, vectors, (), like(5))[0] == ["a"]
    assert find_duplicates([], {}, (), like(5)) == ([], [])


def oracle(clips: Sequence[Clip], vectors: Vectors, threshold: float, known: set[str]) -> list[str]:
    kept: list[str] = []
    for c in sorted(clips, key=lambda c: (c.clip_id not in known, -c.num_frames, c.clip_id)):
        a = vectors[c.clip_id].astype(float)
        others = [vectors[k].astype(float) for k in kept]
        cosines = [a @ b / np.sqrt((a @ a) * (b @ b)) for b in others]
        if all(round(x, 6) < threshold for x in cosines):
            kept.append(c.clip_id)
    return kept


@given(
    st.lists(st.tuples(st.integers(0, 359), st.integers(1, 4)), max_size=24),
    st.integers(0, 40),
    st.randoms(use_true_random=False),
)
def test_any_order_gives_what_one_by_one_comparison_gives(
    drawn: list[tuple[int, int]], degrees: int, rng: random.Random
) -> None:
    clips = [clip(f"c{i:02}", length) for i, (_, length) in enumerate(drawn)]
    vectors = {c.clip_id: at(angle) for c, (angle, _) in zip(clips, drawn, strict=True)}
    cfg = like(degrees)
    assert cfg.near_threshold is not None
    kept, rejects = run(clips, vectors, cfg)
    assert set(kept) == set(oracle(clips, vectors, cfg.near_threshold, set()))
    shuffled = rng.sample(clips, len(clips))
    kept_again, rejects_again = run(shuffled, vectors, cfg)
    assert sorted(kept_again) == kept
    assert rejects_again == rejects
    # The kept ones alone are all kept, and against their own snapshot everything stays as it is.
    assert run([c for c in clips if c.clip_id in kept], vectors, cfg)[0] == kept
    own = [([k], vectors[k][None]) for k in kept]
    assert run(clips, vectors, cfg, own)[0] == kept


def test_new_clips_yield_to_earlier_ones_present_or_gone() -> None:
    clips = [clip("old", 10), clip("new", 99), clip("late", 99), clip("other", 5)]
    vectors = {"old": at(0), "new": at(3), "late": at(90), "other": at(45)}
    earlier = [(["x", "old"], np.stack([at(200), at(0)])), (["gone"], at(92)[None])]
    kept, rejects = run(clips, vectors, like(5), iter(earlier))
    assert kept == ["old", "other"]
    assert "with clip old of an earlier refresh" in rejects["new"].detail
    assert "with clip gone of an earlier refresh" in rejects["late"].detail


def test_what_was_kept_earlier_is_only_compared_with_its_like() -> None:
    # Both were published without dedup: one of them stays, and neither because of a lost third.
    clips = [clip("a", 10), clip("b", 20)]
    vectors = {"a": at(0), "b": at(1)}
    earlier = [(["a", "b", "gone"], np.stack([at(0), at(1), at(2)]))]
    kept, rejects = run(clips, vectors, like(5), earlier)
    assert kept == ["b"]
    assert "of this refresh" in rejects["a"].detail


def snapshot(root: Path, ids: Sequence[str], rejects: Sequence[Reject], model: str) -> Snapshot:
    found = Snapshot(root)
    write_table(found.table("clips"), CLIPS, [clip(i) for i in ids])
    rows = [Embedding(i, model, "s", n, "none", [float(n), 1.0]) for n, i in enumerate(ids)]
    write_table(found.table("embeddings"), EMBEDDINGS, rows)
    write_table(found.table("rejects"), REJECTS, rejects)
    return found


def test_earlier_snapshots_give_the_clips_they_kept_under_the_same_model(tmp_path: Path) -> None:
    def reject(clip_id: str, stage: str) -> Reject:
        return Reject(clip_id, stage, "r", "", "", False)

    refused = [reject("b", "dedup"), reject("c", "filters"), reject("d", "manifest_pretrain")]
    snapshots = [
        snapshot(tmp_path / "2", ["e", "f"], [], "m"),
        snapshot(tmp_path / "1", ["a", "b", "c", "d"], refused, "m"),
        snapshot(tmp_path / "3", ["g"], [], "another"),
    ]
    blocks = list(earlier_vectors(snapshots, "m", "none"))
    found = [(i, v.tolist()) for ids, rows in blocks for i, v in zip(ids, rows, strict=True)]
    assert found == [("a", [0, 1]), ("d", [3, 1]), ("e", [0, 1]), ("f", [1, 1])]
    assert not list(earlier_vectors(snapshots, "m", "other weights"))


def packets_of(path: Path) -> Iterator[Any]:
    with open_video(path) as (container, stream):
        yield stream
        yield from (p for p in container.demux(stream) if p.size)


def packet_hash(path: Path) -> str:
    stream, *packets = packets_of(path)
    digest = PacketHash(stream)
    for packet in packets:
        digest.add(packet)
    return digest.hexdigest()


def write_film(path: Path, codec: str, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream(codec, rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(30):
            image = rng.integers(0, 255, (48, 64, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 24)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def remux(path: Path, target: Path) -> Path:
    with av.open(str(path)) as source, av.open(str(target), "w") as out:
        stream = source.streams.video[0]
        copied = out.add_stream_from_template(stream, opaque=True)
        for packet in source.demux(stream):
            if packet.size:
                packet.stream = copied
                out.mux(packet)
    return target


@pytest.mark.parametrize(
    ("codec", "suffixes"),
    [
        ("libx264", [".mp4", ".mkv", ".ts", ".flv", ".mov"]),
        ("libx265", [".mp4", ".mkv", ".ts"]),
        ("libvpx-vp9", [".webm", ".mp4", ".mkv"]),
        ("mpeg4", [".mp4", ".avi"]),
    ],
)
def test_remuxed_copies_have_the_same_packet_hash(
    tmp_path: Path, codec: str, suffixes: list[str]
) -> None:
    film = write_film(tmp_path / f"film{suffixes[0]}", codec, seed=1)
    copies = [remux(film, tmp_path / f"copy{suffix}") for suffix in suffixes]
    assert {packet_hash(path) for path in copies} == {packet_hash(film)}
    other = write_film(tmp_path / f"other{suffixes[0]}", codec, seed=2)
    assert packet_hash(other) != packet_hash(film)


def test_of_remuxed_sources_one_stays_whatever_their_names() -> None:
    template = Source(
        source_id="", uri="", size_bytes=1, packet_sha256="", container="mp4", codec="h264",
        pix_fmt="yuv420p", bit_depth=8, width_px=64, height_px=48, rotation_deg=0, sar_num=1,
        sar_den=1, time_base_num=1, time_base_den=24, start_pts=0, avg_fps=24.0, is_vfr=None,
        is_interlaced=None, has_edit_list=False, duration_s=None, num_frames=None,
        has_audio=False,
    )  # fmt: skip

    def source(source_id: str, uri: str, packets: str) -> Source:
        return dataclasses.replace(template, source_id=source_id, uri=uri, packet_sha256=packets)

    sources = [source("2", "/a.mkv", "p"), source("1", "/b.mp4", "p"), source("3", "/c.mp4", "q")]
    kept, (reject,) = reject_remuxed(sources)
    assert [s.uri for s in kept] == ["/b.mp4", "/c.mp4"]
    assert (reject.record_id, reject.reason) == ("/a.mkv", "duplicate_video")
    assert "/b.mp4" in reject.detail
    assert reject_remuxed(reversed(sources)) == (kept, [reject])
