"""Differences of two snapshots, against what was done to the films between them."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.drift import ks_distance
from curation.drift_guard import check_drift
from curation.snapshot_diff import Reason, SnapshotDiff, diff_snapshots
from schemas.config.curation import DriftConfig
from schemas.config.files import dump_yaml
from schemas.config.root import TriptychConfig
from schemas.counts import StageCount
from schemas.errors import DriftTooLarge, ManifestError
from schemas.layout import Snapshot
from schemas.rows import (
    CaptionScore,
    Clip,
    Reject,
    Sample,
    Scene,
    Shot,
    Source,
    Window,
    stable_id,
)
from schemas.storage import write_json, write_text
from schemas.tables import (
    CAPTION_SCORES,
    CLIPS,
    REJECTS,
    SAMPLES,
    SHOTS,
    SOURCES,
    WINDOWS,
    write_table,
)

LAYOUTS = ((0, 100, 200, 300, 400), (0, 100, 150, 300, 400))
SHAPES = ("whole", "short", "black", "halves", "thirds", "hole")
FPS = 25.0

Why = tuple[str, str]


@dataclass(frozen=True)
class Film:
    """What there is of a film: its bytes (0 or 1; None: it cannot be opened) and what is in it."""

    content: int | None = 0
    moved: bool = False
    unread: bool = False
    captioned: bool = True
    layout: int = 0
    shapes: tuple[str, ...] = ("whole", "whole", "whole", "whole")


@dataclass(frozen=True)
class World:
    """Films by number and the settings, from which a snapshot follows."""

    films: dict[int, Film]
    low: float = 0.0
    scenes: int = 2

    def uri(self, number: int) -> str:
        return f"/films/{number}{'_moved' if self.films[number].moved else ''}.mp4"

    def source_id(self, number: int) -> str:
        return f"source-{number}-{self.films[number].content}"


def spans(shape: str, start: int, end: int) -> list[tuple[int, int, str]]:
    """Spans of a shot with their fate."""
    match shape:
        case "short":
            return [(start, end, "short")]
        case "black":
            return [(start, end, "black")]
        case "whole":
            return [(start, end, "clip")]
        case "halves":
            return [(start, start + 20, "clip"), (end - 20, end, "clip")]
        case _:
            middle = (start + 22, start + 28, "clip" if shape == "thirds" else "short")
            return [(start, start + 20, "clip"), middle, (end - 20, end, "clip")]


def shots_of(film: Film) -> list[tuple[int, int, str]]:
    cuts = LAYOUTS[film.layout]
    return list(zip(cuts, cuts[1:], film.shapes, strict=False))


def similarity(clip_ids: Iterable[str]) -> float:
    return int(stable_id(*clip_ids)[:4], 16) / 0xFFFF


def tables(world: World) -> dict[str, list[Any]]:
    """The rows of a snapshot, from the definitions of the tables."""
    t: dict[str, list[Any]] = {k: [] for k in ("sources", "shots", "clips", "windows", "rejects")}
    t |= {"sft": [], "pretrain": []}
    for number, film in world.films.items():
        uri, source_id = world.uri(number), world.source_id(number)
        if film.content is None:
            t["rejects"].append(Reject(uri, "sources", "cannot_open", "", uri, False))
            continue
        t["sources"].append(
            Source(source_id, uri, 1, source_id, "mp4", "h264", "yuv420p", 8, 64, 48, 0, 1, 1, 1,
                   25, 0, FPS, False, False, False, 16.0, 400, False)
        )  # fmt: skip
        if film.unread:
            t["rejects"].append(Reject(source_id, "shots", "timeout", "", uri, False))
            continue
        index = 0
        for start, end, shape in shots_of(film):
            shot_id = stable_id(source_id, start, end)
            t["shots"].append(
                Shot(shot_id, source_id, len(t["shots"]), start, end, start, end, start / FPS,
                     end / FPS, "cut", "cut", 0, 0, "fast", None, [], 0.5, 0.1, 0.2, 0.0, 0.0, 0.0,
                     0.0, 0.0, 0, 0, 64, 48)
            )  # fmt: skip
            found = spans(shape, start, end)
            for begin, stop, fate in found:
                clip_id = stable_id(shot_id, begin, stop)
                if fate == "clip":
                    t["clips"].append(
                        Clip(clip_id, shot_id, source_id, uri, index, begin, stop, begin, stop,
                             stop - begin, begin / FPS, stop / FPS, FPS, 64, 48,
                             "A red ball." if film.captioned else "", "csv", None, True, True)
                    )  # fmt: skip
                elif fate == "short":
                    name = shot_id if len(found) == 1 else clip_id
                    t["rejects"].append(Reject(name, "clips", "too_short", "", uri, False))
                else:
                    t["rejects"].append(Reject(clip_id, "filters", "black", "", uri, False))
                index += 1
    add_windows(world, t)
    add_pretrain(world, t)
    return t


def add_windows(world: World, t: dict[str, list[Any]]) -> None:
    for source in t["sources"]:
        clips = [c for c in t["clips"] if c.source_id == source.source_id]
        for i in range(len(clips) - world.scenes + 1):
            run = clips[i : i + world.scenes]
            ids = [c.clip_id for c in run]
            sample_id, score = stable_id(*ids), similarity(ids)
            if run[-1].index - run[0].index != world.scenes - 1:
                t["rejects"].append(
                    Reject(sample_id, "windows", "not_consecutive", "", source.uri, False)
                )
                continue
            pairs = world.scenes * (world.scenes - 1) // 2
            t["windows"].append(
                Window(sample_id, source.source_id, run[0].index, ids, [score] * pairs, score,
                       score, score, score, score, 0.0)
            )  # fmt: skip
            reason = "no_caption" if not run[0].caption else "below_threshold"
            if run[0].caption and score >= world.low:
                t["sft"].append(sample("sft", sample_id, run, score))
            else:
                t["rejects"].append(
                    Reject(sample_id, "manifest_sft", reason, "", source.uri, False, score)
                )


def add_pretrain(world: World, t: dict[str, list[Any]]) -> None:
    spoken = sorted((c for c in t["clips"] if c.caption), key=lambda c: similarity([c.clip_id]))
    for i in range(0, len(spoken), world.scenes):
        run = spoken[i : i + world.scenes]
        if len(run) == world.scenes:
            name = stable_id("pretrain", *(c.clip_id for c in run), 0)
            t["pretrain"].append(sample("pretrain", name, run, None))
        else:
            t["rejects"] += [
                Reject(c.clip_id, "manifest_pretrain", "unused_clip_use", "", c.uri, False)
                for c in run
            ]
    t["rejects"] += [
        Reject(c.clip_id, "manifest_pretrain", "no_caption", "", c.uri, False)
        for c in t["clips"]
        if not c.caption
    ]


def sample(kind: str, sample_id: str, clips: Sequence[Clip], score: float | None) -> Sample:
    scenes = [Scene(**{f: getattr(c, f) for f in Scene.__dataclass_fields__}) for c in clips]
    return Sample(sample_id, kind, "train", scenes, score, True)


def write(world: World, root: Path, weights: str = "", **settings: Any) -> Snapshot:
    snapshot, rows = Snapshot(root), tables(world)
    for table in (SOURCES, SHOTS, CLIPS, WINDOWS, REJECTS):
        write_table(snapshot.table(table.name), table, rows[table.name])
    for kind in ("sft", "pretrain"):
        notes = {"code_version": "1", "weights_sha256": weights}
        write_table(snapshot.manifest(kind), SAMPLES, rows[kind], notes)
    by_stage: dict[str, Counter[str]] = {}
    for reject in rows["rejects"]:
        by_stage.setdefault(reject.stage, Counter())[reject.reason] += 1
    counts = [
        StageCount(stage, "record", 100, 100 - r.total(), r.total(), reasons=dict(r)).to_dict()
        for stage, r in by_stage.items()
    ]
    write_json(snapshot.counts, counts)
    base = TriptychConfig().curation
    curation = base.model_copy(
        update={
            "manifests": base.manifests.model_copy(update={"low": world.low}),
            "windows": base.windows.model_copy(update={"scenes_per_sample": world.scenes}),
            **settings,
        }
    )
    write_text(root / "config.yaml", dump_yaml(TriptychConfig(curation=curation)))
    return snapshot


class Oracle:
    """Why records of one world are not in another, from what differs between the two."""

    def __init__(self, here: World, there: World, past: str) -> None:
        self.here, self.there, self.past = here, there, past
        self.number = {here.source_id(n): n for n in here.films}
        self.rows, self.others = tables(here), tables(there)

    def sources(self, source: Source) -> Why:
        n = self.number[source.source_id]
        film = self.there.films.get(n)
        if film is None or self.here.uri(n) != self.there.uri(n):
            return "sources", "new_file" if self.past else "gone"
        return "sources", self.past + "cannot_open" if film.content is None else "content_changed"

    def clips(self, clip: Clip) -> Why | None:
        n = self.number[clip.source_id]
        film = self.there.films.get(n)
        if film is None or film.content != self.here.films[n].content:
            return self.sources(
                next(s for s in self.rows["sources"] if self.number[s.source_id] == n)
            )
        if film.unread:
            return "shots", self.past + "timeout"
        for start, end, shape in shots_of(film):
            if clip.shot_id == stable_id(clip.source_id, start, end):
                fates = {(a, b): fate for a, b, fate in spans(shape, start, end)}
                if shape == "short":
                    return "clips", self.past + "too_short"
                match fates.get((clip.start_frame, clip.end_frame)):
                    case "clip":
                        return None
                    case "short":
                        return "clips", self.past + "too_short"
                    case "black":
                        return "filters", self.past + "black"
                    case _:
                        return "clips", "span_changed"
        return "shots", "boundaries_changed"

    def _first_clip(self, sample: Sample) -> Why | None:
        by_id = {c.clip_id: c for c in self.rows["clips"]}
        reasons = [self.clips(by_id[s.clip_id]) for s in sample.scenes]
        return next((r for r in reasons if r), None)

    def sft(self, sample: Sample) -> Why:
        if reason := self._first_clip(sample):
            return reason
        if self.here.scenes != self.there.scenes:
            return "windows", "settings_changed"
        ids = [s.clip_id for s in sample.scenes]
        others = [c for c in self.others["clips"] if c.source_id == sample.scenes[0].source_id]
        at = [i for i, c in enumerate(others) if c.clip_id in ids]
        if at[-1] - at[0] != len(ids) - 1:
            return "windows", "neighbours_changed"
        if others[at[-1]].index - others[at[0]].index != len(ids) - 1:
            return "windows", self.past + "not_consecutive"
        if not others[at[0]].caption:
            return "manifest_sft", self.past + "no_caption"
        assert similarity(ids) < self.there.low
        return "manifest_sft", self.past + "below_threshold"

    def pretrain(self, sample: Sample) -> Why:
        if reason := self._first_clip(sample):
            return reason
        captions = {c.clip_id: c.caption for c in self.others["clips"]}
        if not all(captions[s.clip_id] for s in sample.scenes):
            return "manifest_pretrain", self.past + "no_caption"
        same = self.here.scenes == self.there.scenes
        return "manifest_pretrain", "redrawn" if same else "settings_changed"


def key(row: Any) -> str:
    return getattr(row, {Source: "source_id", Clip: "clip_id", Sample: "sample_id"}[type(row)])


VALUES_OF = {
    "content": (0, 0, 1, None),
    "moved": (False, False, True),
    "unread": (False, False, True),
    "captioned": (True, True, False),
    "layout": (0, 0, 1),
}


@st.composite
def film_pairs(draw: st.DrawFn) -> tuple[Film | None, Film | None]:
    """A film before and after at most one change of it: else hardly a record would be kept."""
    values = {name: draw(st.sampled_from(found)) for name, found in VALUES_OF.items()}
    shapes = draw(st.tuples(*[st.sampled_from(SHAPES)] * 4))
    film = Film(**values, shapes=shapes)
    match draw(st.sampled_from(["same", "gone", "new", "shape", *VALUES_OF])):
        case "same":
            return film, film
        case "gone":
            return film, None
        case "new":
            return None, film
        case "shape":
            at = draw(st.integers(0, 3))
            shape = draw(st.sampled_from(SHAPES))
            return film, dataclasses.replace(film, shapes=(*shapes[:at], shape, *shapes[at + 1 :]))
        case name:
            value = draw(st.sampled_from(VALUES_OF[name]))
            return film, dataclasses.replace(film, **{name: value})


def worlds(
    films: Sequence[tuple[Film | None, Film | None]],
    lows: tuple[float, float],
    scenes: tuple[int, int],
) -> tuple[World, World]:
    sides = [{n: pair[i] for n, pair in enumerate(films) if pair[i]} for i in (0, 1)]
    return World(sides[0], lows[0], scenes[0]), World(sides[1], lows[1], scenes[1])


def check_against_the_films(old: World, new: World) -> set[Why]:
    """Compare a diff with the oracle; gives the reasons that occurred."""
    with tempfile.TemporaryDirectory() as folder:
        diff = diff_snapshots(write(old, Path(folder) / "old"), write(new, Path(folder) / "new"))
    json.dumps(diff.to_dict())
    before, after = tables(old), tables(new)
    forwards, backwards = Oracle(old, new, ""), Oracle(new, old, "was_")
    seen: set[Why] = set()
    for kind in ("sources", "clips", "sft", "pretrain"):
        had, has = {key(r) for r in before[kind]}, {key(r) for r in after[kind]}
        found = getattr(diff, kind)
        assert (found.old, found.new) == (len(had), len(has))
        assert found.kept == len(had & has)
        assert (found.dropped, found.added) == (len(had - has), len(has - had))
        for rows, others, oracle, reasons in (
            (before[kind], has, forwards, found.why_dropped),
            (after[kind], had, backwards, found.why_added),
        ):
            why = Counter(getattr(oracle, kind)(r) for r in rows if key(r) not in others)
            assert {(r.stage, r.reason): r.count for r in reasons} == why
            seen |= why.keys()
    for kind, column in (("sources", "uri"), ("clips", "caption")):
        values = {key(r): getattr(r, column) for r in before[kind]}
        values |= {key(r): getattr(r, column) for r in after[kind] if key(r) not in values}
        altered = sum(values[key(r)] != getattr(r, column) for r in after[kind])
        assert sum(r.count for r in getattr(diff, kind).altered) == altered
    return seen


@given(
    st.lists(film_pairs(), min_size=1, max_size=6),
    st.tuples(*[st.sampled_from([0.0, 0.5])] * 2),
    st.sampled_from([(2, 2), (3, 3), (3, 2)]),
)
@settings(max_examples=12, deadline=None)
def test_every_record_has_the_reason_that_the_films_give(
    films: Any, lows: tuple[float, float], scenes: tuple[int, int]
) -> None:
    check_against_the_films(*worlds(films, lows, scenes))


def test_each_reason_occurs() -> None:
    whole = Film()
    pairs: list[tuple[Film | None, Film | None]] = [(whole, whole), (whole, None)]
    changes: tuple[dict[str, Any], ...] = (
        {"content": 1}, {"content": None}, {"moved": True}, {"unread": True}, {"layout": 1},
        {"captioned": False}, {"shapes": ("whole", "black", "short", "whole")},
    )  # fmt: skip
    pairs += [(whole, dataclasses.replace(whole, **change)) for change in changes]
    halves, thirds, hole = (Film(shapes=(shape,) * 4) for shape in ("halves", "thirds", "hole"))
    pairs += [(halves, thirds), (halves, hole), (whole, halves)]
    there_and_back = pairs + [(after, before) for before, after in pairs]
    seen = check_against_the_films(*worlds(there_and_back, (0.0, 0.5), (2, 2)))
    seen |= check_against_the_films(*worlds(there_and_back, (0.5, 0.0), (2, 2)))
    seen |= check_against_the_films(*worlds(there_and_back, (0.0, 0.0), (3, 2)))
    rejected = {
        ("sources", "cannot_open"), ("shots", "timeout"), ("clips", "too_short"),
        ("filters", "black"), ("windows", "not_consecutive"), ("manifest_sft", "no_caption"),
        ("manifest_sft", "below_threshold"), ("manifest_pretrain", "no_caption"),
    }  # fmt: skip
    assert seen == rejected | {(stage, "was_" + reason) for stage, reason in rejected} | {
        ("sources", "gone"), ("sources", "new_file"), ("sources", "content_changed"),
        ("shots", "boundaries_changed"), ("clips", "span_changed"),
        ("windows", "neighbours_changed"), ("windows", "settings_changed"),
        ("manifest_pretrain", "settings_changed"), ("manifest_pretrain", "redrawn"),
    }  # fmt: skip


@pytest.fixture
def compare(tmp_path: Path) -> Callable[[World, World], SnapshotDiff]:
    def compare(old: World, new: World, **settings: Any) -> SnapshotDiff:
        return diff_snapshots(
            write(old, tmp_path / "old"), write(new, tmp_path / "new", **settings)
        )

    return compare


def test_files_are_named_with_the_reason(compare: Callable[..., SnapshotDiff]) -> None:
    old = World({0: Film(), 1: Film(), 2: Film(), 3: Film(content=None)})
    new = World({0: Film(content=1), 1: Film(moved=True), 3: Film(), 4: Film()})
    diff = compare(old, new).sources
    assert diff.why_dropped == [
        Reason("sources", "content_changed", 1, ["/films/0.mp4"]),
        Reason("sources", "gone", 1, ["/films/2.mp4"]),
    ]
    assert diff.why_added == [
        Reason("sources", "content_changed", 1, ["/films/0.mp4"]),
        Reason("sources", "new_file", 1, ["/films/4.mp4"]),
        Reason("sources", "was_cannot_open", 1, ["/films/3.mp4"]),
    ]
    renaming = "/films/1.mp4 → /films/1_moved.mp4"
    assert diff.altered == [Reason("sources", "renamed", 1, [renaming])]


def test_settings_that_change_tables_are_named(compare: Callable[..., SnapshotDiff]) -> None:
    world = World({0: Film()})
    base = TriptychConfig().curation
    diff = compare(
        world,
        dataclasses.replace(world, low=0.5),
        clips=base.clips.model_copy(update={"max_s": None}),
        drift=DriftConfig(max_distance=0.5),
        max_error_ratio=0.1,
        weights="other",
    )
    assert [(s.key, s.old, s.new) for s in diff.settings] == [
        ("curation.clips.max_s", 60.0, None),
        ("curation.manifests.low", 0.0, 0.5),
        ("similarity weights", "", "other"),
    ]


def test_settings_that_one_version_does_not_know_are_compared_too(tmp_path: Path) -> None:
    old, new = write(World({0: Film()}), tmp_path / "a"), write(World({0: Film()}), tmp_path / "b")
    config = (old.root / "config.yaml").read_text(encoding="utf-8")
    config = config.replace("scenes_per_sample:", "scenes_per_row:")
    write_text(old.root / "config.yaml", config)
    assert {(s.key, s.old, s.new) for s in diff_snapshots(old, new).settings} == {
        ("curation.windows.scenes_per_row", 2, None),
        ("curation.windows.scenes_per_sample", None, 2),
    }
    (old.root / "config.yaml").unlink()
    with pytest.raises(ManifestError, match="settings it was made with"):
        diff_snapshots(old, new)


def test_a_snapshot_does_not_differ_from_itself(tmp_path: Path) -> None:
    films = {n: Film(shapes=SHAPES[n : n + 4], captioned=n > 0) for n in range(3)}
    snapshot = write(World(films), tmp_path / "same")
    diff = diff_snapshots(snapshot, snapshot)
    assert all(r.added == r.dropped == 0 and not r.altered for r in diff.records.values())
    assert all(d.distance == 0 and d.old == d.new for d in diff.drift)
    assert all(s.change == 0 for s in diff.shares)
    assert not diff.settings
    check_drift(
        diff, snapshot, DriftConfig(max_dropped_ratio=0, max_reject_change=0, max_distance=0)
    )


VALUES = st.lists(st.integers(-5, 5).map(float) | st.floats(-1, 1), max_size=20)


@given(VALUES, VALUES)
def test_distance_is_the_largest_gap_of_distribution_functions(
    a: list[float], b: list[float]
) -> None:
    def share(values: list[float], x: float) -> float:
        return sum(v <= x for v in values) / len(values)

    if a and b:
        expected = max(abs(share(a, x) - share(b, x)) for x in a + b)
    else:
        expected = float(bool(a) != bool(b))
    found = ks_distance(np.array(a, np.float64), np.array(b, np.float64))
    assert found == pytest.approx(expected, abs=1e-12)


def test_drift_holds_both_distributions(tmp_path: Path) -> None:
    old = write(World({0: Film()}), tmp_path / "old")
    new = write(World({0: Film(shapes=("whole", "whole", "halves", "black"))}), tmp_path / "new")
    diff = diff_snapshots(old, new)
    drift = {d.name: d for d in diff.drift}
    assert list(drift) == ["duration_s", "height_px", "fps", "similarity"]
    length = drift["duration_s"]
    assert (length.old.n, length.old.mean, length.old.quantiles) == (4, 4.0, [4.0] * 5)
    assert (length.new.n, length.new.mean) == (4, pytest.approx(2.4))
    assert length.new.quantiles == pytest.approx(
        np.quantile([0.8, 0.8, 4, 4], [0.05, 0.25, 0.5, 0.75, 0.95])
    )
    assert length.distance == 0.5
    assert sum(length.old.counts) == sum(length.new.counts) == 4
    assert (length.edges[0], length.edges[-1]) == (pytest.approx(0.8), 4.0)
    for snapshot, values in ((old, (0.1, None)), (new, (0.1, 0.2))):
        rows = [CaptionScore(str(i), "m", "", "truncate", 1, v) for i, v in enumerate(values)]
        write_table(snapshot.table("caption_scores"), CAPTION_SCORES, rows)
    captions = diff_snapshots(old, new).drift[-1]
    assert (captions.name, captions.old.n, captions.new.n) == ("caption_similarity", 1, 2)
    assert captions.distance == 0.5


def test_share_of_records_left_out_per_stage_and_reason(tmp_path: Path) -> None:
    old, new = write(World({}), tmp_path / "old"), write(World({}), tmp_path / "new")
    count = StageCount("filters", "clip", 10, 6, 3, 1, reasons={"black": 3, "io_error": 1})
    write_json(old.counts, [count.to_dict()])
    filters = StageCount("filters", "clip", 20, 18, 2, reasons={"static": 2})
    scores = StageCount("scores", "clip", 18, 9, 9, reasons={"text": 9})
    write_json(new.counts, [filters.to_dict(), scores.to_dict()])
    shares = diff_snapshots(old, new).shares
    assert [(s.stage, s.reason, s.old_share, s.new_share) for s in shares] == [
        ("filters", None, 0.4, 0.1),
        ("filters", "black", 0.3, 0.0),
        ("filters", "io_error", 0.1, 0.0),
        ("filters", "static", 0.0, 0.1),
        ("scores", None, 0.0, 0.5),
        ("scores", "text", 0.0, 0.5),
    ]


def test_each_limit_is_checked_alone_and_named(tmp_path: Path) -> None:
    old = write(World({0: Film(), 1: Film()}), tmp_path / "old")
    new = write(World({0: Film(), 1: Film(layout=1, shapes=("black",) * 4)}), tmp_path / "new")
    diff = diff_snapshots(old, new)
    # Clips of 4 s alone on both sides: no drift of durations; all four of one film are gone.
    for limits, words in (
        ({"max_dropped_ratio": 0.49}, "4 of 8 clips are gone .0.500., 2 of them by filters/black"),
        ({"max_reject_change": 0.03}, "stage filters left out 0.000 of its records, now 0.040"),
    ):
        with pytest.raises(DriftTooLarge, match=words) as error:
            check_drift(diff, new, DriftConfig(**limits))
        assert next(iter(limits)) in str(error.value.expected)
        assert error.value.where == new.root
        assert f"triptych diff {old.root.name} {new.root.name}" in str(error.value.do)
        check_drift(diff, new, DriftConfig(**{k: v + 0.01 for k, v in limits.items()}))
    check_drift(diff, new, DriftConfig())
    other = write(World({0: Film(shapes=("halves",) * 4), 1: Film()}), tmp_path / "other")
    diff = diff_snapshots(old, other)
    with pytest.raises(DriftTooLarge, match=r"distributions of duration_s are 0\.667 apart"):
        check_drift(diff, other, DriftConfig(max_distance=0.66))
    check_drift(diff, other, DriftConfig(max_distance=0.67))


def test_nothing_left_is_the_largest_drift(tmp_path: Path) -> None:
    old, new = write(World({0: Film()}), tmp_path / "old"), write(World({}), tmp_path / "new")
    diff = diff_snapshots(old, new)
    assert {d.distance for d in diff.drift} == {1.0}
    assert (diff.clips.dropped, diff.clips.new) == (4, 0)
    back = diff_snapshots(new, old)
    check_drift(back, old, DriftConfig(max_dropped_ratio=0.0))
