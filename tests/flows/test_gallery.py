"""The page of a batch: what it says, and that a real browser plays the videos from disk."""

from __future__ import annotations

import io
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from flows.gallery import build_gallery
from inference.outputs import VideoFiles, VideoWriter
from schemas.layout import Workspace
from schemas.rows import Generation, Reject
from schemas.tables import GENERATIONS, REJECTS, write_table

EVIL = '<script>alert("x")</script> & "quotes"'


def row(name: str, prompts: list[str], **changes) -> Generation:
    made = Generation(
        generation_id=f"gen-{name}", prompt_id=name, status="done", video_uri="", video_sha256="",
        prompts=prompts, negative_prompts=[""] * len(prompts), seeds=[3] * len(prompts),
        num_scenes=len(prompts), given_scenes=0, extended_scenes=0,
        scene_frames=[9] * len(prompts), num_frames=9 * len(prompts), width_px=96, height_px=64,
        fps=8, scheduler="ddim", steps=12, guidance=6.0, model_sha256="f" * 32, error="",
    )  # fmt: skip
    return replace(made, **changes)


def write_video(workspace: Workspace, row: Generation, **provenance) -> None:
    said = {"prompt_id": row.prompt_id, "steps": row.steps, "quantize": "none", **provenance}
    with VideoWriter(VideoFiles.of(workspace, row.generation_id), 8, row.prompts, said) as out:
        for scene, length in enumerate(row.scene_frames):
            frames = np.zeros((length, row.height_px, row.width_px, 3), np.uint8)
            frames[..., scene % 3] = 200
            out.add_scene(frames)
        out.finish(4.25)


ROWS = [
    row("bird", ["A red field.", EVIL, "A blue sky."], scene_frames=[5, 9, 13], num_frames=27,
        extended_scenes=1),
    row("a b%", ["A whale."], steps=30, seeds=[4]),
    row("mixed", ["One.", "Two."], seeds=[1, 2], negative_prompts=["dark", ""]),
    row("broken", ["A lion."], status="failed", error="OutOfMemory: <none left>"),
]  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = Workspace(tmp_path_factory.mktemp("work space"))
    for made, more in zip(ROWS[:3], ({"given": ["ab", "", ""]}, {}, {}), strict=True):
        cut = {"truncated_prompts": made.prompts[:1]} if made.prompt_id == "mixed" else {}
        write_video(workspace, made, **more, **cut)
    folder = workspace.generations / "batch1"
    rejects = [
        Reject("bad", "prompts", "empty_prompts", "line 7: no <b>scene</b>", "p.csv", False),
        Reject("broken", "generate", "out_of_memory", "in the card", "", True),
    ]
    write_table(folder / "generations.parquet", GENERATIONS, ROWS)
    write_table(folder / "rejects.parquet", REJECTS, rejects)
    assert build_gallery(workspace, folder) == folder / "index.html"
    return folder / "index.html"


