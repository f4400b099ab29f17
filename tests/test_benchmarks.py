"""docs/benchmarks.md is made from results, and keeps what was not measured again."""

import json
from pathlib import Path

import pytest

from benchmarks.tables import section, target, update, write_report


def report(**changes: object) -> dict[str, object]:
    rows = [{"case": "a", "ours": 2.0, "peer": 8.0, "ratio": 4.0, "unit": "s"}]
    return {"title": "T", "about": "", "machine": {}, "rows": rows, "targets": []} | changes


def test_a_section_is_replaced_and_others_stay() -> None:
    page = update("", {"one": report(title="One"), "two": report(title="Two")})
    again = update(page, {"two": report(title="New two"), "three": report(title="Three")})
    assert "## One: `make bench-one`" in again
    assert "Two" not in again.replace("New two", "")
    assert again.index("## One") < again.index("## New two") < again.index("## Three")
    assert update(again, {}) == again


def test_columns_groups_and_empty_cells() -> None:
    rows = [
        {"group": "g1", "case": "a|b", "ours": 12345.6, "peer": None, "unit": None, "f1": 0.12345},
        {"group": "g2", "case": "c", "ours": None, "peer": True, "unit": None},
        {"group": "g2", "case": "d", "ours": 1, "peer": False, "unit": None},
    ]
    assert section("x", report(rows=rows)).split("\n\n")[2:] == [
        "**g1**",
        "| case | ours | f1 |\n| --- | --- | --- |\n| a\\|b | 12,346 | 0.1235 |",
        "**g2**",
        "| case | ours | peer |\n| --- | --- | --- |\n| c | – | yes |\n| d | 1 | no |",
    ]


def test_a_missed_target_says_so() -> None:
    targets = [target("speed", 2.94, 3), target("time", 1.2, 1.3, at_most=True)]
    assert [t["met"] for t in targets] == [False, True]
    text = section("x", report(targets=targets))
    assert "| speed | 2.94 | ≥ 3 | no |" in text
    assert "| time | 1.2 | ≤ 1.3 | yes |" in text


def test_what_is_written_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench" / "name.json"
    write_report(path, "Title", "Some\n    words.", [{"case": "a"}], [target("t", 1, 1)])
    found = json.loads(path.read_text())
    keys = {"title", "about", "measured", "machine", "rows", "targets", "plot"}
    assert set(found) == keys
    assert not found["plot"]
    assert found["about"] == "Some words."
    assert section("name", found) in capsys.readouterr().out


def test_the_page_holds_its_sections() -> None:
    page = Path("docs/benchmarks.md").read_text(encoding="utf-8")
    assert "<!-- bench shots -->" in page
    assert update(page, {}) == page


def test_a_plot_beside_the_results_is_shown(tmp_path: Path) -> None:
    (tmp_path / "name.svg").write_text("<svg/>")
    write_report(tmp_path / "name.json", "Title", "", [{"case": "a"}], [])
    found = json.loads((tmp_path / "name.json").read_text())
    assert "![Title](bench_name.svg)" in section("name", found)
