from __future__ import annotations

import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from curation.transnetv2 import TransNetV2, find_marked, load_transnetv2, predict, shrink
from curation.video import decode, read_frames
from schemas.errors import CheckpointError

State = dict[str, Tensor]
Array = np.ndarray
ODD = Path(__file__).parents[2] / "assets" / "odd"


def official_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official PyTorch checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {}
    channels = 3
    for block, filters in enumerate((16, 32, 64)):
        for cell in range(2):
            prefix = f"SDDCNN.{block}.DDCNN.{cell}"
            for dilation in (1, 2, 4, 8):
                layers = f"{prefix}.Conv3D_{dilation}.layers"
                shapes[f"{layers}.0.weight"] = (2 * filters, channels, 1, 3, 3)
                shapes[f"{layers}.1.weight"] = (filters, 2 * filters, 3, 1, 1)
            for name in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{prefix}.bn.{name}"] = (4 * filters,)
            shapes[f"{prefix}.bn.num_batches_tracked"] = ()
            channels = 4 * filters
    for name, inputs, outputs in (
        ("frame_sim_layer.projection", 448, 128),
        ("frame_sim_layer.fc", 101, 128),
        ("color_hist_layer.fc", 101, 128),
        ("fc1", 4864, 1024),
        ("cls_layer1", 1024, 1),
        ("cls_layer2", 1024, 1),
    ):
        shapes |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    return shapes


@pytest.fixture(scope="module")
def state() -> State:
    """Random weights under the official names, neither vanishing nor exploding on the way."""
    made = torch.Generator().manual_seed(7)
    weights: State = {}
    for name, shape in official_shapes().items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(1)
        elif name.endswith(("running_var", "bn.weight")):
            weights[name] = torch.rand(shape, generator=made) + 0.5
        else:
            fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 25
            weights[name] = torch.randn(shape, generator=made) / fan_in**0.5
    return weights


@pytest.fixture(scope="module")
def network(state: State, tmp_path_factory: pytest.TempPathFactory) -> TransNetV2:
    path = tmp_path_factory.mktemp("weights") / "transnetv2-pytorch-weights.pth"
    torch.save(state, path)
    return load_transnetv2(path)


def slow_forward(w: dict[str, Array], frames: Array) -> tuple[Array, Array]:
    """The network once more, tap by tap and frame by frame: (T, 27, 48, 3) to two times (T,)."""
    x = frames.transpose(3, 0, 1, 2) / 255
    means: list[Array] = []
    for block in range(3):
        outputs: list[Array] = []
        for cell in range(2):
            prefix = f"SDDCNN.{block}.DDCNN.{cell}"
            x = np.concatenate([slow_convolution(w, prefix, d, x) for d in (1, 2, 4, 8)])
            mean, var, scale, shift = (
                w[f"{prefix}.bn.{name}"][:, None, None, None]
                for name in ("running_mean", "running_var", "weight", "bias")
            )
            x = np.maximum((x - mean) / np.sqrt(var + 0.001) * scale + shift, 0)
            outputs.append(x)
        x = outputs[0] + outputs[1]
        height, width = x.shape[2] // 2, x.shape[3] // 2
        x = x[:, :, : 2 * height, : 2 * width]
        x = x.reshape(len(x), len(frames), height, 2, width, 2).mean((3, 5))
        means.append(x.mean((2, 3)))
    features = linear(w, "frame_sim_layer.projection", np.concatenate(means).T)
    histograms = np.zeros((len(frames), 512))
    for t, pixels in enumerate(frames.reshape(len(frames), -1, 3)):
        for red, green, blue in pixels // 32:
            histograms[t, 64 * int(red) + 8 * int(green) + int(blue)] += 1
    alike = [np.maximum(linear(w, f"{name}.fc", slow_similarities(v)), 0) for name, v in (
        ("color_hist_layer", histograms), ("frame_sim_layer", features))]  # fmt: skip
    flat = x.transpose(1, 2, 3, 0).reshape(len(frames), -1)
    hidden = np.maximum(linear(w, "fc1", np.concatenate([*alike, flat], 1)), 0)
    return linear(w, "cls_layer1", hidden)[:, 0], linear(w, "cls_layer2", hidden)[:, 0]


