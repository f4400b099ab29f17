"""The ablation flow: what it publishes, under which id, and what it trains."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from curation.mp4 import write_mp4
from flows import cli
from flows.ablate import ablate_thresholds, publish, show_cells, train_cells
from flows.ablation import Ablation
from flows.console import out
from inference.prompts import write_prompts
from schemas.config import TriptychConfig, load_config
from schemas.errors import ConfigError, ManifestError
from schemas.layout import Snapshot, Workspace
from schemas.rows import Prompt
from schemas.storage import latest, read_done
from schemas.tables import LATENTS, SAMPLES, read_table
from tests.flows.small_ablation import settings, write_snapshot

SIMILARITIES = [0.2, 0.6, 0.7, 0.4]


def made(root: Path, *more: str) -> Ablation:
    return Ablation(settings(root, *more), write_snapshot(root, SIMILARITIES))


def test_results_are_plain_parquet_with_the_same_columns_whatever_is_known(tmp_path: Path):
    truth = tmp_path / "truth.csv"
    truth.write_text("uri,start_s,end_s,story\na <b>.mp4,0,9,x\n")
    bare = made(tmp_path)
    asked = made(tmp_path, f"curation.ablation.truth={truth}")
    for ablation in (bare, asked):
        publish.fn(ablation, [])
    frame = pd.read_parquet(bare.folder / "results.parquet")
    assert frame["kept_windows"].tolist() == [4, 2, 0]
    assert frame["rejected_below_threshold"].tolist() == [0, 2, 4]
    assert frame["mean_similarity"].isna().tolist() == [False, False, True]
    assert pd.read_parquet(asked.folder / "results.parquet")["recall"].tolist() == [1.0, 0.5, 0.0]
    schemas = [pq.read_schema(a.folder / "results.parquet") for a in (bare, asked)]
    assert schemas[0].equals(schemas[1])
    assert schemas[0].metadata[b"triptych.snapshot"] == b"abc123"
    overlap = pd.read_parquet(bare.folder / "overlap.parquet").set_index(["cell", "other"])
    assert overlap["jaccard"].to_dict()[0, 1] == 0.5
    assert len(overlap) == 9


def test_reasons_and_kept_windows_account_for_every_window(tmp_path: Path):
    ablation = made(tmp_path, "curation.manifests.near_duplicate=0.72",
                    "curation.manifests.max_per_source=1")  # fmt: skip
    for row in ablation.results():
        left_out = sum(
            getattr(row, n) for n in row.__dataclass_fields__ if n.startswith("rejected")
        )
        assert row.kept_windows + left_out == row.input_windows == 4
    # 0.7 is a near duplicate, 0.6 the best of what remains.
    assert [row.kept_windows for row in ablation.results()] == [1, 1, 0]


def test_the_id_is_of_what_decides_the_results(tmp_path: Path):
    truth = tmp_path / "truth.csv"
    truth.write_text("uri,start_s,end_s,story\na <b>.mp4,0,9,x\n")
    folder = made(tmp_path).folder
    assert made(tmp_path, "curation.ablation.max_minutes=1").folder == folder
    assert made(tmp_path, "training.sft.steps=1").folder == folder
    with_truth = made(tmp_path, f"curation.ablation.truth={truth}").folder
    truth.write_text("uri,start_s,end_s,story\na <b>.mp4,0,8,x\n")
    others = [
        with_truth,
        made(tmp_path, f"curation.ablation.truth={truth}").folder,
        made(tmp_path, "curation.ablation.lows=[0.5]").folder,
        made(tmp_path, "curation.ablation.statistics=[mean_adjacent]").folder,
        made(tmp_path, "curation.manifests.max_per_source=1").folder,
        made(tmp_path, "curation.ablation.train_cells=1").folder,
        made(tmp_path, "curation.ablation.train_cells=1", "training.sft.steps=1").folder,
    ]
    assert len({folder, *others}) == 8


def test_the_page_is_the_same_bytes_each_time(tmp_path: Path):
    pages = []
    for _ in range(2):
        ablation = made(tmp_path)
        publish.fn(ablation, [])
        pages.append((ablation.folder / "index.html").read_bytes())
    assert pages[0] == pages[1]


def test_cells_to_train_differ_and_have_something_to_train_on(tmp_path: Path):
    lows = "curation.ablation.lows=[-1, 0.1, 0.3, 0.5, 0.65, 0.9]"
    assert made(tmp_path, lows).groups() == [[0, 1], [2], [3], [4], [5]]
    asked = [made(tmp_path, lows, f"curation.ablation.train_cells={n}").chosen() for n in range(6)]
    assert asked == [[], [0], [0, 4], [0, 3, 4], [0, 2, 3, 4], [0, 2, 3, 4]]
    # Everything is held out for validation.
    held_out = ("curation.manifests.val_percent=50", "curation.manifests.test_percent=50")
    none = made(tmp_path, lows, "curation.ablation.train_cells=2", *held_out)
    assert none.chosen() == []


def test_a_cell_has_the_manifest_of_its_threshold(tmp_path: Path):
    ablation = made(tmp_path)
    for number, cell in enumerate(ablation.sweep.cells):
        ids = ablation.windows["sample_id"].take(ablation.sweep.kept(number)).to_pylist()
        assert sorted(ablation.manifest(number).sample_ids.to_pylist()) == sorted(ids)
        assert len(ids) == cell.kept_windows


def test_quantiles_are_quantiles(tmp_path: Path):
    band = "curation.manifests.band=quantile"
    with pytest.raises(ConfigError, match="not quantiles"):
        made(tmp_path, band)
    rows = made(tmp_path, band, "curation.ablation.lows=[0, 0.5, 1]").results()
    assert [(r.low_similarity, r.kept_windows) for r in rows] == [(0.2, 4), (0.4, 3), (0.7, 1)]


def test_missing_prompts_are_found_before_anything_is_trained(tmp_path: Path):
    with pytest.raises(ManifestError, match=r"no\.parquet"):
        made(tmp_path, "curation.ablation.train_cells=1", "generation.prompts=no.parquet")


def test_the_printed_table_fits_80_columns(tmp_path: Path):
    truth = tmp_path / "truth.csv"
    truth.write_text("uri,start_s,end_s,story\na <b>.mp4,0,9,x\n")
    ablation = made(tmp_path, f"curation.ablation.truth={truth}")
    with out.capture() as printed:
        show_cells(ablation.results())
    lines = printed.get().splitlines()
    assert lines[0].startswith("4 windows: kept for sft, by lowest min_pairwise")
    assert any(line.split()[:4] == ["0.5", "2", "4", "1"] for line in lines)
    assert "sequence" not in printed.get()
    several = "curation.ablation.statistics=[min_pairwise, mean_adjacent]"
    with out.capture() as printed:
        show_cells(made(tmp_path, f"curation.ablation.truth={truth}", several).results())
    assert "recall" in printed.get() and "…" not in printed.get()
    assert max(map(len, printed.get().splitlines())) <= 80


def test_options_are_settings():
    shown = CliRunner().invoke(cli.app, ["ablate", "--low", "0.2", "--statistic", "least"])
    assert isinstance(shown.exception, ConfigError)
    assert "curation.ablation.statistics.0" in str(shown.exception)


REDS = [(200, 40, 30), (140, 20, 20), (240, 90, 60), (110, 30, 50)]
BLUES = [(30, 40, 200), (20, 60, 140), (70, 120, 250), (50, 30, 110)]


def write_compilations(folder: Path) -> None:
    """Three films, each four red shots of one story and then four blue ones of another."""
    folder.mkdir()
    captions = io.StringIO()
    rows = csv.writer(captions)
    rows.writerow(["videoID", "url", "timestamp", "caption", "matching_score"])
    truth = ["uri,start_s,end_s,story"]
    for number in range(3):
        shots = [*np.roll(REDS, number, axis=0), *np.roll(BLUES, number, axis=0)]
        frames = np.empty((len(shots) * 40, 48, 64, 3), np.uint8)
        for i, frame in enumerate(frames):
            frame[:] = shots[i // 40]
            frame[16:28, i % 40 : i % 40 + 12] = 255
        write_mp4(folder / f"film{number}.mp4", frames, 10)
        span = "[['0:00:00.000', '0:00:32.000']]"
        rows.writerow([f"film{number}", f"film{number}.mp4", span, ["A square."], [1.0]])
        truth += [f"film{number}.mp4,0,16,red{number}", f"film{number}.mp4,16,32,blue{number}"]
    (folder / "captions.csv").write_text(captions.getvalue())
    (folder / "truth.csv").write_text("\n".join(truth))
    write_prompts(folder / "prompts.parquet", [Prompt("one", ["a", "b", "c"])])


def few_steps(root: Path, minutes: float) -> TriptychConfig:
    films = root / "films"
    return load_config(None, [
        f"workspace={root / 'workspace'}",
        f"curation.sources.inputs=['{films}/*.mp4']",
        f"curation.sources.captions_csv={films / 'captions.csv'}",
        "curation.filters.max_still_ratio=null",
        "curation.manifests.near_duplicate=null",
        "curation.ablation.lows=[-1, 0.5]",
        f"curation.ablation.truth={films / 'truth.csv'}",
        "curation.ablation.train_cells=2",
        f"curation.ablation.max_minutes={minutes}",
        "training.pretrain.steps=0",
        "training.sft.steps=2",
        f"generation.prompts={films / 'prompts.parquet'}",
        "generation.steps=2",
    ])  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compilations_are_told_apart_and_their_cells_trained(tmp_path: Path):
    write_compilations(tmp_path / "films")
    workspace = Workspace(tmp_path / "workspace")

    whole = ablate_thresholds(few_steps(tmp_path, 60))
    assert (whole.left_out, whole.unchanged) == ([], False)
    # Of the six windows of a film four are of one story.
    known = [(c.kept_windows, c.related, c.precision, c.recall) for c in whole.cells]
    assert known == [(18, 12, pytest.approx(2 / 3), 1.0), (12, 12, 1.0, 1.0)]
    assert [(c.trained_as, c.trained_samples, c.scored_videos) for c in whole.cells] == [
        (0, 18, 1),
        (1, 12, 1),
    ]
    assert all(c.visual is not None and -100 <= c.visual <= 100 for c in whole.cells)
    frame = pd.read_parquet(whole.folder / "results.parquet")
    assert frame["visual"].tolist() == [c.visual for c in whole.cells]
    assert "Visual" in (whole.folder / "index.html").read_text()
    for cell, count in ((0, 18), (1, 12)):
        assert len(read_table(whole.folder / f"cells/{cell}/sft.parquet", SAMPLES)) == count
        assert read_done(whole.folder / f"cells/{cell}/run") is not None
    # The workspace's own model is not replaced, and nothing is encoded twice.
    assert not list(workspace.runs.glob("sft-*"))
    assert latest(workspace.generations) is None
    parts = workspace.cache("latents").glob("*/*.parquet")
    encoded = [row.clip_id for part in parts for row in read_table(part, LATENTS)]
    assert len(encoded) == len(set(encoded)) == 24

    # Without time no cell is started, and those that are done stay.
    aside = (whole.folder / "cells" / "1").rename(tmp_path / "aside")
    ablation = Ablation(few_steps(tmp_path, 1e-9), Snapshot(latest(workspace.dataset("demo"))))
    assert ablation.folder == whole.folder
    assert train_cells.fn(ablation, tmp_path) == [1]
    aside.rename(whole.folder / "cells" / "1")

    stamps = {p: p.stat().st_mtime_ns for p in whole.folder.rglob("*") if p.is_file()}
    again = ablate_thresholds(few_steps(tmp_path, 60))
    assert again.unchanged and again.cells == whole.cells
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert latest(workspace.ablations) == whole.folder
