from __future__ import annotations

import dataclasses
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.caption_scores import caption_scores
from curation.clip_cache import caption_pieces, vector_pieces
from curation.embeddings import ColorLayout, load_embedder, name_model, spread_frames
from curation.pipeline import stop_ray
from curation.refresh import Refresh
from curation.vector_cache import (
    CLIP_ID,
    TEXT_ID,
    PieceCache,
    vectors_table,
    write_captions,
)
from curation.video import read_frames
from curation.workers import embed_in_batches
from schemas.config.curation import (
    CurationConfig,
    EmbeddingConfig,
    SimilarityModelConfig,
)
from schemas.config.root import EngineConfig, TriptychConfig
from schemas.counts import StageCount
from schemas.errors import VideoDecodeError
from schemas.layout import Snapshot, Workspace
from schemas.rows import Clip, stable_id
from schemas.storage import fingerprint_file
from schemas.tables import (
    CAPTION_SCORES,
    CLIPS,
    EMBEDDINGS,
    read_table,
    vectors_of,
    write_batches,
    write_table,
)
from tests.curation.conftest import Film
from tests.curation.viclip_restatement import drawn

SHOTS = {  # verified single shots of the samples: first frame, frames
    "sintel_trailer.mp4": [(372, 98), (523, 50), (573, 37), (610, 14)],
    "big_buck_bunny.mp4": [(44, 93)],
    "chaplin.mp4": [(0, 60)],
}


def plain(*rgb: int, num_frames: int = 4) -> np.ndarray:
    return np.full((1, num_frames, 8, 8, 3), rgb, np.uint8)


def test_vectors_have_length_one_for_any_picture() -> None:
    model = ColorLayout()
    noise = np.random.default_rng(0).integers(0, 256, (3, 5, 20, 31, 3), np.uint8)
    for frames in (noise, plain(0, 0, 0), plain(94, 94, 94), plain(255, 255, 255, num_frames=1)):
        vectors = model.embed_clips(frames)
        assert vectors.shape == (len(frames), model.dim)
        assert vectors.dtype == np.float32
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)


def test_a_batch_equals_one_by_one() -> None:
    frames = np.random.default_rng(1).integers(0, 256, (4, 6, 16, 16, 3), np.uint8)
    model = ColorLayout()
    each = np.concatenate([model.embed_clips(f[None]) for f in frames])
    assert np.array_equal(model.embed_clips(frames), each)


def test_colour_place_and_time_all_matter() -> None:
    model = ColorLayout()
    half = plain(200, 30, 30).copy()
    half[:, :, :, 4:] = (30, 30, 200)
    mirrored, reversed_in_time = half[:, :, :, ::-1], half.copy()
    half_late = half.copy()
    half_late[:, 2:] = 255
    reversed_in_time = half_late[:, ::-1]
    [a], [b], [c], [d] = map(model.embed_clips, (half, mirrored, half_late, reversed_in_time))
    assert a @ b < 0.9
    assert c @ d < 0.9
    [red], [green] = map(model.embed_clips, (plain(200, 30, 30), plain(30, 160, 60)))
    assert red @ green < 0


def test_texts_are_compared_by_the_colours_they_name() -> None:
    model = ColorLayout()
    red, nothing, night = model.embed_texts(
        ["A red ball.", "Two friends talk.", "A dark blue NIGHT sky"]
    )
    assert nothing is None
    assert red is not None
    assert night is not None
    [red_clip], [dark_clip] = map(model.embed_clips, (plain(220, 20, 20), plain(10, 10, 60)))
    assert red @ red_clip > 0.9
    assert red @ dark_clip < night @ dark_clip
    assert np.linalg.norm(red) == pytest.approx(1)


