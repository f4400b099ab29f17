"""The ``transnetv2`` shot detector: a network that looks at a hundred small frames at a time.

It tells two probabilities for each frame. The first head marks one frame per transition: the last
one of the shot before a cut, the middle one of a gradual transition. The second head marks every
frame that mixes two shots, and tells so how far a gradual transition reaches.

Source: "TransNet V2: An effective deep network architecture for fast shot transition detection"
(arXiv 2008.04838) and the repository soCzech/TransNetV2, whose inference this repeats. It uses the
first head alone: what that one does not mark is no transition here either.

One CPU core judges about fifty frames a second: ``shots.timeout_s`` must allow for it.

Shape legend: B windows, T frames, C channels, H=27 and W=48 pixels, N frames of a video.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from curation.fast_shots import Transition
from curation.video import Frames, quarter_turns
from curation.weights import check_weights, read_weights

Probabilities = npt.NDArray[np.float32]

HEIGHT_PX, WIDTH_PX = 27, 48
THRESHOLD = 0.5
"""Source: inference/transnetv2.py."""

_WINDOW = 100
_MARGIN = 25
"""Frames at each end of a window whose predictions are not used."""
_STEP = _WINDOW - 2 * _MARGIN

_DILATIONS = (1, 2, 4, 8)
"""In time, of the four convolutions of a cell."""
_FILTERS = (16, 32, 64)
"""Of each of those convolutions, in the three blocks; a cell has four times as many channels."""
_LOOKUP = 101
"""Each frame is compared with those up to fifty before and after it."""
_SIMILARITY = 128
"""Length of the vectors compared, and of what is made of the comparisons."""
_DENSE = 1024

# What reading a file of another kind, or one cut short, ends in.


class TransNetV2Shots:
    """Takes the frames of one video in order, then tells its transitions.

    Args:
        network: With its weights loaded.
        threshold: Probability above which a frame counts as marked; None takes the official one.
    """

    def __init__(self, network: TransNetV2, threshold: float | None = None) -> None:
        self._network = network
        self._threshold = THRESHOLD if threshold is None else threshold
        self._small: list[Frames] = []

    def add(self, frame: av.VideoFrame) -> None:
        """Take the next decoded frame."""
        self._small.append(shrink(frame))

    def transitions(self, frame_pts: Sequence[int]) -> list[Transition]:
        """All transitions of the video, in order and without overlaps.

        Args:
            frame_pts: PTS of each frame added and the end of the last one.
        """
        one, many = predict(self._network, np.stack(self._small))
        return find_marked(one, many, self._threshold, frame_pts)


def shrink(frame: av.VideoFrame) -> Frames:
    """(27, 48, 3) RGB, upright, scaled as the ``ffmpeg`` program does it unless told otherwise."""
    turns = quarter_turns(frame)
    size = (HEIGHT_PX, WIDTH_PX) if turns % 2 else (WIDTH_PX, HEIGHT_PX)
    small = frame.reformat(*size, format="rgb24", interpolation="BICUBIC")
    return np.rot90(np.asarray(small.to_ndarray(), np.uint8), turns)


def predict(network: TransNetV2, frames: Frames) -> tuple[Probabilities, Probabilities]:
    """Both heads' probabilities, (N,) each, of the (N, 27, 48, 3) RGB frames of a whole video.

    The first and last frames are repeated so that every frame lies in the middle of a window.
    """
    after = _MARGIN + -len(frames) % _STEP
    padded = np.pad(frames, ((_MARGIN, after), (0, 0), (0, 0), (0, 0)), mode="edge")
    middle = slice(_MARGIN, _MARGIN + _STEP)
    heads: list[Tensor] = []
    with torch.inference_mode(), _one_thread():
        for start in range(0, len(padded) - _WINDOW + 1, _STEP):
            logits = network(torch.from_numpy(padded[None, start : start + _WINDOW]))
            heads.append(torch.stack(logits)[:, 0, middle].sigmoid())
    one, many = torch.cat(heads, 1)[:, : len(frames)].numpy()
    return one, many


def find_marked(
    one: Probabilities, many: Probabilities, threshold: float, frame_pts: Sequence[int]
) -> list[Transition]:
    """Transitions from the two heads.

    Frames that either head marks hang together; such a run is a transition if the first head marks
    one of them. A single marked frame is the last one before a cut. A longer run shows two shots at
    once, as those do that the network was trained on, and is a ``dissolve``.

    Args:
        one: (N,) probabilities of the first head.
        many: (N,) probabilities of the second head.
        threshold: Marked is what is above it.
        frame_pts: PTS of each frame and the end of the last one.
    """
    marked = np.pad((one > threshold) | (many > threshold), 1)
    edges = np.flatnonzero(marked[1:] != marked[:-1])
    found: list[Transition] = []
    for start, end in edges.reshape(-1, 2).tolist():
        peak = start + int(one[start:end].argmax())
        score = float(one[peak]) / threshold
        if one[peak] <= threshold:
            continue
        is_cut = end - start == 1
        kind, first = ("cut", end) if is_cut else ("dissolve", start)
        span_pts = frame_pts[first], frame_pts[end]
        found.append(Transition(kind, first, end, peak + 1, *span_pts, score))
    return found


def load_transnetv2(path: Path) -> TransNetV2:
    """The network with the weights of a checkpoint in the official PyTorch layout.

    Args:
        path: ``.safetensors``, or a state dict saved by ``torch.save`` under any other name; that
            is read without unpickling objects.

    Raises:
        CheckpointError: The file is missing, no such file, or holds other weights.
    """
    network = TransNetV2()
    weights = read_weights(path)
    check_weights(path, weights, network.state_dict(), "TransNetV2")
    network.load_state_dict(weights)
    return network.eval()


@contextmanager
def _one_thread() -> Generator[None]:
    """Workers run side by side, one per CPU; and a sum must not depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TransNetV2(nn.Module):
    """The network. Its parts bear the names that they have in the official checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        inputs = (3, *(4 * f for f in _FILTERS[:-1]))
        self.SDDCNN = nn.ModuleList(_Block(c, f) for c, f in zip(inputs, _FILTERS, strict=True))
        self.frame_sim_layer = _FrameSimilarity(sum(4 * f for f in _FILTERS))
        self.color_hist_layer = _ColourHistograms()
        # Each of the three blocks halves the picture: 27 x 48 becomes 3 x 6.
        flat = 4 * _FILTERS[-1] * (HEIGHT_PX // 8) * (WIDTH_PX // 8)
        self.fc1 = nn.Linear(2 * _SIMILARITY + flat, _DENSE)
        self.cls_layer1 = nn.Linear(_DENSE, 1)
        self.cls_layer2 = nn.Linear(_DENSE, 1)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, 27, 48, 3) uint8 RGB to the (B, T) logits of both heads."""
        x = frames.movedim(-1, 1).float() / 255
        levels: list[Tensor] = []
        for block in self.SDDCNN:
            x = block(x)
            levels.append(x)
        flat = x.movedim(1, -1).flatten(2)
        parts = (self.color_hist_layer(frames), self.frame_sim_layer(levels), flat)
        x = functional.relu(self.fc1(torch.cat(parts, 2)))
        return self.cls_layer1(x).squeeze(2), self.cls_layer2(x).squeeze(2)


