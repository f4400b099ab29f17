"""Windows and manifests, mostly as properties over arbitrary sets of clips."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from curation import windows as windows_module
from curation.manifests import Manifest, pretrain_manifest, sft_manifest, split_of
from curation.windows import described_clips, num_runs, score_windows
from schemas.config.curation import ManifestsConfig, WindowsConfig
from schemas.errors import ManifestError
from schemas.rows import Clip, Embedding, Reject, Sample, Window, stable_id, stable_ids
from schemas.tables import (
    CLIPS,
    EMBEDDINGS,
    REJECTS,
    SAMPLES,
    WINDOWS,
    from_arrow,
    to_arrow,
    write_table,
)

Vectors = dict[str, np.ndarray]


def make_windows(
    clips: list[Clip], vectors: Vectors, cfg: WindowsConfig
) -> tuple[list[Window], list[Reject]]:
    table = to_arrow(CLIPS, [c for c in clips if c.clip_id in vectors])
    rows = np.stack([vectors[i] for i in table["clip_id"].to_pylist()])
    made, refused = score_windows(table, rows, cfg)
    return from_arrow(WINDOWS, made), from_arrow(REJECTS, refused)


def sft_samples(
    windows: list[Window], clips: list[Clip], cfg: ManifestsConfig
) -> tuple[list[Sample], list[Reject]]:
    return rows_of(sft_manifest(to_arrow(WINDOWS, windows), to_arrow(CLIPS, clips), cfg))


def pretrain_samples(
    clips: list[Clip], n: int, cfg: ManifestsConfig
) -> tuple[list[Sample], list[Reject]]:
    return rows_of(pretrain_manifest(to_arrow(CLIPS, clips), n, cfg))


def rows_of(manifest: Manifest) -> tuple[list[Sample], list[Reject]]:
    samples = [s for table in manifest.samples() for s in from_arrow(SAMPLES, table)]
    return samples, from_arrow(REJECTS, manifest.rejects)


def clip(source: int, index: int, **changes: object) -> Clip:
    made = Clip(
        clip_id=stable_id(source, index), shot_id=f"{source}/{index}", source_id=f"source{source}",
        uri=f"/films/{source}.mp4", index=index, start_pts=index * 100, end_pts=index * 100 + 90,
        start_frame=index * 50, end_frame=index * 50 + 45, num_frames=45, start_s=index * 2.0,
        end_s=index * 2 + 1.8, fps=25.0, width_px=64, height_px=48, caption="A red ball.",
        caption_source="panda70m_csv", matching_score=None, trainable_pretrain=True,
        trainable_sft=True,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)  # pyright: ignore[reportArgumentType]


def vectors_of(clips: list[Clip]) -> Vectors:
    return {
        c.clip_id: np.random.default_rng(c.index + 1).normal(size=5).astype(np.float32)
        for c in clips
    }


def windows_of(clips: list[Clip], **settings: object) -> list[Window]:
    cfg = WindowsConfig.model_validate(settings)
    return make_windows(clips, vectors_of(clips), cfg)[0]


ALL_CLIPS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 8)), unique=True, min_size=1, max_size=40
).map(lambda pairs: [clip(s, i) for s, i in pairs])


def test_a_window_holds_every_pairwise_cosine() -> None:
    clips = [clip(0, i) for i in range(4)]
    vectors = vectors_of(clips)
    [window], _ = make_windows(clips, vectors, WindowsConfig(scenes_per_sample=4))

    def cosine(a: Clip, b: Clip) -> float:
        x, y = vectors[a.clip_id].astype(float), vectors[b.clip_id].astype(float)
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    expected = [cosine(a, b) for a, b in combinations(clips, 2)]
    assert window.similarities == pytest.approx(expected, abs=1e-6)
    adjacent = [expected[0], expected[3], expected[5]]
    assert window.min_adjacent == pytest.approx(min(adjacent), abs=1e-6)
    assert window.mean_adjacent == pytest.approx(np.mean(adjacent), abs=1e-6)
    assert window.min_pairwise == pytest.approx(min(expected), abs=1e-6)
    assert window.mean_pairwise == pytest.approx(np.mean(expected), abs=1e-6)
    assert window.max_pairwise == pytest.approx(max(expected), abs=1e-6)
    assert window.index == 0
    assert window.largest_gap_s == pytest.approx(0.2)
    assert window.sample_id == stable_id(*window.clip_ids)


def test_missing_shots_gaps_and_missing_vectors_break_a_run() -> None:
    clips = [clip(0, i) for i in (0, 1, 2, 4, 5, 6)]
    windows, rejects = make_windows(clips, vectors_of(clips), WindowsConfig())
    assert len(windows) == 2
    assert Counter(r.reason for r in rejects) == {"not_consecutive": 2}
    late = [clip(0, 0), clip(0, 1), clip(0, 2, start_s=9.0, end_s=10.0)]
    windows, [reject] = make_windows(late, vectors_of(late), WindowsConfig())
    assert not windows
    assert (reject.reason, reject.score) == ("gap_too_large", pytest.approx(5.2))
    blind = vectors_of(clips)
    del blind[clips[1].clip_id]
    windows, rejects = make_windows(clips, blind, WindowsConfig())
    assert (len(windows), len(rejects)) == (1, 2)


@given(ALL_CLIPS, st.integers(2, 4), st.randoms())
def test_windows_reconcile_and_ignore_order(
    clips: list[Clip], n: int, shuffle: random.Random
) -> None:
    cfg = WindowsConfig(scenes_per_sample=n)
    windows, rejects = make_windows(clips, vectors_of(clips), cfg)
    per_source = Counter(c.source_id for c in clips).values()
    runs = sum(max(0, count - n + 1) for count in per_source)
    assert len(windows) + len(rejects) == runs == num_runs(to_arrow(CLIPS, clips), n)
    shuffle.shuffle(clips)
    assert make_windows(clips, vectors_of(clips), cfg) == (windows, rejects)


@given(ALL_CLIPS, st.integers(1, 7))
def test_windows_are_the_same_however_much_is_read_at_once(clips: list[Clip], rows: int) -> None:
    vectors = vectors_of(clips)
    extra = [*clips, clip(3, 40), clip(9, 0)]  # described, but since left out of the clips
    embeddings = [
        Embedding(c.clip_id, "m", c.source_id, c.start_pts, "", vectors_of([c])[c.clip_id].tolist())
        for c in extra
    ]
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        paths = Path(folder) / "clips.parquet", Path(folder) / "embeddings.parquet"
        write_table(paths[0], CLIPS, clips)
        write_table(paths[1], EMBEDDINGS, embeddings)
        patch.setattr(windows_module, "_ROWS", rows)
        parts = list(described_clips(*paths))
    sources = [set(part["source_id"].to_pylist()) for part, _ in parts]
    assert all(not a & b for a, b in combinations(sources, 2))
    half = {i: v.astype(np.float16) for i, v in vectors.items()}
    cfg = WindowsConfig()
    found = [w for part in parts for w in from_arrow(WINDOWS, score_windows(*part, cfg)[0])]
    assert found == make_windows(clips, half, cfg)[0]


def test_embeddings_in_another_order_are_refused(tmp_path: Path) -> None:
    clips = [clip(0, 0, start_pts=50), clip(0, 1, start_pts=0)]
    write_table(tmp_path / "clips.parquet", CLIPS, clips)
    rows = [Embedding(c.clip_id, "m", c.source_id, c.start_pts, "", [1.0]) for c in clips]
    write_table(tmp_path / "embeddings.parquet", EMBEDDINGS, rows)
    with pytest.raises(ManifestError, match="not in the order"):
        list(described_clips(tmp_path / "clips.parquet", tmp_path / "embeddings.parquet"))


def test_many_ids_are_those_of_one() -> None:
    parts = [("a", "b"), ("ä",), ("a", "b", "c"), ()]
    assert stable_ids(parts) == [stable_id(*p) for p in parts]
    many = [(str(i), "x") for i in range(64)]
    assert stable_ids(many) == [stable_id(*p) for p in many]


RULES = st.builds(
    ManifestsConfig,
    statistic=st.sampled_from(["min_adjacent", "mean_adjacent", "min_pairwise", "mean_pairwise"]),
    band=st.sampled_from(["similarity", "quantile"]),
    low=st.just(0.0),
    high=st.sampled_from([0.5, 1.0]),
    near_duplicate=st.sampled_from([None, 0.8]),
    max_shared_clips=st.sampled_from([None, 0, 1, 2]),
    max_per_source=st.sampled_from([None, 1, 2]),
)


@given(ALL_CLIPS, RULES, st.floats(0, 1), st.floats(0, 1), st.randoms())
def test_a_higher_threshold_never_adds_a_window(
    clips: list[Clip], rules: ManifestsConfig, a: float, b: float, shuffle: random.Random
) -> None:
    windows = windows_of(clips)
    low, high = sorted((a, b))
    loose, loose_rejects = sft_samples(windows, clips, rules.model_copy(update={"low": low}))
    strict, strict_rejects = sft_samples(windows, clips, rules.model_copy(update={"low": high}))
    assert {s.sample_id for s in strict} <= {s.sample_id for s in loose}
    assert len(loose) + len(loose_rejects) == len(windows) == len(strict) + len(strict_rejects)
    shuffle.shuffle(windows)
    shuffle.shuffle(clips)
    assert sft_samples(windows, clips, rules.model_copy(update={"low": low}))[0] == loose


def greedy(windows: list[Window], rules: ManifestsConfig) -> set[str]:
    """Best first, one window after the other."""
    kept: list[Window] = []
    for window in sorted(windows, key=lambda w: (-w.min_pairwise, w.source_id, w.index)):
        mates = [k for k in kept if k.source_id == window.source_id]
        shared = [len(set(k.clip_ids) & set(window.clip_ids)) for k in mates]
        if rules.max_shared_clips is not None and max(shared, default=0) > rules.max_shared_clips:
            continue
        if rules.max_per_source is not None and len(mates) >= rules.max_per_source:
            continue
        kept.append(window)
    return {w.sample_id for w in kept}


@given(
    ALL_CLIPS,
    st.integers(2, 4),
    st.sampled_from([None, 0, 1, 2]),
    st.sampled_from([None, 1, 2, 3]),
    st.randoms(),
)
def test_windows_that_share_clips_are_kept_best_first(
    clips: list[Clip], n: int, shared: int | None, cap: int | None, chance: random.Random
) -> None:
    rules = ManifestsConfig(
        low=-1, near_duplicate=None, max_shared_clips=shared, max_per_source=cap
    )
    windows = [
        dataclasses.replace(w, min_pairwise=chance.choice([0.1, 0.2, 0.3, 0.4]))
        for w in windows_of(clips, scenes_per_sample=n)
    ]
    samples, rejects = sft_samples(windows, clips, rules)
    assert {s.sample_id for s in samples} == greedy(windows, rules)
    assert {r.reason for r in rejects} <= {"overlapping", "source_full"}


def test_quantiles_keep_that_share_of_the_windows() -> None:
    clips = [clip(s, i) for s in range(8) for i in range(7)]
    windows = windows_of(clips)
    windows = [dataclasses.replace(w, min_pairwise=i / 100) for i, w in enumerate(windows)]
    rules = ManifestsConfig(band="quantile", low=0.75, near_duplicate=None)
    manifest = sft_manifest(to_arrow(WINDOWS, windows), to_arrow(CLIPS, clips), rules)
    assert len(manifest.rows) == 11  # of 40: the one at the quantile, and the ten above it
    assert manifest.limits == {"low_similarity": "0.29", "high_similarity": "0.39"}
    with pytest.raises(ValidationError, match="quantiles are 0 to 1"):
        ManifestsConfig(band="quantile", low=-0.5)


def test_near_duplicate_scenes_are_left_out_whatever_the_statistic() -> None:
    clips = [clip(0, i) for i in range(3)]
    vectors = {c.clip_id: np.array([1.0, i // 2]) for i, c in enumerate(clips)}
    windows, _ = make_windows(clips, vectors, WindowsConfig())
    assert (windows[0].min_pairwise, windows[0].max_pairwise) == (pytest.approx(0.707107), 1.0)
    [reject] = sft_samples(windows, clips, ManifestsConfig())[1]
    assert reject.reason == "near_duplicate"
    assert len(sft_samples(windows, clips, ManifestsConfig(near_duplicate=None))[0]) == 1


def test_windows_of_another_snapshot_are_refused() -> None:
    clips = [clip(0, i) for i in range(4)]
    with pytest.raises(ManifestError, match="not those of table 'clips'"):
        sft_samples(windows_of(clips), [clips[0], *clips[2:]], ManifestsConfig())


def test_sft_reasons_scores_and_scenes() -> None:
    clips = [clip(0, 0), clip(0, 1), clip(0, 2, trainable_sft=False), clip(0, 3, caption="")]
    windows = windows_of(clips)
    [sample], [silent] = sft_samples(windows, clips, ManifestsConfig(low=-1, high=1))
    assert silent.reason == "no_caption"
    assert [s.clip_id for s in sample.scenes] == [c.clip_id for c in clips[:3]]
    assert sample.similarity == next(
        w.min_pairwise for w in windows if w.sample_id == sample.sample_id
    )
    assert not sample.trainable
    for cfg, reason in (
        (ManifestsConfig(low=1), "below_threshold"),
        (ManifestsConfig(low=-1, high=-1), "above_threshold"),
    ):
        rejects = sft_samples(windows, clips, cfg)[1]
        assert Counter(r.reason for r in rejects) == {reason: 1, "no_caption": 1}
        assert all(r.score is not None for r in rejects)


def enough(clips: list[Clip], n: int = 3) -> bool:
    return len({c.source_id for c in clips}) >= n


@given(ALL_CLIPS.filter(enough), st.integers(1, 4), st.integers(0, 3), st.randoms())
def test_pretrain_rows_are_unrelated_bounded_and_reconciled(
    clips: list[Clip], uses: int, seed: int, shuffle: random.Random
) -> None:
    clips = [dataclasses.replace(c, trainable_pretrain=c.index != 3) for c in clips]
    cfg = ManifestsConfig(uses_per_clip=uses, seed=seed, val_percent=30)
    samples, rejects = pretrain_samples(clips, 3, cfg)
    assert len(samples) * 3 + len(rejects) == len(clips) * uses
    assert len({s.sample_id for s in samples}) == len(samples)
    used = Counter(scene.clip_id for s in samples for scene in s.scenes)
    unused = Counter(r.record_id for r in rejects)
    assert all(used[c.clip_id] + unused[c.clip_id] == uses for c in clips)
    trainable = {c.clip_id: c.trainable_pretrain for c in clips}
    for sample in samples:
        assert len({s.source_id for s in sample.scenes}) == 3
        assert {split_of(s.source_id, 30) for s in sample.scenes} == {sample.split}
        assert {trainable[s.clip_id] for s in sample.scenes} == {sample.trainable}
    for source_id in {c.source_id for c in clips}:
        of_source = [
            used[c.clip_id] for c in clips if c.source_id == source_id and c.trainable_pretrain
        ]
        assert not of_source or max(of_source) - min(of_source) <= 1  # uniform coverage
    shuffle.shuffle(clips)
    assert pretrain_samples(clips, 3, cfg) == (samples, rejects)


def test_pretrain_draws_as_many_rows_as_possible() -> None:
    clips = [clip(0, i) for i in range(4)] + [clip(s, 0) for s in range(1, 9)]
    samples, rejects = pretrain_samples(clips, 3, ManifestsConfig(uses_per_clip=1))
    assert (len(samples), len(rejects)) == (4, 0)


def test_the_seed_changes_the_rows() -> None:
    clips = [clip(s, i) for s in range(6) for i in range(5)]
    rows = {
        tuple(s.sample_id for s in pretrain_samples(clips, 3, ManifestsConfig(seed=seed))[0])
        for seed in range(3)
    }
    assert len(rows) == 3


def test_sources_meet_many_others() -> None:
    clips = [clip(s, i) for s in range(60) for i in range(20)]
    samples, _ = pretrain_samples(clips, 3, ManifestsConfig(uses_per_clip=1))
    assert len(samples) == 400
    met = {
        frozenset((a.source_id, b.source_id))
        for sample in samples
        for a, b in combinations(sample.scenes, 2)
    }
    assert len(met) > 750  # of 1200 pairs among 1770, chance alone gives about 870


def test_silent_clips_and_too_few_sources() -> None:
    clips = [clip(s, 0) for s in range(3)] + [clip(3, 0, caption="")]
    samples, rejects = pretrain_samples(clips, 3, ManifestsConfig(uses_per_clip=2))
    assert len(samples) == 2
    assert [r.reason for r in rejects] == ["no_caption"] * 2
    with pytest.raises(ManifestError, match="2 sources with captioned clips"):
        pretrain_samples(clips[1:], 3, ManifestsConfig())


def test_splits_are_apart() -> None:
    sources = [f"source{i}" for i in range(400)]
    counts = Counter(split_of(s, 20, 30) for s in sources)
    assert counts["val"] == pytest.approx(80, abs=30)
    assert counts["test"] == pytest.approx(120, abs=30)
    assert {s for s in sources if split_of(s, 20) == "val"} == {
        s for s in sources if split_of(s, 20, 30) == "val"
    }


@given(st.integers(0, 50))
def test_the_split_grows_with_its_share(percent: int) -> None:
    sources = [f"source{i}" for i in range(400)]
    val = {s for s in sources if split_of(s, percent) == "val"}
    assert {s for s in sources if split_of(s, max(0, percent - 5)) == "val"} <= val
    assert len(val) == pytest.approx(4 * percent, abs=40)
