"""Aesthetic heads in their official layouts over a tiny random CLIP model in OpenCLIP's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from curation.aesthetic import Aesthetic
from curation.video import fit
from curation.weights import read_weights
from schemas.errors import CheckpointError
from tests.curation.tiny_weights import CLIP, DIM, linear_head, write_clip

LAYERS = {0: (1024, DIM), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}


def layered_head() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    state: dict[str, Tensor] = {}
    for i, (out, into) in LAYERS.items():
        state[f"layers.{i}.weight"] = torch.randn(out, into, generator=generator) / into**0.5
        state[f"layers.{i}.bias"] = torch.randn(out, generator=generator)
    return state


def slow_head(state: dict[str, Tensor], vector: np.ndarray) -> float:
    """One number at a time: every layer is an affine map, and nothing lies between them."""
    prefixes = [f"layers.{i}." for i in LAYERS] if "weight" not in state else [""]
    x = [float(v) for v in vector]
    for prefix in prefixes:
        weight, bias = state[f"{prefix}weight"].double(), state[f"{prefix}bias"].double()
        x = [
            sum(w * v for w, v in zip(row, x, strict=True)) + b
            for row, b in zip(weight.tolist(), bias.tolist(), strict=True)
        ]
    [score] = x
    return score


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    write_clip(folder)
    return folder


@pytest.fixture
def head(tmp_path: Path) -> Callable[[dict[str, Tensor]], Path]:
    def write(state: dict[str, Tensor]) -> Path:
        path = tmp_path / "head.pth"
        torch.save(state, path)
        return path

    return write


def frames(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("state", [linear_head(), layered_head()], ids=["linear", "layered"])
def test_the_score_is_the_head_over_unit_embeddings_averaged_over_frames(
    clip: Path, head: Callable[[dict[str, Tensor]], Path], state: dict[str, Tensor], tmp_path: Path
) -> None:
    model = write_clip(tmp_path / "again")
    scorer = Aesthetic(clip, head(state))
    clips = frames()
    # OpenCLIP's own preprocessing of pictures that already have the right size
    to_tensor: Any = open_clip.image_transform(32, is_train=False)
    with torch.inference_mode():
        inputs = torch.stack([to_tensor(Image.fromarray(f)) for f in clips])
        expected = model.encode_image(inputs)
        expected = (expected / expected.norm(dim=-1, keepdim=True)).numpy()
    assert np.allclose(scorer.embed(clips).numpy(), expected, atol=1e-5)
    each = [slow_head(state, vector) for vector in expected]
    assert np.ptp(each) > 1e-3  # the head does look at the picture
    assert scorer.score(clips) == pytest.approx(np.mean(each), abs=1e-4)
    assert scorer.score(clips[1:2]) == pytest.approx(each[1], abs=1e-4)


def test_frames_are_squares_cut_from_the_middle_as_clip_does(
    clip: Path, head: Callable[[dict[str, Tensor]], Path]
) -> None:
    scorer = Aesthetic(clip, head(linear_head()))
    assert scorer.frame_px(1920, 1080) == scorer.frame_px(10, 400) == (32, 32)
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:, 32:96] = (10, 200, 30)
    assert (fit(picture, 32, 32, scorer.mode) == (10, 200, 30)).all()


def test_weights_may_be_half_precision_and_a_pytorch_file(
    clip: Path, head: Callable[[dict[str, Tensor]], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "clip"
    model = write_clip(folder)
    (folder / "open_clip_model.safetensors").unlink()
    half = {k: v.half() for k, v in model.state_dict().items()}
    torch.save(half, folder / "open_clip_pytorch_model.bin")
    halves = {k: v.half() for k, v in linear_head().items()}
    lower = Aesthetic(folder, head(halves)).score(frames())
    assert lower == pytest.approx(Aesthetic(clip, head(linear_head())).score(frames()), abs=0.05)


def test_a_head_of_another_width_is_refused(
    clip: Path, head: Callable[[dict[str, Tensor]], Path]
) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)another shape.*\(1, 768\).*\(1, 24\)"):
        Aesthetic(clip, head(linear_head(768)))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"layers.7.bias": None}, r"missing \['layers.7.bias'\]"),
        ({"layers.8.weight": torch.zeros(1)}, r"not expected \['layers.8.weight'\]"),
    ],
)
def test_a_head_with_missing_or_extra_keys_is_refused(
    clip: Path,
    head: Callable[[dict[str, Tensor]], Path],
    change: dict[str, Tensor | None],
    found: str,
) -> None:
    state = {k: v for k, v in (layered_head() | change).items() if v is not None}
    with pytest.raises(CheckpointError, match=found):
        Aesthetic(clip, head(state))


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_a_clip_model_with_missing_or_extra_keys_is_refused(
    head: Callable[[dict[str, Tensor]], Path], tmp_path: Path, change: str
) -> None:
    model = write_clip(tmp_path)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    if change == "missing":
        del state["visual.proj"]
    else:
        state["visual.other"] = torch.zeros(1)
    save_file(state, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError, match="those of the OpenCLIP model"):
        Aesthetic(tmp_path, head(linear_head()))


def test_a_folder_without_a_model_is_refused(
    head: Callable[[dict[str, Tensor]], Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)not a folder with.*no folder"):
        Aesthetic(tmp_path / "nothing", head(linear_head()))
    write_clip(tmp_path / "broken")
    (tmp_path / "broken" / "open_clip_config.json").write_text('{"model": 1}')
    with pytest.raises(CheckpointError, match="config of the OpenCLIP model"):
        Aesthetic(tmp_path / "broken", head(linear_head()))
    config = {"model_cfg": CLIP | {"hf_model_name": "x"}}
    (tmp_path / "broken" / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="OpenCLIP cannot build this model"):
        Aesthetic(tmp_path / "broken", head(linear_head()))


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("unpickled",))


def test_weights_are_never_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("trap.pth", {"weight": Trap()}), ("list.pth", [torch.zeros(1)])):
        torch.save(value, tmp_path / name)
        with pytest.raises(CheckpointError, match="weights cannot be read"):
            read_weights(tmp_path / name)
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("no weights")
        with pytest.raises(CheckpointError, match="weights cannot be read"):
            read_weights(tmp_path / name)
    assert "unpickled" not in capsys.readouterr().out
