"""``triptych manifest`` on a snapshot of one sample whose clips have files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flows import cli
from schemas.errors import ConfigError, InputError, ManifestError
from schemas.layout import Snapshot, Workspace
from schemas.rows import Export, Sample, Scene
from schemas.storage import mark_done, point_latest
from schemas.tables import EXPORTS, SAMPLES, read_table, write_table

runner = CliRunner()


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    dataset = Workspace(tmp_path / "work").dataset("demo")
    snapshot = Snapshot(dataset / "one")
    scenes: list[Scene] = []
    exports: list[Export] = []
    for i in range(3):
        path = tmp_path / f"{i}.mp4"
        path.write_bytes(b"video %d" % i)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        scenes.append(
            Scene(f"clip{i}", "source", "/film", 0, 9, 0, 9, 9, 0, 1, 9, 4, 4, f"Caption {i}.")
        )
        exports.append(Export(f"clip{i}", "copy", str(path), 0, 9, 9, 9, 4, 4, 7, sha256))
    sft = [Sample("s", "sft", "train", scenes, 0.5, True)]
    pretrain = [Sample(f"p{s}", "pretrain", s, scenes, None, True) for s in ("train", "val")]
    write_table(snapshot.manifest("sft"), SAMPLES, sft)
    write_table(snapshot.manifest("pretrain"), SAMPLES, pretrain)
    write_table(snapshot.table("exports"), EXPORTS, exports)
    mark_done(snapshot.root, {})
    point_latest(dataset, "one")
    return tmp_path / "work"


def manifest(*args: object) -> Result:
    return runner.invoke(cli.app, ["manifest", *map(str, args)])


@pytest.mark.parametrize("command", ["export", "import"])
def test_help_teaches(command: str) -> None:
    shown = manifest(command, "--help")
    assert shown.exit_code == 0
    assert "sft-json" in shown.output
    assert "triptych manifest" in shown.output


@pytest.mark.parametrize(("form", "suffix"), [("sft-json", "json"), ("pretrain-csv", "csv")])
def test_there_and_back(workspace: Path, tmp_path: Path, form: str, suffix: str) -> None:
    first, out, again = tmp_path / f"a.{suffix}", tmp_path / "m.parquet", tmp_path / "b"
    shown = manifest("export", form, first, "-w", workspace)
    assert shown.exit_code == 0, shown.output
    assert "samples: 1 train; clips: 3" in shown.output
    assert "--split all" in shown.output
    assert f"wrote: {first}" in shown.output
    shown = manifest("import", form, first, out)
    assert shown.exit_code == 0, shown.output
    assert "samples: 1; clips: 3; restored: 3; measured: 0; left out: 0" in shown.output
    assert [s.sample_id for s in read_table(out, SAMPLES)] == [
        "s" if suffix == "json" else "ptrain"
    ]
    shown = manifest("export", form, again, "--manifest", out)
    assert shown.exit_code == 0, shown.output
    assert again.read_bytes() == first.read_bytes()


def test_folders(workspace: Path, tmp_path: Path) -> None:
    shown = manifest(
        "export", "webdataset", tmp_path / "w", "--kind", "pretrain", "-w", workspace,
        "--snapshot", "one",
    )  # fmt: skip
    assert "samples: 1 train, 1 val; clips: 3" in shown.output
    assert json.loads((tmp_path / "w" / "index.json").read_text())["kind"] == "pretrain"
    shown = manifest("export", "huggingface", tmp_path / "h", "-w", workspace, "--with-videos")
    assert "1 sft/train, 1 pretrain/train, 1 pretrain/validation" in shown.output
    assert len(list((tmp_path / "h" / "videos").rglob("*.mp4"))) == 3


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        (("export", "sft-json", "x", "--kind", "pretrain"), ConfigError, "--kind does not go"),
        (("export", "sft-json", "x", "--with-videos"), ConfigError, "--with-videos does not go"),
        (("export", "huggingface", "x", "--root", "/"), ConfigError, "--root does not go"),
        (("export", "huggingface", "x", "--split", "val"), ConfigError, "--split does not go"),
        (("export", "sft-json", "x", "--snapshot", "two"), InputError, "found: one"),
        (("import", "sft-json", "x.json", "x"), ConfigError, "expected: OUT.parquet"),
        (("import", "sft-json", "x.csv", "x.parquet"), InputError, r"sft-json in \*\.json"),
    ],
)
def test_what_cannot_be_is_refused(
    workspace: Path, args: tuple[str, ...], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        cli.app(["manifest", *args, "-w", str(workspace)], standalone_mode=False)


def test_the_wrong_kind_of_manifest(workspace: Path, tmp_path: Path) -> None:
    path = Snapshot(Workspace(workspace).dataset("demo") / "one").manifest("pretrain")
    with pytest.raises(ManifestError, match="no manifest of kind 'sft'"):
        cli.app(
            ["manifest", "export", "sft-json", str(tmp_path / "x"), "--manifest", str(path)],
            standalone_mode=False,
        )