def test_shots_of_one_film_are_closer_than_shots_of_two(samples: Path) -> None:
    model = load_embedder(SimilarityModelConfig())
    vectors: dict[tuple[str, int], np.ndarray] = {}
    for name, shots in SHOTS.items():
        numbers = [n for start, count in shots for n in spread_frames(start + 2, count - 4, 2)]
        frames = read_frames(samples / name, numbers, height_px=32, width_px=32)
        for i, clip in enumerate(frames.reshape(len(shots), 2, 32, 32, 3)):
            vectors[name, i] = model.embed_clips(clip[None])[0]
    pairs = [(a[0] == b[0], vectors[a] @ vectors[b]) for a, b in combinations(vectors, 2)]
    same = [s for related, s in pairs if related]
    other = [s for related, s in pairs if not related]
    assert np.mean(same) > np.mean(other) + 0.2
    assert max(same) - min(same) > 0.1


@given(st.integers(0, 1000), st.integers(1, 500), st.integers(1, 64))
def test_spread_frames_lie_in_order_inside_the_span(start: int, length: int, count: int) -> None:
    numbers = spread_frames(start, length, count)
    assert len(numbers) == count
    assert numbers == sorted(numbers)
    assert start <= numbers[0] <= numbers[-1] < start + length
    assert len(set(numbers)) == min(length, count)


def test_the_size_of_pictures_can_be_chosen_without_weights() -> None:
    assert load_embedder(EmbeddingConfig(height_px=48)).image_px == 48
    assert name_model(EmbeddingConfig(height_px=48)) != name_model(EmbeddingConfig())
    assert name_model(EmbeddingConfig(batch_clips=3, num_gpus=1)) == name_model(EmbeddingConfig())


def clip(number: int, source: str = "a", caption: str = "") -> Clip:
    return Clip(
        f"clip{number:03}", f"shot{number}", source, f"/{source}.mp4", number, 10 * number,
        10 * number + 9, 0, 9, 9, 0.0, 1.0, 9.0, 64, 48, caption, "", None, True, True,
    )  # fmt: skip


def frames_of(wanted: Clip) -> np.ndarray:
    return np.random.default_rng(wanted.index).integers(0, 256, (4, 16, 16, 3), np.uint8)


@pytest.mark.parametrize("readers", [1, 3])
def test_batches_go_across_clips_and_a_bad_clip_fails_alone(readers: int) -> None:
    model, sizes, bad = ColorLayout(16), [], {3, 4, 10}

    def read(wanted: Clip) -> np.ndarray:
        if wanted.index in bad:
            raise VideoDecodeError("broken", reason="truncated")
        return frames_of(wanted)

    def embed(frames: np.ndarray) -> np.ndarray:
        sizes.append(len(frames))
        return model.embed_clips(frames)

    clips = [clip(i, source=f"source{i}") for i in range(11)]
    done, vectors, failures = embed_in_batches(clips, read, embed, 3, readers)
    assert [c.index for c in done] == [0, 1, 2, 5, 6, 7, 8, 9]
    assert sizes == [3, 3, 2]
    each = np.concatenate([model.embed_clips(frames_of(c)[None]) for c in done])
    assert np.abs(vectors - each).max() <= 1e-6
    assert sorted(f[:2] for f in failures) == [(f"clip{i:03}", "truncated") for i in sorted(bad)]


def test_where_the_model_fails_its_batch_does() -> None:
    def embed(frames: np.ndarray) -> np.ndarray:
        if (frames[:, 0, 0, 0, 0] == frames_of(clip(1))[0, 0, 0, 0]).any():
            raise MemoryError("no room")
        return np.ones((len(frames), 2), np.float32)

    done, vectors, failures = embed_in_batches([clip(i) for i in range(5)], frames_of, embed, 2)
    assert [c.index for c in done] == [2, 3, 4]
    assert vectors.shape == (3, 2)
    assert failures == [(f"clip{i:03}", "memory_error", "no room") for i in (0, 1)]


def test_nothing_but_failures() -> None:
    def read(wanted: Clip) -> np.ndarray:
        raise VideoDecodeError("broken")

    done, vectors, failures = embed_in_batches([clip(0)], read, ColorLayout().embed_clips, 2)
    assert (done, len(vectors), len(failures)) == ([], 0, 1)


