import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import ConfigError
from tests.training.models import GRID, model
from tests.training.restatement import official_sincos
from training.positions import Timeline, rotary, rotate

LENGTHS = st.lists(st.integers(1, 5), min_size=1, max_size=5)


@given(LENGTHS, st.integers(0, 9))
def test_policies_lay_out_what_they_say(lengths, gap):
    total, longest = sum(lengths), max(lengths)
    running = Timeline.of(lengths, "continuous")
    assert running == Timeline(tuple(range(total)), total, longest)
    assert Timeline.of(lengths, "gap", 0) == running
    spaced = Timeline.of(lengths, "gap", gap)
    scene = [s for s, n in enumerate(lengths) for _ in range(n)]
    assert [p - gap * s for p, s in zip(spaced.positions, scene, strict=True)] == list(range(total))
    assert spaced.length == total + gap * (len(lengths) - 1)
    reset = Timeline.of(lengths, "reset")
    assert reset == Timeline(tuple(i for n in lengths for i in range(n)), longest, longest)


@pytest.mark.parametrize(
    ("policy", "gap"), [("loop", 0), ("continuous", 1), ("reset", 1), ("gap", -1)]
)
def test_unknown_policies_and_idle_gaps_are_refused(policy, gap):
    with pytest.raises(ConfigError):
        Timeline.of([1, 2], policy, gap)


def sincos(scene_frames, grid=GRID) -> torch.Tensor:
    ours = model("2b").double()
    timeline = Timeline.of(scene_frames, "continuous")
    tokens = torch.zeros(1, sum(scene_frames) * grid[0] * grid[1], 32, dtype=torch.float64)
    placed, rotations = ours.place(tokens, timeline, grid, 5)
    assert rotations is None
    return placed[0]


@pytest.mark.parametrize("scenes", [1, 3, 5])
def test_sincos_positions_are_the_official_ones_at_the_trained_size(scenes):
    official = official_sincos(32, (3, *GRID), scenes, GRID)
    torch.testing.assert_close(sincos([3] * scenes), official, rtol=0, atol=1e-10)


def test_sincos_positions_differ_from_the_official_ones_elsewhere():
    # the official code resizes its table in space as well; diffusers and we compute another one
    wide = (3, 6)
    official = official_sincos(32, (3, *GRID), 3, wide)
    assert (sincos([3] * 3, wide) - official).abs().max() > 0.1
    # and it always resizes to the trained number of frames per scene, then cuts off what is over
    short = official_sincos(32, (3, *GRID), 3, GRID)[: 6 * 12]
    assert (sincos([2] * 3) - short).abs().max() > 0.1


def test_rotations_keep_text_and_lengths_and_depend_on_differences_alone():
    x = torch.randn(2, 5 + 24, 3, 16, generator=torch.Generator().manual_seed(0))
    near, far = (rotary(16, 5, p, GRID, GRID, dtype=torch.float64) for p in ((0, 1), (7, 8)))
    turned = rotate(x.double(), near)
    assert torch.equal(turned[:, :5], x[:, :5].double())
    torch.testing.assert_close(turned.norm(dim=-1), x.double().norm(dim=-1))
    scores = [
        torch.einsum("bqne,bkne->bnqk", *(rotate(x[:, :, :].double(), r)[:, 5:] for _ in "qk"))
        for r in (near, far)
    ]
    torch.testing.assert_close(scores[0], scores[1])
    assert rotate(x.bfloat16(), rotary(16, 5, (0, 1), GRID, GRID)).dtype == torch.bfloat16
