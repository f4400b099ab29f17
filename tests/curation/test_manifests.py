"""Windows and manifests, mostly as properties over arbitrary sets of clips."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.manifests import pretrain_samples, sft_samples, split_of
from curation.windows import make_windows
from schemas.config.curation import ManifestsConfig, WindowsConfig
from schemas.errors import ManifestError
from schemas.rows import Clip, Window, stable_id


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


def vectors_of(clips: list[Clip]) -> dict[str, np.ndarray]:
    return {
        c.clip_id: np.random.default_rng(c.index + 1).normal(size=5).astype(np.float32)
        for c in clips
    }


def windows_of(clips: list[Clip], **settings: object) -> list[Window]:
    cfg = WindowsConfig.model_validate(settings)
    groups: dict[str, list[Clip]] = {}
    for c in clips:
        groups.setdefault(c.source_id, []).append(c)
    return [w for g in groups.values() for w in make_windows(g, vectors_of(g), cfg)[0]]


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
    assert window.similarities == pytest.approx(expected)
    adjacent = [expected[0], expected[3], expected[5]]
    assert window.min_adjacent == pytest.approx(min(adjacent))
    assert window.mean_adjacent == pytest.approx(np.mean(adjacent))
    assert window.min_pairwise == pytest.approx(min(expected))
    assert window.mean_pairwise == pytest.approx(np.mean(expected))
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
    of_one = [c for c in clips if c.source_id == clips[0].source_id]
    cfg = WindowsConfig(scenes_per_sample=n)
    windows, rejects = make_windows(of_one, vectors_of(of_one), cfg)
    assert len(windows) + len(rejects) == max(0, len(of_one) - n + 1)
    shuffle.shuffle(of_one)
    assert make_windows(of_one, vectors_of(of_one), cfg) == (windows, rejects)


@given(ALL_CLIPS, st.floats(-1, 1), st.floats(-1, 1), st.randoms())
def test_a_higher_threshold_never_adds_a_window(
    clips: list[Clip], a: float, b: float, shuffle: random.Random
) -> None:
    windows = windows_of(clips)
    low, high = sorted((a, b))
    loose, loose_rejects = sft_samples(windows, clips, ManifestsConfig(low=low, high=1))
    strict, strict_rejects = sft_samples(windows, clips, ManifestsConfig(low=high, high=1))
    assert {s.sample_id for s in strict} <= {s.sample_id for s in loose}
    assert len(loose) + len(loose_rejects) == len(windows) == len(strict) + len(strict_rejects)
    shuffle.shuffle(windows)
    shuffle.shuffle(clips)
    assert sft_samples(windows, clips, ManifestsConfig(low=low, high=1))[0] == loose


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
        (ManifestsConfig(low=1, high=1), "below_threshold"),
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


def test_silent_clips_and_too_few_sources() -> None:
    clips = [clip(s, 0) for s in range(3)] + [clip(3, 0, caption="")]
    samples, rejects = pretrain_samples(clips, 3, ManifestsConfig(uses_per_clip=2))
    assert len(samples) == 2
    assert [r.reason for r in rejects] == ["no_caption"] * 2
    with pytest.raises(ManifestError, match="2 sources with captioned clips"):
        pretrain_samples(clips[1:], 3, ManifestsConfig())


@given(st.integers(0, 50))
def test_the_split_grows_with_its_share(percent: int) -> None:
    sources = [f"source{i}" for i in range(400)]
    val = {s for s in sources if split_of(s, percent) == "val"}
    assert {s for s in sources if split_of(s, max(0, percent - 5)) == "val"} <= val
    assert len(val) == pytest.approx(4 * percent, abs=40)