@settings(deadline=None, max_examples=12)
@given(st.permutations(range(12)), st.integers(1, 5), st.data())
def test_cached_rows_are_found_by_id_whatever_their_pieces(
    order: list[int], size: int, data: st.DataObject
) -> None:
    vectors = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    with TemporaryDirectory() as folder:
        for i in range(0, 12, size):
            part = sorted(order[i : i + size])
            table = vectors_table([clip(n) for n in part], vectors[part], "m", "w")
            write_batches(Path(folder) / f"{i}.parquet", EMBEDDINGS, [table])
        (Path(folder) / ".half.tmp.parquet").write_text("half a piece")
        cache = PieceCache(Path(folder), CLIP_ID)
        wanted = data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=20))
        rows = cache.rows([f"clip{n:03}" for n in wanted])
        assert rows["start_pts"].to_pylist() == [10 * n for n in wanted]
        assert np.array_equal(vectors_of(rows), vectors[wanted].astype(np.float16))
        assert "clip000" in cache
        assert "clip012" not in cache


def test_a_snapshot_is_written_from_pieces_in_order(tmp_path: Path) -> None:
    clips = [clip(i, source="ab"[i % 2]) for i in range(7)]
    clips.sort(key=lambda c: (c.source_id, c.start_pts))
    vectors = np.eye(7, dtype=np.float32)
    for name, part in (("x", [0, 3, 4]), ("y", [1, 2, 5, 6])):
        table = vectors_table([clips[i] for i in part], vectors[part], "m", "w")
        write_batches(tmp_path / f"{name}.parquet", EMBEDDINGS, [table])
    cache = PieceCache(tmp_path, CLIP_ID)
    path = tmp_path / "out" / "embeddings.parquet"
    write_batches(path, EMBEDDINGS, cache.batches([c.clip_id for c in clips]))
    rows = read_table(path, EMBEDDINGS)
    assert [(r.clip_id, r.source_id, r.start_pts) for r in rows] == [
        (c.clip_id, c.source_id, c.start_pts) for c in clips
    ]
    assert [r.vector for r in rows] == vectors.tolist()


def test_pieces_are_of_full_batches_and_few_clips_are_shared_out(tmp_path: Path) -> None:
    for count, batch, expected in ((3, 8, [3]), (40, 4, [4] * 10), (1000, 8, [64] * 15 + [40])):
        clips = [clip(i) for i in range(count)]
        pieces = vector_pieces(clips, tmp_path, batch)
        assert [len(p.payload["clips"]) for p in pieces] == expected
        assert len({p.path for p in pieces}) == len(pieces)
    assert vector_pieces([], tmp_path, 8) == []


def test_caption_scores_are_cosines(tmp_path: Path) -> None:
    model = ColorLayout(16)
    captions = ["A red ball.", "", "Nothing to see.", "A red ball.", "Night in blue."]
    clips = [clip(i, caption=caption) for i, caption in enumerate(captions)]
    vectors = model.embed_clips(np.stack([frames_of(c) for c in clips]))
    table = vectors_table(clips, vectors, model.model_id, "none")
    write_batches(tmp_path / "clips" / "x.parquet", EMBEDDINGS, [table])
    [piece] = caption_pieces(sorted({c for c in captions if c}), tmp_path / "texts")
    texts = piece.payload["texts"]
    chunks = list(range(1, 4))
    write_captions(piece.path, texts, model.embed_texts(texts), chunks, model.dim)
    name = name_model(EmbeddingConfig())
    found = caption_scores(
        clips[::-1],
        PieceCache(tmp_path / "clips", CLIP_ID),
        PieceCache(tmp_path / "texts", TEXT_ID),
        name,
        "chunk",
    )
    write_batches(tmp_path / "scores.parquet", CAPTION_SCORES, [found])
    rows = read_table(tmp_path / "scores.parquet", CAPTION_SCORES)
    assert [r.clip_id for r in rows] == [clips[i].clip_id for i in (0, 2, 3, 4)]
    for row in rows:
        own = clips[int(row.clip_id[-3:])]
        [said] = model.embed_texts([own.caption])
        assert row.text_chunks == chunks[texts.index(own.caption)]
        if said is None:
            assert row.similarity is None
        else:
            shown = model.embed_clips(frames_of(own)[None])[0]
            assert row.similarity == pytest.approx(float(shown @ said), abs=1e-3)
    assert [r.similarity is None for r in rows] == [False, True, False, False]
    assert {(r.model_id, r.weights_sha256, r.long_text) for r in rows} == {
        (name.model_id, "none", "chunk")
    }


