"""The reproduction of the paper's tables: its cells, their order, its figures, and a real run."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from flows import cli
from flows.console import out
from flows.reproduce import (
    MODELS,
    core_hours,
    next_cell,
    place_of,
    prepare,
    records_of,
    run_cells,
)
from flows.reproduce_cells import (
    EVERYTHING,
    TABLES,
    Budget,
    Cell,
    Row,
    jobs,
    rows_of,
)
from flows.reproduce_page import page, show
from flows.reproduce_tables import MEASURES, estimate, estimates, seeds_of, trends
from flows.reproduce_work import Place, do_cell
from schemas.errors import ConfigError
from schemas.storage import mark_done, read_done, read_json

ROOT = Path(__file__).parents[2]
STORIES = [f"episode_{k:05d}" for k in range(20)]


def record(cell: Cell, **means: float) -> dict:
    """A record of a finished cell whose scores lie around these means, alike in all cells."""
    around = np.random.default_rng(cell.seed).normal(0, 0.02, len(STORIES))
    stories = {
        name: {m: means.get(m, 0.5) + float(x) for m in (*MEASURES, "both")}
        for name, x in zip(STORIES, around, strict=True)
    }
    return {**dataclasses.asdict(cell), "stories": stories}


def records(*cells: tuple[Cell, float]) -> dict:
    """Finished cells, each with its style and as-told score."""
    return {c.key: record(c, style=v, told=v, both=v, visual=v) for c, v in cells}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    budget = Budget(videos=1)
    return Place(*[tmp_path] * 4, tmp_path / "pretrain.parquet", budget)


def test_rows_that_mean_the_same_model_share_a_cell():
    cells = jobs(rows_of([*TABLES], quick=False), seeds=2)
    rows = sum(map(len, TABLES.values()))
    # v2, the threshold 0.8 and "both" are one; so are "no SFT" and "pre-training only"
    assert len(cells) == 2 * (rows - 3) == len({c.key for c in cells})
    assert {c.shared for c in cells if c.seed == 0} == {
        None, *(f"pretrain-v{n}-seed0" for n in range(1, 6)),
    }  # fmt: skip


def test_whole_tables_of_a_seed_come_before_the_next_seed():
    cells = jobs(rows_of([*TABLES], quick=True), seeds=3)
    assert all(a.seed <= b.seed for a, b in pairwise(cells))
    assert {c.seed for c in cells} == {0, 1, 2}


def test_every_cell_takes_as_many_steps_but_the_one_that_leaves_pre_training_out():
    budget = Budget()
    for cell in jobs(rows_of([*TABLES], quick=False), 1):
        part = (0, budget.sft_steps) if cell.stages == "sft-part" else None
        assert sum(budget.steps(cell)) == sum(part or (budget.pretrain_steps, budget.sft_steps))
        assert (budget.steps(cell)[0] == 0) == (cell.shared is None)


def test_what_quick_finishes_counts_for_the_whole():
    """Its cells are among all of them, and are of the same budget."""
    every = jobs(rows_of([*TABLES], quick=False), 3)
    assert {*jobs(rows_of([*TABLES], quick=True), 1)} < {*every}


def test_an_unknown_table_is_said():
    with pytest.raises(ConfigError, match="no such table"):
        rows_of(["masks", "colours"], quick=False)


def test_quick_rows_are_rows_and_can_show_every_kind_of_trend():
    rows = rows_of([*TABLES], quick=True)
    made = records(*((cell, 0.5) for cell in jobs(rows, 1)))
    assert {seen.trend.table for seen in trends(made, rows)} == set(TABLES)


def test_a_cell_waits_for_the_pre_training_it_shares(place: Place):
    cells = v2, low, v5 = Cell(), Cell(low=0.0), Cell("v5")
    assert next_cell(place, cells, []) == v2
    # v2 is at the pre-training that the second waits for, so the third is begun beside it
    assert next_cell(place, cells, [v2]) == v5
    assert next_cell(place, cells, [v2, v5]) is None
    mark_done(place.shared(str(v2.shared)), {})
    assert next_cell(place, cells, [v2]) == low
    mark_done(place.cell(v2), record(v2))
    assert next_cell(place, cells, []) == low
    mark_done(place.cell(low), record(low))
    assert next_cell(place, cells, [v5]) is None
    alone = Cell(stages="sft")
    assert next_cell(place, [v5, alone, Cell("v1", "sft")], [v5, alone]) == Cell("v1", "sft")


def test_a_finished_cell_is_not_done_again(place: Place):
    mark_done(place.cell(Cell()), record(Cell()))
    # nothing that training needs is there, so it would fail
    assert do_cell(place, Cell())["stories"].keys() == set(STORIES)
    assert list(records_of(place, [Cell(), Cell("v5")])) == [Cell().key]


def test_results_of_another_budget_or_other_models_are_kept_apart(tmp_path: Path):
    models = tmp_path / "models"
    pieces = ("model/vae", "model/text_encoder", "model/tokenizer")
    for name in (*pieces, "pictures", "viclip", "probe"):
        (models / name).mkdir(parents=True)
        (models / name / "weights").write_text(name)
    first = place_of(tmp_path, Budget(), models)
    assert place_of(tmp_path, Budget(), models) == first
    assert place_of(tmp_path, Budget(frames=5), models).root != first.root
    (models / "probe" / "weights").write_text("better")
    assert place_of(tmp_path, Budget(), models).root != first.root
    assert Place.of(first.to_dict()) == first


def test_an_interval_is_of_both_stories_and_seeds():
    rng = np.random.default_rng(5)
    stories = rng.normal(0.6, 0.1, (1, 100))
    alike = estimate(np.repeat(stories, 3, 0))  # seeds that all say the same add nothing
    assert alike.mean == pytest.approx(100 * stories.mean())
    assert alike.high - alike.low == pytest.approx(2 * 1.96 * 10 / 10, rel=0.2)
    seeds = estimate(np.repeat(np.array([[0.4], [0.5], [0.9]]), 100, 1))
    assert (seeds.low, seeds.high) == pytest.approx((40, 90))
    assert estimate(np.full((3, 5), 0.5)).text == "50.0 (50.0..50.0)"


def test_a_difference_is_taken_story_by_story():
    """Stories differ much more than the two cells do, yet alike, so the cells are told apart."""
    rows = rows_of(["masks"], quick=False)
    made = records((Cell("v1"), 0.50), (Cell("v2"), 0.505))
    v1, v2 = (estimates(made, row) for row in rows["masks"][:2])
    assert v1 is not None
    assert v2 is not None
    assert v1["style"].high > v2["style"].low
    assert [s.verdict for s in trends(made, rows)] == ["holds"]


@pytest.mark.parametrize(
    ("v2", "v3", "verdict"), [(0.5, 0.6, "holds"), (0.5, 0.5, "holds"), (0.6, 0.5, "does not hold")]
)
def test_v3_may_be_as_good_as_v2(v2: float, v3: float, verdict: str):
    made = records((Cell("v2"), v2), (Cell("v3"), v3))
    assert [s.verdict for s in trends(made, rows_of(["masks"], quick=False))] == [verdict]


def test_equal_cells_are_not_separated():
    made = records((Cell("v2"), 0.5), (Cell("v5"), 0.5))
    (seen,) = trends(made, rows_of(["masks"], quick=False))
    assert (seen.verdict, seen.truth.mean) == ("not separated", pytest.approx(0))


def test_seeds_that_only_one_of_two_cells_has_are_left_out():
    rows = rows_of(["masks"], quick=False)
    made = records((Cell("v1"), 0.2), (Cell("v2"), 0.9), (Cell("v2", seed=1), 0.1))
    assert seeds_of(made, Cell("v2")) == [0, 1]
    (seen,) = trends(made, rows)
    assert seen.truth.mean == pytest.approx(70)


def test_what_was_not_measured_is_missing_and_nothing_else():
    rows = rows_of([*TABLES], quick=False)
    made = records((Cell(), 0.7), (Cell("v5"), 0.4))
    data = {"thresholds": {"0.8": {"windows": 120, "related": 0.975}}}
    text = page(made, rows, Budget(), data, core_hours=1.5)
    assert "1.5 core-hours" in text
    lines = {line.split(" |")[0]: line for line in text.splitlines() if line.startswith("| ")}
    assert "58.09" in lines["| v1"]
    assert "missing" in lines["| v1"]
    assert "70" in lines["| v2"]
    assert "missing" not in lines["| v2"]
    assert lines["| 0.8"].endswith("| 1 | 120 | 98% |")
    assert "missing" in lines["| none"]
    trend_lines = text.partition("## Trends")[2]
    assert "v2 > v5" in trend_lines
    assert "v1 < v2" not in trend_lines
    assert "both >" not in trend_lines
    with out.capture() as captured:
        show(made, rows)
    assert "missing" in captured.get()
    assert "±" in captured.get()
    assert "…" not in captured.get()  # on 80 columns


def test_an_unknown_table_ends_the_command_before_anything_is_made(tmp_path: Path):
    done = CliRunner().invoke(
        cli.app, ["reproduce", "--tables", "hats", "-w", str(tmp_path / "made")]
    )
    assert isinstance(done.exception, ConfigError)
    assert not (tmp_path / "made").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_cells_are_trained_generated_and_scored_for_real(tmp_path: Path):
    """Data through Prefect, Ray and the pipeline, two cells through DeepSpeed, side by side."""
    budget = Budget(
        videos=2, prompts=2, frames=1, pretrain_steps=1, sft_steps=1, batch_size=2,
        denoising_steps=2,
    )  # fmt: skip
    place = place_of(tmp_path, budget, ROOT / MODELS)
    data = prepare(place)
    windows = {low: kept["windows"] for low, kept in data["thresholds"].items()}
    assert windows["-1"] > 0
    assert windows["-1"] >= windows["0"] >= windows["0.8"]
    assert 0 < data["thresholds"]["-1"]["related"] < 1  # compilations are among them

    cells = [Cell(stages="pretrain"), Cell("v5", "sft", EVERYTHING)]
    run_cells(place, cells, hours=0, processes=2)
    assert records_of(place, cells) == {}  # there was no time to begin
    run_cells(place, cells, hours=None, processes=2)
    made = records_of(place, cells)
    assert [made[cell.key]["steps"] for cell in cells] == [[2, 0], [0, 2]]
    for cell in cells:
        assert len(made[cell.key]["stories"]) == budget.prompts
        lines = (place.cell(cell) / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2]
        found = estimates(made, Row("", cell, (None, None, None)))
        assert found is not None
        assert all(e.low <= e.mean <= e.high for e in found.values())
    assert core_hours(place) > 0
    # the shared part is as it was: others start from it
    assert read_done(place.shared("pretrain-v2-seed0"))["steps"] == 1
    config = read_json(place.cell(cells[1]) / "run" / "model" / "transformer" / "config.json")
    assert config["mask"] == "v5"

    before = {cell: (place.cell(cell) / "_DONE.json").stat().st_mtime_ns for cell in cells}
    assert prepare(place) == data
    run_cells(place, cells, hours=None, processes=2)
    assert before == {c: (place.cell(c) / "_DONE.json").stat().st_mtime_ns for c in cells}
