"""``make demo``, the whole pipeline: cartoons drawn on the spot, stories by the embedded model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import av
import pandas as pd
import pyarrow.parquet as pq
import pytest
from diffusers import CogVideoXTransformer3DModel

from curation.toonworld.probe import load_probe
from flows.demo import COMPILATIONS, EPISODES, FILMS
from flows.reproduce_work import scenes_of
from inference.toon_scores import score_stories
from schemas.counts import StageCount
from schemas.layout import Snapshot, Workspace
from schemas.storage import latest, read_done, read_json
from schemas.tables import GENERATIONS, SAMPLES, SCORES, read_table
from training.transformer import Mask2DiTTransformer3DModel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# The demo's own settings, with fewer steps.
FEWER = [
    "training.pretrain.steps=4",
    "training.sft.steps=4",
    "training.pretrain.checkpoint_every=2",
    "training.sft.checkpoint_every=2",
    "generation.steps=10",
]
LEAST = 0.5
"""Of what captions tell, read from the frames; unrelated scenes get a fifth."""
PROBE = Path(__file__).parents[2] / "assets/tiny/probe"


def triptych(*args: str) -> list[str]:
    return [sys.executable, "-m", "flows.cli", *args, *(f"--set={s}" for s in FEWER)]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(triptych(*args), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, str]:
    """One demo run: the workspace and what it printed."""
    root = tmp_path_factory.mktemp("demo")
    return Workspace(root), run("demo", "--workspace", str(root)).stdout


def snapshot(workspace: Workspace) -> Snapshot:
    folder = latest(workspace.dataset("toonworld"))
    assert folder is not None
    return Snapshot(folder)


def test_it_prints_the_stages_and_the_report(demo):
    workspace, printed = demo
    for stage in (
        "sources",
        "shots",
        "clips",
        "embeddings",
        "windows",
        "pretrain",
        "sft",
        "generate",
    ):
        assert stage in printed
    assert "texture" not in printed
    assert len([*(workspace.root / FILMS).glob("*.mp4")]) == EPISODES + COMPILATIONS
    assert str(workspace.reports / "report.html") in printed.replace("\n", "")


def test_every_count_reconciles(demo):
    workspace, _ = demo
    counts = [StageCount(**c) for c in read_json(snapshot(workspace).counts)]
    batch = latest(workspace.generations)
    assert batch is not None
    counts += [StageCount(**c) for c in read_json(batch / "counts.json")]
    assert len(counts) >= 8
    for count in counts:
        count.check()
        assert count.kept > 0, count


def test_manifests_are_plain_parquet_of_three_scenes(demo):
    workspace, _ = demo
    for kind in ("pretrain", "sft"):
        path = snapshot(workspace).manifest(kind)
        frame = pd.read_parquet(path)
        assert len(frame) > 0
        assert all(len(scenes) == 3 for scenes in frame["scenes"])
        metadata = pq.read_metadata(path).metadata
        assert {b"triptych.schema_version", b"triptych.config_hash"} <= set(metadata)
    for sample in read_table(snapshot(workspace).manifest("sft"), SAMPLES):
        assert len({s.source_id for s in sample.scenes}) == 1
        assert [s.start_s for s in sample.scenes] == sorted(s.start_s for s in sample.scenes)
        assert "episode" in sample.scenes[0].uri  # no compilation, whose shots are unrelated
    for sample in read_table(snapshot(workspace).manifest("pretrain"), SAMPLES):
        assert len({s.source_id for s in sample.scenes}) == 3


def test_both_stages_trained_and_their_weights_load_back(demo):
    workspace, _ = demo
    for stage in ("pretrain", "sft"):
        (run_dir,) = workspace.runs.glob(f"{stage}-*")
        lines = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 5))
        assert all(line["loss"] > 0 for line in lines)
        ours = Mask2DiTTransformer3DModel.from_pretrained(run_dir / "model" / "transformer")
        assert list((run_dir / "model" / "transformer").glob("*.safetensors"))
        theirs = CogVideoXTransformer3DModel.from_config(dict(ours.config))
        theirs.load_state_dict(ours.state_dict())


def test_videos_decode_as_promised(demo):
    workspace, _ = demo
    batch = latest(workspace.generations)
    assert batch is not None
    rows = read_table(batch / "generations.parquet", GENERATIONS)
    assert sorted(g.num_scenes for g in rows) == [3, 3, 3, 4]
    assert sorted(g.extended_scenes for g in rows) == [0, 0, 0, 1]
    for row in rows:
        with av.open(row.video_uri) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert stream.average_rate == row.fps
            frames = list(container.decode(video=0))
        assert len(frames) == row.num_frames == sum(row.scene_frames)
        assert {(f.width, f.height) for f in frames} == {(row.width_px, row.height_px)}
    scores = read_table(batch / "scores.parquet", SCORES)
    assert len(scores) == 4
    assert all(-1 <= s.visual <= 1 for s in scores)


def test_the_stories_show_what_they_are_told_to(demo):
    workspace, _ = demo
    batch = latest(workspace.generations)
    assert batch is not None
    rows = read_table(batch / "generations.parquet", GENERATIONS)
    stories = [scenes_of(workspace, row) for row in rows]
    found = score_stories(load_probe(PROBE), stories, [row.prompts for row in rows])
    assert fmean(score.semantic for score in found) > LEAST


def test_the_report_opens_without_a_console_error(demo):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    from playwright.sync_api import sync_playwright

    workspace, _ = demo
    said: list[str] = []
    with sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-sync"]
        )
        page = browser.new_page()
        page.on(
            "console", lambda m: said.append(m.text) if m.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda e: said.append(str(e)))
        page.on("requestfailed", lambda r: said.append(r.url[:80]))
        page.goto((workspace.reports / "report.html").as_uri())
        page.wait_for_function("document.querySelectorAll('video').length == 4")
        page.wait_for_function(
            "[...document.querySelectorAll('video')].every(v => v.videoWidth > 0)"
        )
        browser.close()
    assert said == []


def test_a_second_run_does_nothing_and_says_so(demo):
    workspace, _ = demo
    files = {p: p.stat().st_mtime_ns for p in workspace.root.rglob("*.parquet")}
    videos = {p: p.stat().st_mtime_ns for p in workspace.videos.iterdir()}
    again = run("demo", "--workspace", str(workspace.root))
    assert "Nothing was missing" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in workspace.videos.iterdir()} == videos
    for path, time_ns in files.items():
        if "datasets" in path.parts or "cache" in path.parts:
            assert path.stat().st_mtime_ns == time_ns, f"{path} was written again"


def test_killed_in_curation_and_run_again_gives_the_same_tables(demo, tmp_path):
    workspace, _ = demo
    killed, films = Workspace(tmp_path), workspace.root / FILMS
    refresh = ["refresh", "-p", "toonworld", "-w", str(tmp_path)]
    refresh += ["-s", f"curation.sources.inputs=[{films}]"]
    refresh += ["-s", f"curation.sources.captions_csv={films / 'captions.csv'}"]
    process = subprocess.Popen(
        triptych(*refresh),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while not list(killed.cache("shots").glob("[!.]*")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert latest(killed.dataset("toonworld")) is None
    printed = run(*refresh).stdout
    assert "refresh-dataset" in printed
    whole, resumed = snapshot(workspace), snapshot(killed)
    assert whole.root.name == resumed.root.name
    assert read_done(resumed.root) is not None
    tables = sorted(p.relative_to(whole.root) for p in whole.root.rglob("*.parquet"))
    assert len(tables) == 9
    for table in tables:
        assert (whole.root / table).read_bytes() == (resumed.root / table).read_bytes(), table