@pytest.mark.slow
def test_the_stage_with_viclip(film: Film, tmp_path: Path) -> None:
    """Through a real Ray: vectors, captions, what a second run and a changed video compute."""
    weights = tmp_path / "viclip.pth"
    torch.save({"model": drawn("tiny")}, weights)
    captions = ["Red ball.", "Red ball.", "Dog.", ""]
    films = [film(f"{i}.mp4", [((60 * i, 200, 30), 12), ((200, 30, 30), 12)]) for i in range(4)]

    def embedded(**changes: object) -> tuple[Refresh, StageCount]:
        embedding = EmbeddingConfig(model="viclip", weights=str(weights), batch_clips=3)
        config = TriptychConfig(
            workspace=str(tmp_path / "work"),
            curation=CurationConfig(embedding=embedding.model_copy(update=changes)),
            engine=EngineConfig(num_cpus=1, object_store_mb=80),
        )
        refresh = Refresh(config)
        refresh.snapshot_id = "made-by-hand"
        clips: list[Clip] = []
        for path, caption in zip(films, captions, strict=True):
            for length in (12, 20):
                source_id = fingerprint_file(path)
                clip_id = stable_id(source_id, length)
                clips.append(
                    dataclasses.replace(
                        clip(0, source_id, caption),
                        clip_id=clip_id,
                        uri=str(path),
                        index=length,
                        start_pts=0,
                        end_frame=length,
                        num_frames=length,
                    )
                )
        write_table(tables.table("clips"), CLIPS, clips)
        return refresh, refresh.embeddings()

    name = CurationConfig().dataset
    tables = Snapshot(Workspace(tmp_path / "work").dataset(name) / ".building-made-by-hand")

    def kept() -> list[bytes]:
        return [tables.table(t).read_bytes() for t in ("embeddings", "caption_scores")]

    def pieces(stage: str) -> set[Path]:
        return {*(tmp_path / "work" / "cache" / stage).rglob("*.parquet")}

    try:
        refresh, first = embedded()
        assert (first.input, first.kept, first.reused) == (8, 8, 0)
        model = load_embedder(refresh.config.curation.embedding, "cpu")
        clips = {c.clip_id: c for c in read_table(tables.table("clips"), CLIPS)}
        scores = {s.clip_id: s for s in read_table(tables.table("caption_scores"), CAPTION_SCORES)}
        assert set(scores) == {c.clip_id for c in clips.values() if c.caption}
        rows = read_table(tables.table("embeddings"), EMBEDDINGS)
        for row in rows:
            own = clips[row.clip_id]
            numbers = spread_frames(0, own.num_frames, 8)
            frames = read_frames(Path(own.uri), numbers, height_px=24, width_px=24)
            [vector] = model.embed_clips(frames[None])
            assert row.vector == pytest.approx(vector, abs=1e-3)
            if own.caption:
                [said] = model.embed_texts([own.caption])
                expected = pytest.approx(float(vector @ said), abs=1e-3)
                assert scores[own.clip_id].similarity == expected
        assert np.std([row.vector for row in rows], axis=0).max() > 0.01
        before, said_pieces = kept(), pieces("captions")
        assert len(said_pieces) == 1
        # moved weights, another batch: the same model, and nothing is computed
        moved = tmp_path / "moved.pth"
        weights.rename(moved)
        _, second = embedded(weights=str(moved), batch_clips=1)
        assert (second.kept, second.reused) == (8, 8)
        assert kept() == before
        # a changed video computes its own clips, and no caption
        film("3.mp4", [((90, 90, 200), 24)])
        _, third = embedded(weights=str(moved))
        assert (third.kept, third.reused) == (8, 6)
        assert pieces("captions") == said_pieces
    finally:
        stop_ray()