def slow_convolution(w: dict[str, Array], prefix: str, dilation: int, x: Array) -> Array:
    space, time = (w[f"{prefix}.Conv3D_{dilation}.layers.{i}.weight"] for i in range(2))
    _, frames, height, width = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    y = sum(
        np.tensordot(space[:, :, 0, i, j], padded[:, :, i : i + height, j : j + width], 1)
        for i in range(3)
        for j in range(3)
    )
    padded = np.pad(y, ((0, 0), (dilation, dilation), (0, 0), (0, 0)))
    return sum(
        np.tensordot(time[:, :, k, 0, 0], padded[:, k * dilation : k * dilation + frames], 1)
        for k in range(3)
    )


def slow_similarities(vectors: Array) -> Array:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    out = np.zeros((len(unit), 101))
    for t in range(len(unit)):
        for other in range(max(0, t - 50), min(len(unit), t + 51)):
            out[t, other - t + 50] = unit[t] @ unit[other]
    return out


def linear(w: dict[str, Array], name: str, x: Array) -> Array:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def noise(num_frames: int, seed: int = 0) -> Array:
    """Four takes of noise around one colour each."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 255, (4, 1, 1, 3)).repeat(-(-num_frames // 4), 0)[:num_frames]
    return (base + rng.integers(-40, 40, (num_frames, 27, 48, 3))).clip(0, 255).astype(np.uint8)


def test_the_forward_pass_is_the_official_one(network: TransNetV2, state: State) -> None:
    frames = noise(56)  # more than fifty, so that windows of comparison end inside
    with torch.inference_mode():
        one, many = network(torch.from_numpy(frames[None]))
    slow_one, slow_many = slow_forward({k: v.numpy() for k, v in state.items()}, frames)
    assert slow_one.std() > 0.05
    assert slow_many.std() > 0.05
    np.testing.assert_allclose(one[0], slow_one, atol=1e-4)
    np.testing.assert_allclose(many[0], slow_many, atol=1e-4)


def test_a_network_has_the_official_names_and_shapes() -> None:
    found = {name: tuple(value.shape) for name, value in TransNetV2().state_dict().items()}
    assert found == official_shapes()


def test_both_file_formats_load_to_the_same_network(
    network: TransNetV2, state: State, tmp_path: Path
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    for name, value in load_transnetv2(path).state_dict().items():
        assert torch.equal(value, network.state_dict()[name]), name
    assert not network.training


def without_a_key(state: State) -> object:
    return {k: v for k, v in state.items() if k != "cls_layer2.bias"}


def with_one_more(state: State) -> object:
    return {**state, "cls_layer3.bias": torch.zeros(1)}


def misshaped(state: State) -> object:
    return {**state, "fc1.bias": torch.zeros(512)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_a_key, "cls_layer2.bias"),
        (with_one_more, "cls_layer3.bias"),
        (misshaped, "fc1.bias"),
        (lambda state: [*state], "list"),
        (lambda _: Path("/"), "objects other than tensors"),
    ],
)
def test_other_weights_are_refused(
    state: State, tmp_path: Path, change: Callable[[State], object], said: str
) -> None:
    path = tmp_path / "other.pth"
    torch.save(change(state), path)
    with pytest.raises(CheckpointError, match="weights") as caught:
        load_transnetv2(path)
    assert said in str(caught.value)


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    for name, content in (
        ("a.safetensors", b"no header"),
        ("b.pth", b"no archive"),
        ("c.pth", b""),
        ("d.pth", pickle.dumps({"fc1.bias": 1}, protocol=2)),
        ("e.pth", pickle.dumps({"fc1.bias": 1}, protocol=2)[:-4]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_transnetv2(tmp_path / name)
    for name in ("missing.pth", "missing.safetensors"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_transnetv2(tmp_path / name)


class WhereAndWhat(nn.Module):
    """Tells each frame's place in the window, and the sum of its window's frames around it."""

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        value = frames[..., 0, 0, 0].double()
        place = torch.arange(frames.shape[1]).expand(value.shape).double()
        around = torch.nn.functional.pad(value, (25, 25)).unfold(1, 51, 1).sum(2)
        return (place / 100).logit(1e-9), (around / 20_000).logit(1e-12)


@pytest.mark.parametrize("num_frames", [1, 2, 49, 50, 51, 99, 100, 101, 230])
def test_every_frame_is_judged_in_the_middle_of_a_window(num_frames: int) -> None:
    frames = np.random.default_rng(num_frames).integers(0, 255, (num_frames, 27, 48, 3), np.uint8)
    place, around = predict(WhereAndWhat(), frames)  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(100 * place, 25 + np.arange(num_frames) % 50, atol=1e-5)
    values = frames[:, 0, 0, 0].astype(int)
    for i, found in enumerate(around):
        near = [values[min(max(j, 0), num_frames - 1)] for j in range(i - 25, i + 26)]
        assert 20_000 * found == pytest.approx(sum(near), abs=1e-3)


def test_predictions_do_not_hang_on_the_number_of_threads(network: TransNetV2) -> None:
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(predict(network, noise(30)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(found[0], found[1])


def slow_marked(one: Array, many: Array, threshold: float) -> list[tuple[str, int, int, int]]:
    """Runs of marked frames, grown to both sides from the frames that the first head marks."""
    found: set[tuple[str, int, int, int]] = set()
    marked = [max(a, b) > threshold for a, b in zip(one, many, strict=True)]
    for i in range(len(one)):
        if one[i] <= threshold:
            continue
        start = end = i
        while start > 0 and marked[start - 1]:
            start -= 1
        while end + 1 < len(one) and marked[end + 1]:
            end += 1
        middle = max(range(start, end + 1), key=lambda j: one[j]) + 1
        cut = start == end
        found.add(("cut" if cut else "dissolve", end + 1 if cut else start, end + 1, middle))
    return sorted(found, key=lambda t: t[2])


levels = st.lists(st.tuples(*[st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.9])] * 2), min_size=1)


@given(levels, st.sampled_from([0.2, 0.5]))
def test_transitions_are_the_marked_runs(levels: list[tuple[float, float]], t: float) -> None:
    one, many = np.array(levels, np.float32).T
    pts = [100 + 3 * i for i in range(len(one) + 1)]
    found = find_marked(one, many, t, pts)
    assert [(f.kind, f.start_frame, f.end_frame, f.middle_frame) for f in found] == slow_marked(
        one, many, t
    )
    for a, b in pairwise(found):
        assert a.end_frame <= b.start_frame
    for f in found:
        assert f.score > 1
        assert f.start_frame <= f.middle_frame <= f.end_frame
        assert (f.start_pts, f.end_pts) == (pts[f.start_frame], pts[f.end_frame])


def test_a_cut_is_after_its_marked_frame_and_a_dissolve_reaches_as_far_as_it_is_seen() -> None:
    one, many = np.zeros((2, 30), np.float32)
    one[9] = many[9] = 0.9
    many[15:23] = 0.8
    one[18] = 0.75
    many[26:28] = 0.9  # not marked by the first head
    cut, dissolve = find_marked(one, many, 0.5, range(31))
    assert (cut.kind, cut.start_frame, cut.end_frame) == ("cut", 10, 10)
    assert cut.score == pytest.approx(1.8)
    assert (dissolve.kind, dissolve.start_frame, dissolve.middle_frame, dissolve.end_frame) == (
        "dissolve", 15, 19, 23,
    )  # fmt: skip


def test_the_network_sees_small_upright_frames(samples: Path) -> None:
    for path in (samples / "big_buck_bunny.mp4", ODD / "rotated_phone.mov"):
        frames = [shrink(frame) for _, frame in zip(range(3), decode(path), strict=False)]
        wanted = read_frames(path, [0, 1, 2], height_px=27, width_px=48)
        assert frames[0].shape == (27, 48, 3)
        assert np.abs(np.stack(frames).astype(int) - wanted).mean() < 6
