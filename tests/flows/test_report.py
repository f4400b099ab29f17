"""The report page: what it says of a small workspace written with the real schema writers."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from curation.mp4 import write_mp4
from curation.probe import probe
from flows import cli
from flows.charts import moving_mean, similarity_histogram
from flows.report import build_report, merge_counts
from flows.sheets import evenly
from schemas.config import TriptychConfig, dump_yaml
from schemas.counts import StageCount
from schemas.errors import InputError
from schemas.layout import Snapshot, Workspace
from schemas.rows import Clip, Generation, Reject, Sample, Scene, Score, Shot, Source, Window
from schemas.storage import mark_done, point_latest, write_json, write_text
from schemas.tables import (
    CLIPS,
    GENERATIONS,
    REJECTS,
    SAMPLES,
    SCORES,
    SHOTS,
    SOURCES,
    WINDOWS,
    read_table,
    write_table,
)

EVIL = "A <script>alert('x')</script> & a \"red\" bull"
FRAMES_PER_SHOT = 12
CONFIG = TriptychConfig()


def film(path: Path, seed: int, shots: int = 4) -> Source:
    """A film of flat-coloured shots with a moving bar."""
    rng = np.random.default_rng(seed)
    frames = np.empty((shots * FRAMES_PER_SHOT, 48, 64, 3), np.uint8)
    for shot in range(shots):
        frames[shot * FRAMES_PER_SHOT : (shot + 1) * FRAMES_PER_SHOT] = rng.integers(30, 220, 3)
    for i, frame in enumerate(frames):
        frame[:, i % 60 : i % 60 + 4] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, frames, 12)
    return replace(probe(path), num_frames=len(frames), duration_s=len(frames) / 12, is_vfr=False)


def shot_and_clip(source: Source, index: int, caption: str) -> tuple[Shot, Clip]:
    start, end = index * FRAMES_PER_SHOT, (index + 1) * FRAMES_PER_SHOT
    pts = source.time_base_den // source.time_base_num // 12
    shot = Shot(
        f"{source.source_id}-shot-{index}", source.source_id, index, start * pts, end * pts, start,
        end, start / 12, end / 12, "cut", "cut", 0, 0, "fast", None, [], 0.5, 0.1, 0.2,
        0.0, 0.0, 0.0, 0.0, 0.0, 0, 0, source.width_px, source.height_px,
    )  # fmt: skip
    clip = Clip(
        f"{source.source_id}-clip-{index}", shot.shot_id, source.source_id, source.uri, index,
        start * pts, end * pts, start, end, end - start, start / 12, end / 12, 12.0, 64, 48,
        caption, "panda70m_csv", None, False, True,
    )  # fmt: skip
    return shot, clip


def write_snapshot(workspace: Workspace, videos: Path) -> Snapshot:
    """Two films of four shots; the last shot of each is rejected; two windows of three clips."""
    sources = [film(videos / name, seed) for seed, name in enumerate(("a <b>.mp4", "second.mp4"))]
    pairs = [
        shot_and_clip(s, i, EVIL if i == 0 else f"shot {i}") for s in sources for i in range(4)
    ]
    clips = [c for _, c in pairs if c.index < 3]
    windows, samples = [], []
    for source, similarity in zip(sources, (-0.25, 0.75), strict=True):
        members = [c for c in clips if c.source_id == source.source_id]
        windows.append(
            Window(f"window-{source.source_id}", source.source_id, 0,
                   [c.clip_id for c in members], [similarity] * 3, *[similarity] * 5, 0.0)
        )  # fmt: skip
        if similarity > 0:
            fields = Scene.__dataclass_fields__
            scenes = [Scene(**{f: getattr(c, f) for f in fields}) for c in members]
            samples.append(Sample(windows[-1].sample_id, "sft", "train", scenes, similarity, True))
    rejects = [
        Reject(s.shot_id, "clips", "too_short", "8 frames", s.source_id, False)
        for s, _ in pairs
        if s.index == 3
    ]
    rejects += [
        Reject("x", "sources", "empty_file", "zero bytes", "/films/empty.mp4", False),
        Reject(windows[0].sample_id, "manifests", "below_threshold", "", "", False, -0.25),
    ]
    snapshot = Snapshot(workspace.dataset("demo") / "abc123")
    for table, rows in (
        (SOURCES, sources), (SHOTS, [s for s, _ in pairs]), (CLIPS, clips), (WINDOWS, windows),
        (REJECTS, rejects),
    ):  # fmt: skip
        write_table(snapshot.table(table.name), table, rows)
    write_table(snapshot.manifest("sft"), SAMPLES, samples)
    write_table(snapshot.manifest("pretrain"), SAMPLES, [])
    counts = [
        StageCount("sources", "file", 3, 2, rejected=1, reasons={"empty_file": 1}, seconds=1.5),
        StageCount("clips", "shot", 8, 6, rejected=2, reasons={"too_short": 2}, seconds=0.5),
    ]
    write_json(snapshot.counts, [c.to_dict() for c in counts])
    mark_done(snapshot.root, {"created_at": "2026-03-01T12:34:56+00:00"})
    point_latest(workspace.dataset("demo"), "abc123")
    return snapshot


def write_run(workspace: Workspace, stage: str, finished: bool) -> None:
    run = workspace.runs / f"{stage}-1234"
    run.mkdir(parents=True)
    lines = [
        json.dumps({"step": i, "loss": 1 / i, "conditional": i % 2 == 0, "lr": 1e-3,
                    "grad_norm": 0.5, "samples_per_s": 4.0, "seconds": 0.5})
        for i in range(1, 11)
    ]  # fmt: skip
    # A repeated step (a resumed run) and a line cut short (a killed one) must not count.
    (run / "metrics.jsonl").write_text("\n".join([*lines, lines[-1], lines[0][:9]]))
    if finished:
        mark_done(run, {})


def write_batch(workspace: Workspace) -> None:
    batch = workspace.generations / "batch1"
    prompts = [EVIL, "two", "three", "four"]
    good = Generation("gen1", "bird", "done", "videos/gen1.mp4", "e" * 64, prompts, [""] * 4,
                      [7] * 4, 4, 0, 1, [9] * 4, 36, 96, 64, 8, "ddim", 12, 6.0, "f" * 64,
                      "")  # fmt: skip
    bad = replace(good, generation_id="gen2", prompt_id="whale", status="failed", error="no memory")
    frames = np.random.default_rng(0).integers(0, 255, (36, 64, 96, 3), dtype=np.uint8)
    workspace.videos.mkdir(parents=True)
    write_mp4(workspace.videos / "gen1.mp4", frames, 8)
    write_table(batch / "generations.parquet", GENERATIONS, [good, bad])
    write_table(batch / "rejects.parquet", REJECTS, [])
    scores = [Score("gen1", "bird", "color-layout", 0.5, None, None, 4)]
    write_table(batch / "scores.parquet", SCORES, scores)
    count = StageCount("generate", "prompt", 2, 1, failed=1, reasons={"no_memory": 1})
    write_json(batch / "counts.json", [count.to_dict()])
    point_latest(workspace.generations, "batch1")


def write_ablation(workspace: Workspace) -> None:
    rows = [
        {"statistic": "min_pairwise", "low": low, "high": 0.995, "kept_windows": kept,
         "clips": 3 * kept, "hours": 0.1, "sources": kept,
         "mean_similarity": 0.7 if kept else None}
        for low, kept in ((0.9, 0), (0.0, 1), (-1.0, 2))
    ]  # fmt: skip
    folder = workspace.ablations / "abl1"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "results.parquet")
    point_latest(workspace.ablations, "abl1")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = tmp_path_factory.mktemp("report")
    made = Workspace(root / "workspace")
    write_snapshot(made, root / "videos")
    write_run(made, "pretrain", finished=True)
    write_run(made, "sft", finished=False)
    write_batch(made)
    write_ablation(made)
    return made


@pytest.fixture(scope="module")
def page(workspace: Workspace) -> str:
    path = build_report(CONFIG, workspace)
    assert path == workspace.reports / "report.html"
    return path.read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Collects ids, links, elements and table rows of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data.strip()

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def test_counts_of_every_stage_are_there(page: str) -> None:
    rows = Reader(page).rows
    assert ["sources", "file", "3", "2", "1", "0", "–", "0", "1.5"] in rows
    assert ["clips", "shot", "8", "6", "2", "0", "–", "0", "0.5"] in rows
    assert ["pretrain", "step", "10", "10", "0", "0", "–", "0", "5.0"] in rows
    assert ["generate", "prompt", "2", "1", "0", "1", "–", "0", "0.0"] in rows
    assert "in each of the 5 stages, input = kept + rejected + failed" in page


def test_counts_that_do_not_reconcile_are_said(workspace: Workspace) -> None:
    lost = StageCount("shots", "source", input=3, kept=1)
    page = build_report(CONFIG, workspace, "lost", [lost]).read_text(encoding="utf-8")
    assert "The counts do not reconcile" in page
    assert "stage 'shots'" in Reader(page).text


def test_fresh_counts_replace_stored_ones_in_their_place() -> None:
    stored = [StageCount(s, "x", 1, 1) for s in ("sources", "pretrain", "sft", "generate")]
    fresh = [
        StageCount(s, "x", 2, 2) for s in ("latents", "pretrain", "latents", "sft", "evaluate")
    ]
    merged = merge_counts(stored, fresh)
    assert [(c.stage, c.input) for c in merged] == [
        ("latents", 2), ("sources", 1), ("pretrain", 2), ("latents", 2), ("sft", 2),
        ("evaluate", 2), ("generate", 1),
    ]  # fmt: skip
    assert merge_counts(stored, []) == stored
    assert merge_counts([], fresh) == fresh


def test_rejects_are_grouped_by_reason_with_examples(page: str) -> None:
    rows = {row[1]: row for row in Reader(page).rows if len(row) == 4}
    assert rows["empty_file"][2:] == ["1", "empty.mp4:zero bytes"]
    assert rows["too_short"][2] == "2"
    assert "score -0.250" in rows["below_threshold"][3]


def test_strangers_text_is_escaped(page: str) -> None:
    reader = Reader(page)
    assert reader.all("script") == []
    assert EVIL in reader.text
    assert "a <b>.mp4" in reader.text


def test_page_is_whole_and_loads_nothing(page: str) -> None:
    reader = Reader(page)
    ids = [a["id"] for _, a in reader.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    links = [a["href"] or "" for a in reader.all("a")]
    inside = {link for link in links if link.startswith("#")}
    assert inside and inside <= {f"#{name}" for name in ids}
    assert set(links) - inside == {"../ablations/abl1/index.html"}
    sources = [str(a["src"]) for _, a in reader.tags if "src" in a]
    assert sources and all(s.startswith("data:") for s in sources)
    assert all(a.get("alt") for a in reader.all("img"))
    assert not re.search(r"url\((?!#)|@import", page)
    assert "object at 0x" not in page and "None" not in reader.text


def test_shots_and_clips_are_shown(page: str) -> None:
    reader = Reader(page)
    assert sum("Four frames of shot" in (a["alt"] or "") for a in reader.all("img")) == 8
    assert reader.text.count("left out: too_short") == 2
    assert "a <b>.mp4" in " ".join(row[0] for row in reader.rows if len(row) == 7)


def test_windows_on_both_sides_of_the_threshold(page: str) -> None:
    section = page[page.index("<h3>Just below") : page.index('id="training"')]
    found = re.findall(r"<h3>(\w+ \w+)|<strong>(.+?)</strong>.*<span.*?>(.+?)</span>", section)
    assert [" ".join(part for part in f if part) for f in found] == [
        "Just below", "-0.250 below_threshold",
        "Just above", "0.750 kept for SFT",
        "Most similar", "-0.250 below_threshold", "0.750 kept for SFT",
    ]  # fmt: skip


def test_runs_and_videos_are_described(page: str) -> None:
    text = re.sub(r"\s+", " ", Reader(page).text)
    assert "sft-1234, not finished" in text and "pretrain-1234, not finished" not in text
    assert "5 of 10" in text
    assert len(Reader(page).all("video")) == 1
    assert "no memory" in text
    assert "seed 7 · ddim, 12 steps, guidance 6" in text
    assert ["bird", "50.00", "–", "–"] in Reader(page).rows
    assert "not comparable" in text
    assert "2026-03-01 12:34 UTC" in text
    assert text.count("added by extension") == 2


def test_ablation_is_sorted_by_threshold(page: str) -> None:
    kept = [row[1:4:2] for row in Reader(page).rows if row[0] == "min_pairwise"]
    assert kept == [["-1", "2"], ["0", "1"], ["0.9", "0"]]
    assert 'href="../ablations/abl1/index.html"' in page


def write_next_snapshot(workspace: Workspace, first: Snapshot) -> Snapshot:
    """A refresh without the first film, with the second renamed, and with another setting."""
    second = Snapshot(first.root.with_name("def456"))
    shutil.copytree(first.root, second.root)
    sources = read_table(first.table("sources"), SOURCES)
    kept = next(s for s in sources if s.uri.endswith("second.mp4"))
    for table in (SOURCES, SHOTS, CLIPS, WINDOWS):
        rows = [
            r for r in read_table(first.table(table.name), table) if r.source_id == kept.source_id
        ]
        if table is SOURCES:
            rows = [replace(kept, uri=kept.uri.replace("second", "<renamed>"))]
        write_table(second.table(table.name), table, rows)
    samples = [s for s in read_table(first.manifest("sft"), SAMPLES) if kept.uri == s.scenes[0].uri]
    write_table(second.manifest("sft"), SAMPLES, samples)
    write_json(second.counts, [StageCount("sources", "file", 1, 1).to_dict()])
    write_text(first.root / "config.yaml", dump_yaml(CONFIG))
    manifests = CONFIG.curation.manifests.model_copy(update={"near_duplicate": None})
    curation = CONFIG.curation.model_copy(update={"manifests": manifests})
    changed = CONFIG.model_copy(update={"curation": curation})
    write_text(second.root / "config.yaml", dump_yaml(changed))
    mark_done(second.root, {"created_at": "2026-03-02T12:34:56+00:00", "previous": "abc123"})
    point_latest(workspace.dataset("demo"), "def456")
    return second


def test_what_changed_since_the_last_refresh(tmp_path: Path) -> None:
    made = Workspace(tmp_path / "workspace")
    first = write_snapshot(made, tmp_path / "videos")
    assert 'id="since"' not in build_report(CONFIG, made).read_text(encoding="utf-8")
    write_next_snapshot(made, first)
    page = build_report(CONFIG, made).read_text(encoding="utf-8")
    section = page[page.index('id="since"') : page.index('id="sources"')]
    rows = Reader(section).rows
    assert ["sources", "2", "1", "0", "1", "1"] in rows
    assert ["clips", "6", "3", "0", "3", "3"] in rows
    why = dict(row for row in rows if len(row) == 2)
    assert why["records"] == "by stage and reason"
    assert why["sources dropped"] == "1 × sourcesgone:a <b>.mp4"
    renaming = "second.mp4 → <renamed>.mp4"
    assert why["sources kept, but changed"] == f"1 × sourcesrenamed:{renaming}"
    assert why["clips dropped"] == "3 × sourcesgone:a <b>.mp4"
    assert ["curation.manifests.near_duplicate", "0.995", "–"] in rows
    assert ["similarity", "2 → 1"] in [row[:2] for row in rows]
    assert ["sources", "any", "33.3 %", "0.0 %", "-33.3"] in rows
    assert page.count('aria-label="Histograms of ') == 2  # durations and similarities
    assert "None" not in Reader(section).text
    ids = [attrs["id"] for _, attrs in Reader(page).tags if attrs.get("id")]
    assert len(ids) == len(set(ids))


def test_a_snapshot_before_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    made = Workspace(tmp_path / "workspace")
    first = write_snapshot(made, tmp_path / "videos")
    write_next_snapshot(made, first)
    first.table("clips").write_bytes(b"broken")
    text = Reader(build_report(CONFIG, made).read_text(encoding="utf-8")).text
    assert "cannot be compared with it: table 'clips' cannot be read as Parquet" in text
    shutil.rmtree(first.root)
    assert "Since the last refresh" not in build_report(CONFIG, made).read_text(encoding="utf-8")


def test_the_command_shows_the_same(tmp_path: Path) -> None:
    made = Workspace(tmp_path / "workspace")
    first = write_snapshot(made, tmp_path / "videos")
    at = ["diff", "--workspace", str(made.root)]
    with pytest.raises(InputError, match="took the place of none"):
        CliRunner().invoke(cli.app, at, catch_exceptions=False)
    write_next_snapshot(made, first)
    shown = CliRunner().invoke(cli.app, at, catch_exceptions=False).output
    assert "abc123 → def456" in shown
    assert "clips dropped: 3 sources/gone" in shown
    assert "setting curation.manifests.near_duplicate: 0.995 → –" in shown
    assert max(len(line) for line in shown.splitlines()) <= 80
    assert CliRunner().invoke(cli.app, [*at, "abc123"]).output == shown
    assert CliRunner().invoke(cli.app, [*at, "abc123", "def456"]).output == shown
    found = json.loads(CliRunner().invoke(cli.app, [*at, "def456", "abc123", "--json"]).output)
    assert (found["old"], found["clips"]["added"]) == ("def456", 3)
    with pytest.raises(InputError, match="found: nothing"):
        CliRunner().invoke(cli.app, [*at, "nothing"], catch_exceptions=False)


def test_parts_not_run_are_named_with_their_command(tmp_path: Path) -> None:
    page = build_report(CONFIG, Workspace(tmp_path)).read_text(encoding="utf-8")
    for command in ("refresh", "train", "generate", "evaluate", "ablate"):
        assert f"not run yet: <code>triptych {command}</code>" in page
    assert "texture, not film" in page


def test_a_moved_source_leaves_a_page_that_says_so(tmp_path: Path) -> None:
    made = Workspace(tmp_path / "workspace")
    write_snapshot(made, tmp_path / "videos")
    shutil.rmtree(tmp_path / "videos")
    page = build_report(CONFIG, made).read_text(encoding="utf-8")
    # Eight shots; one window below the threshold, one above, both again as the most similar.
    assert page.count("No frames:") == 8 + 3 * (1 + 1 + 2)


def test_frames_once_shown_outlive_their_source(tmp_path: Path) -> None:
    made = Workspace(tmp_path / "workspace")
    write_snapshot(made, tmp_path / "videos")
    first = Reader(build_report(CONFIG, made).read_text(encoding="utf-8")).all("img")
    shutil.rmtree(tmp_path / "videos")
    again = Reader(build_report(CONFIG, made).read_text(encoding="utf-8")).all("img")
    assert len(first) == 20 and again == first


def test_videos_beyond_the_page_s_room_are_named(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.sheets.MAX_MEDIA_BYTES", 100)
    page = build_report(CONFIG, workspace, "small").read_text(encoding="utf-8")
    assert Reader(page).all("video") == []
    assert "Left out to keep this page small: gen1.mp4" in page


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.floats(-1, 1))
@settings(max_examples=5)
def test_histogram_counts_every_window(values: list[float], low: float) -> None:
    svg = similarity_histogram(values, "min_pairwise", low, 1.0)
    kept = sum(v >= low for v in values)
    assert f"over {len(values)} windows" in svg
    assert f"{kept} lie in the band" in svg


def test_only_a_tiny_model_is_called_tiny(tmp_path: Path) -> None:
    model = CONFIG.training.model.model_copy(update={"base": "models/CogVideoX-2b"})
    training = CONFIG.training.model_copy(update={"model": model})
    config = CONFIG.model_copy(update={"training": training})
    page = build_report(config, Workspace(tmp_path)).read_text(encoding="utf-8")
    assert "texture, not film" not in page


@given(st.integers(0, 500), st.integers(2, 20))
def test_evenly_spreads_over_everything(count: int, cap: int) -> None:
    picked = evenly(count, cap)
    assert len(picked) == min(count, cap)
    assert picked == sorted(set(picked))
    if count:
        assert (picked[0], picked[-1]) == (0, count - 1)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=80))
def test_moving_mean_is_the_mean_of_the_last_values(values: list[float]) -> None:
    k = max(5, len(values) // 10)
    expected = [np.mean(values[max(0, i + 1 - k) : i + 1]) for i in range(len(values))]
    np.testing.assert_allclose(moving_mean(values), expected, atol=1e-9)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_browser_opens_it_without_complaint(workspace: Workspace) -> None:
    from playwright.sync_api import sync_playwright

    path = build_report(CONFIG, workspace, "browser")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        view = browser.new_page(viewport={"width": 360, "height": 780})
        problems: list[str] = []
        view.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        view.on("pageerror", lambda e: problems.append(str(e)))
        view.on("requestfailed", lambda r: problems.append(r.url[:200]))
        view.goto(path.as_uri())
        view.wait_for_function("document.querySelector('video').readyState >= 2", timeout=20_000)
        assert view.evaluate("document.querySelector('video').videoWidth") == 96
        assert view.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert view.evaluate(overflow) == 0
        assert problems == []
        browser.close()