class _Block(nn.Module):
    """Two cells with a shortcut around the second one, then half the height and width."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        self.DDCNN = nn.ModuleList([_Cell(channels, filters), _Cell(4 * filters, filters)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) to (B, 4 * filters, T, H // 2, W // 2)."""
        first = functional.relu(self.DDCNN[0](x))
        second = functional.relu(self.DDCNN[1](first))
        return functional.avg_pool3d(first + second, (1, 2, 2))


class _Cell(nn.Module):
    """Four convolutions side by side that reach 1, 2, 4 and 8 frames each way in time."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        for dilation in _DILATIONS:
            self.add_module(f"Conv3D_{dilation}", _SplitConvolution(channels, filters, dilation))
        # The training framework's epsilon, not torch's 1e-5.
        self.bn = nn.BatchNorm3d(len(_DILATIONS) * filters, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) to (B, 4 * filters, T, H, W)."""
        parts = [self.get_submodule(f"Conv3D_{dilation}")(x) for dilation in _DILATIONS]
        return self.bn(torch.cat(parts, 1))


class _SplitConvolution(nn.Module):
    """A convolution in space, then a dilated one in time."""

    def __init__(self, channels: int, filters: int, dilation: int) -> None:
        super().__init__()
        space = nn.Conv3d(channels, 2 * filters, (1, 3, 3), padding=(0, 1, 1), bias=False)
        time = nn.Conv3d(
            2 * filters,
            filters,
            (3, 1, 1),
            padding=(dilation, 0, 0),
            dilation=(dilation, 1, 1),
            bias=False,
        )
        self.layers = nn.Sequential(space, time)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) to (B, filters, T, H, W)."""
        return self.layers(x)


class _FrameSimilarity(nn.Module):
    """How alike what the blocks see is in each frame and its neighbours."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.projection = nn.Linear(channels, _SIMILARITY)
        self.fc = nn.Linear(_LOOKUP, _SIMILARITY)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """The blocks' (B, C, T, H, W) to (B, T, 128)."""
        means = torch.cat([level.mean((3, 4)) for level in levels], 1)
        return functional.relu(self.fc(_similarities(self.projection(means.transpose(1, 2)))))


class _ColourHistograms(nn.Module):
    """How alike the colours of each frame and its neighbours are, in 512 bins."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(_LOOKUP, _SIMILARITY)

    def forward(self, frames: Tensor) -> Tensor:
        """(B, T, H, W, 3) uint8 RGB to (B, T, 128)."""
        red, green, blue = (frames >> 5).long().flatten(2, 3).unbind(3)
        bins = (red << 6) + (green << 3) + blue
        counts = torch.zeros(*bins.shape[:2], 512, device=frames.device)
        counts.scatter_add_(2, bins, torch.ones_like(bins, dtype=counts.dtype))
        return functional.relu(self.fc(_similarities(counts)))


def _similarities(vectors: Tensor) -> Tensor:
    """(B, T, C) to (B, T, 101): cosines of each frame with those around it, 0 beyond the window."""
    unit = functional.normalize(vectors, dim=2)
    reach = _LOOKUP // 2
    padded = functional.pad(unit @ unit.transpose(1, 2), (reach, reach))
    time = torch.arange(vectors.shape[1], device=vectors.device)
    around = time[:, None] + torch.arange(_LOOKUP, device=vectors.device)
    return padded.gather(2, around.expand(len(vectors), -1, -1))