class Reader(HTMLParser):
    """Collects elements, and the text of every card."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cards: dict[str, str] = {}
        self.text = ""
        self.card = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("article", "section"):
            self.card = dict(attrs)["id"] or ""

    def handle_data(self, data: str) -> None:
        self.text += data
        said = self.cards.get(self.card, "") + " " + data
        self.cards[self.card] = re.sub(r"\s+", " ", said).strip()


@pytest.fixture(scope="module")
def read(page: Path) -> Reader:
    return Reader(page.read_text(encoding="utf-8"))


def test_every_video_has_its_scenes_with_their_times(read: Reader):
    bird = read.cards["gen-bird"]
    assert re.findall(r"0:0\d\.\d", bird) == ["0:03.4", "0:00.0", "0:00.6", "0:01.8"]
    assert EVIL in bird and "seed 3" in bird
    assert bird.index("A red field.") < bird.index("given") < bird.index(EVIL) < bird.index("added")
    assert "seed 1" in read.cards["gen-mixed"] and "not: dark" in read.cards["gen-mixed"]
    assert "1 text longer than the model reads" in read.cards["gen-mixed"]


def test_settings_are_said_once_and_where_they_differ(read: Reader):
    assert "steps 12 · guidance 6.0 · fps 8" in re.sub(r"\s+", " ", read.text)
    assert "steps 30" in read.cards["gen-a b%"]
    assert "steps" not in read.cards["gen-bird"]


def test_what_failed_and_what_was_left_out_has_its_reason(read: Reader):
    assert "Failed. OutOfMemory: <none left>" in read.cards["gen-broken"]
    assert "bad empty prompts line 7: no <b>scene</b>" in read.cards["left-out"]
    assert "in the card" not in read.text
    assert "3 videos, 0:06.8 of film; 1 failed; 1 row left out." in re.sub(r"\s+", " ", read.text)


def test_links_are_relative_and_lead_to_files(page: Path, read: Reader):
    links = [a.get("href") or a.get("src") or "" for _, a in read.tags]
    files = {x.partition("#")[0] for x in links if x and not x.startswith(("#", "data:"))}
    assert len(files) == 3 * 4
    for link in files:
        assert link.startswith("../videos/")
        assert (page.parent / unquote(link)).is_file(), link
    ids = [a["id"] for _, a in read.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_a_batch_in_which_all_failed(tmp_path: Path):
    folder = tmp_path / "generations" / "batch"
    write_table(folder / "generations.parquet", GENERATIONS, ROWS[3:])
    write_table(folder / "rejects.parquet", REJECTS, [])
    text = build_gallery(Workspace(tmp_path), folder).read_text(encoding="utf-8")
    assert "0 videos" in text and "1 failed" in text


@pytest.fixture(scope="module")
def browser():
    if shutil.which("chromium") is None:
        pytest.skip("chromium is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        made = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        yield made
        made.close()


def until(view: Any, condition: str) -> None:
    """Wait for a condition; the page's own policy forbids Playwright's way of waiting."""
    for _ in range(200):
        if view.evaluate(condition):
            return
        view.wait_for_timeout(50)
    raise AssertionError(f"not within 10 s: {condition}")


@pytest.mark.slow
def test_a_browser_plays_from_disk_and_jumps_to_scenes(page: Path, browser):
    view = browser.new_page(viewport={"width": 1200, "height": 900})
    said: list[str] = []
    view.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
    view.on("pageerror", lambda e: said.append(str(e)))
    view.on("requestfailed", lambda r: said.append(r.url))
    view.goto(page.as_uri())
    until(view, "[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert view.locator("video").count() == 0

    card = view.locator("[id='gen-bird']")
    card.locator(".scenes a").nth(2).click()
    until(view, "document.querySelector('video').currentTime > 1.8")
    state = "v => [v.videoWidth, v.videoHeight, v.error, v.paused]"
    assert view.locator("video").evaluate(state) == [96, 64, None, False]
    assert card.locator("[aria-current]").get_attribute("data-start") == "1.750"
    card.locator("video").evaluate("v => v.pause()")
    seen = Image.open(io.BytesIO(card.locator("video").screenshot())).convert("RGB")
    red, green, blue = cast("tuple[int, int, int]", seen.getpixel((seen.width // 2, 20)))
    assert blue > 150 and red < 60 and green < 60  # the third scene

    card.locator("video").evaluate("v => v.play()")
    view.locator("[id='gen-a b%'] .stage").click()
    until(view, "document.querySelectorAll('video').length == 2")
    until(view, "[...document.querySelectorAll('video')].filter(v => !v.paused).length == 1")
    assert card.locator("video").evaluate("v => v.paused")
    assert said == []
    view.close()


@pytest.mark.slow
def test_searching_and_a_phone(page: Path, browser):
    view = browser.new_page(viewport={"width": 390, "height": 780})
    view.goto(page.as_uri())
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert view.evaluate(overflow) == 0
    shown = "[...document.querySelectorAll('.card')].filter(c => !c.hidden).map(c => c.id)"
    view.fill("#search", "FIELD bird")
    assert view.evaluate(shown) == ["gen-bird"]
    assert view.inner_text("#count") == "1 of 4"
    view.fill("#search", "nowhere")
    assert view.evaluate(shown) == [] and view.is_visible("#nothing")
    view.fill("#search", "")
    view.check("#failed")
    assert view.evaluate(shown) == ["gen-broken"]
    view.close()
