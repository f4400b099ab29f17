"""The page of an ablation: what it says of a small snapshot written with the real writers."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from flows import ablation_page
from flows.ablation import Ablation
from flows.ablation_page import headline, render
from tests.flows.small_ablation import EVIL, settings, write_snapshot


class Reader(HTMLParser):
    """Collects elements, table rows and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(html)
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def read(root: Path, similarities: list[float], *more: str) -> Reader:
    ablation = Ablation(settings(root, *more), write_snapshot(root, similarities))
    return Reader(render(ablation, []))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    root = tmp_path_factory.mktemp("ablation")
    truth = root / "truth.csv"
    truth.write_text("uri,start_s,end_s,story\na <b>.mp4,0,2,x\na <b>.mp4,2,2.5,y\n")
    return read(root, [0.2, 0.6, 0.7, 0.4], f"curation.ablation.truth={truth}",
                "curation.ablation.statistics=[min_pairwise, mean_adjacent]")  # fmt: skip


def test_the_table_says_what_each_threshold_keeps(page: Reader):
    # cell, statistic, low, kept, share, clips, minutes, sources, similarity, captions, precision,
    # recall, below; clips 0 to 3 are of story x, clip 4 of y, clip 5 of none.
    rows = [" ".join(row) for row in page.rows if row[1:2] == ["min_pairwise"] and row[0]]
    assert rows == [
        "0 min_pairwise -1 4 100 % 6 0.1 1 0.475 0.250 0.67 1.00 0",
        "1 min_pairwise 0.5 2 50 % 4 0.0 1 0.650 0.250 0.50 0.50 2",
        "2 min_pairwise 0.9 0 0 % 0 0.0 0 – – – 0.00 4",
    ]
    assert "2 windows are related by the ground truth; 1 with a scene" in page.text


def test_the_headline_names_both_ends_and_the_largest_step(page: Reader):
    assert "Of 4 windows, a min_pairwise of -1 or more keeps 4 (100 %, 0.1 minutes" in page.text
    assert "of 0.9 or more, 0 (0 %, 0.0 minutes of film)" in page.text
    assert "The largest step is from -1 to 0.5: 2 windows." in page.text


def test_the_overlap_is_of_every_pair_of_cells(page: Reader):
    assert ["min_pairwise 0.5", "50", "100", "0", "50", "100", "0"] in page.rows
    shares = [a["style"] for tag, a in page.tags if tag == "td" and "style" in a]
    assert len(shares) == 36
    assert "--share: 50%" in shares


def test_the_windows_nearest_to_a_threshold_are_shown_with_their_scenes(page: Reader):
    shown = page.text.split("Windows around each threshold")[1]
    below, above = shown.split("min_pairwise 0.5")[1].split("min_pairwise 0.9")[0].split("above:")
    assert re.findall(r"(\S+) · a <b>.mp4", below) == ["0.400", "0.200"]
    assert re.findall(r"(\S+) · a <b>.mp4", above) == ["0.600", "0.700"]
    assert "1–2: 0.610 · 1–3: 0.600 · 2–3: 0.620" in above
    pictures = [a for tag, a in page.tags if tag == "img"]
    assert pictures and all((a["src"] or "").startswith("data:image/jpeg") for a in pictures)
    assert all(a["alt"] for a in pictures)


def test_words_of_strangers_stay_words(page: Reader):
    assert not [tag for tag, _ in page.tags if tag in ("script", "b", "link")][1:]
    assert EVIL in page.text


def test_nothing_comes_from_elsewhere_and_ids_are_unique(page: Reader):
    links = [a.get("href") or a.get("src") or "" for _, a in page.tags]
    assert all(x == "" or x.startswith(("#", "data:")) for x in links)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_without_windows_it_says_so(tmp_path: Path):
    page = read(tmp_path, [])
    assert "There are no windows to choose from" in page.text
    assert "Nothing to plot." in page.text


def test_where_everything_is_rejected_it_says_why(tmp_path: Path):
    page = read(tmp_path, [0.5, 0.6], "curation.manifests.near_duplicate=0.3")
    assert "None of 2 windows is kept, whatever the threshold" in page.text
    assert "“near duplicate”" in page.text


def test_pictures_far_from_a_threshold_give_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = read(tmp_path, [0.2, 0.3, 0.6, 0.7])
    count = sum(tag == "img" for tag, _ in whole.tags)
    size = sum(len(a["src"] or "") for tag, a in whole.tags if tag == "img")
    monkeypatch.setattr(ablation_page, "MAX_STILL_BYTES", size - 1)
    smaller = read(tmp_path, [0.2, 0.3, 0.6, 0.7])
    assert 0 < sum(tag == "img" for tag, _ in smaller.tags) < count


def test_the_headline_of_one_threshold_is_one_sentence(tmp_path: Path):
    config = settings(tmp_path, "curation.ablation.lows=[0.5]")
    ablation = Ablation(config, write_snapshot(tmp_path, [0.4, 0.8]))
    assert headline(ablation.results()) == (
        "Of 2 windows, a min_pairwise of 0.5 or more keeps 1 (50 %, 0.0 minutes of film)."
    )


def test_the_headline_names_the_step_that_loses_most(tmp_path: Path):
    ablation = Ablation(settings(tmp_path), write_snapshot(tmp_path, [0.2, 0.6, 0.7, 0.8]))
    assert "The largest step is from 0.5 to 0.9: 3 windows." in headline(ablation.results())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_phone_shows_it_without_complaint(tmp_path: Path):
    from playwright.sync_api import sync_playwright

    ablation = Ablation(settings(tmp_path), write_snapshot(tmp_path, [0.2, 0.6, 0.7, 0.4]))
    path = tmp_path / "index.html"
    path.write_text(render(ablation, [1]), encoding="utf-8")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        view = browser.new_page(viewport={"width": 390, "height": 780})
        said: list[str] = []
        view.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
        view.on("requestfailed", lambda r: said.append(r.url[:200]))
        view.goto(path.as_uri())
        assert view.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert view.evaluate(overflow) == 0
        assert said == []
        browser.close()
