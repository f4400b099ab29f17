import av
import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.sample_videos import SampleVideos
from schemas.storage import point_latest, read_done, read_json, write_text
from schemas.tables import SAMPLES, write_table
from tests.training.conftest import SHAPE, ground, make_sample  # noqa: F401  (a fixture)
from tests.training.test_export import checkpoint, job_of
from training.weights import load_transformer


@pytest.fixture
def run(ground, tmp_path):  # noqa: F811
    """A run at step 40 of 60."""
    config = ground.config.model_copy(update={"workspace": str(tmp_path)})
    manifest = tmp_path / "sft.parquet"
    write_table(manifest, SAMPLES, [make_sample(0), make_sample(1, split="val")])
    run_dir = tmp_path / "runs" / "sft-test"
    job = job_of(ground).model_copy(update={"manifest": manifest, "run_dir": run_dir})
    weights = {k: p.data for k, p in load_transformer(ground.base).named_parameters()}
    checkpoint(run_dir / "checkpoints", weights, ranks=2, shift=0.01)
    write_text(run_dir / "job.json", job.model_dump_json())
    point_latest(run_dir.parent, run_dir.name)
    generation = config.generation.model_copy(update={"steps": 2})
    return config.model_copy(update={"generation": generation}), run_dir


def test_a_checkpoint_that_is_due_gets_videos_of_the_held_out_stories_once(run):
    config, run_dir = run
    assert SampleVideos(config, run_dir, 0).catch_up() == []
    assert SampleVideos(config, run_dir, 30).catch_up() == []
    (folder,) = SampleVideos(config, run_dir, 20).catch_up()
    assert folder == run_dir / "samples" / "step_00000040"
    assert read_done(folder)["step"] == 40
    assert sorted(p.name for p in folder.iterdir()) == [
        "_DONE.json",
        "story_0.jpg",
        "story_0.json",
        "story_0.mp4",
        "story_0.poster.jpg",
    ]
    assert read_json(folder / "story_0.json")["prompt_id"] == "sample-1"
    with av.open(str(folder / "story_0.mp4")) as container:
        assert len(list(container.decode(video=0))) == 3 * SHAPE.frames
    assert SampleVideos(config, run_dir, 20).catch_up() == []


def test_what_goes_wrong_costs_the_videos_and_not_the_training(run, caplog):
    config, run_dir = run
    (weights,) = run_dir.glob("checkpoints/*/rank_00001.safetensors")
    weights.unlink()
    videos = SampleVideos(config, run_dir, 20)
    assert videos.catch_up() == videos.catch_up() == []
    assert caplog.text.count("sample_videos failed=true") == 1
    assert "rank_00001.safetensors" in caplog.text


def test_a_model_is_exported_from_any_checkpoint(run, tmp_path):
    config, _ = run
    where = ["-w", config.workspace]
    call = CliRunner().invoke
    done = call(app, ["model", "export", "latest", str(tmp_path / "out"), *where])
    assert done.exit_code == 0, done.output
    averaged = dict(load_transformer(tmp_path / "out").named_parameters())
    done = call(
        app,
        ["model", "export", "sft-test", str(tmp_path / "out"), "--step", "40", "--weights", *where],
    )
    assert done.exit_code == 0, done.output
    plain = dict(load_transformer(tmp_path / "out").named_parameters())
    name = "proj_out.weight"
    assert float((averaged[name] - plain[name]).detach().mean()) == pytest.approx(0.01, rel=1e-3)
    for wrong, message in (
        (["latest", "x", "--step", "7"], "no such checkpoint"),
        (["sft-other", "x"], "no such training run"),
    ):
        failed = call(app, ["model", "export", *wrong, *where])
        assert message in str(failed.exception)
